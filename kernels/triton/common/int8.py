"""Vectors stored as int8 numbers with one fp32 scale each: vector = scale * stored.

The scale is a 127th of the vector's largest number, and at least 2^-126; the stored numbers are the nearest to vector /
scale, ties to even. It is no power of two, because fixed-point numbers would lose up to a bit by that. A vector that is
not finite gets zeros and the scale NaN, and counts as NaN.

Products of int8 numbers are summed up in int32, without rounding, and each sum is multiplied by its key's scale in
fp32: every GPU finds the same scores, whatever the order of its sums. Queries are quantized when they are loaded. The
scale of a query changes no order among its scores, and is left out of them.
"""

import triton
import triton.language as tl

# 1.5 * 2^23: a sum with it, in fp32, is rounded to an integer, which is in the low bits of the sum.
ROUNDING = tl.constexpr(12582912.0)
ROUNDING_BITS = tl.constexpr(0x4B400000)
INFINITY_BITS = tl.constexpr(0x7F800000)
LEAST_SCALE = tl.constexpr(2.0**-126)


@triton.jit
def quantize_int8(x):
    """(int8 numbers [N, D], fp32 scales [N]) of vectors x [N, D]."""
    x = x.to(tl.float32)
    # Bits are compared as integers, where NaN and infinity are the largest: a maximum of numbers would lose NaN.
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = bits < INFINITY_BITS
    scale = tl.maximum(tl.div_rn(bits.to(tl.float32, bitcast=True), 127.0), LEAST_SCALE)
    # A product with the inverse would be rounded twice, or once where the compiler fuses it with the sum.
    rounded = tl.div_rn(x, scale[:, None]) + ROUNDING
    numbers = rounded.to(tl.int32, bitcast=True) - ROUNDING_BITS
    return tl.where(finite[:, None], numbers, 0).to(tl.int8), tl.where(finite, scale, float("nan"))
