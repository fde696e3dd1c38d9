"""Vectors stored as e4m3 numbers with one scale each: vector = scale * stored, the scale an e8m0 number.

An e8m0 number is a power of two in a byte (uint8): code c means 2^(c - 127), and 255 means NaN. The scale of a vector
is the smallest with which its largest number is at most 448, the largest of e4m3. It is a power of two, because
products with one are exact. Each token has its own, because appending then never changes stored vectors. A vector that
is not finite, or exceeds 448 * 2^119, gets the scale NaN, and counts as NaN throughout.

Kernels take e4m3 numbers as uint8, and decode and encode the bits themselves where the GPU has no such type: `native`
in what follows says that it has (`Target.has_e4m3`). PyTorch's type of e8m0 numbers is not used, because Inductor
compiles no operator that writes to it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .tiles import load_tile

# Bits of fp32 numbers: the fraction of 448 = 1.75 * 2^8; 480, the smallest number that e4m3 cannot round to 448; 2^-6,
# the smallest normal number of e4m3; 2^14, whose last place in fp32 is 2^-9, as is that of e4m3's subnormal numbers.
LARGEST_FRACTION = tl.constexpr(0x600000)
OVERFLOW_BITS = tl.constexpr(0x43F00000)
NORMAL_BITS = tl.constexpr(0x3C800000)
SUBNORMAL_BITS = tl.constexpr(0x46800000)
SUBNORMAL_UNIT = tl.constexpr(16384.0)


@triton.jit
def decode_e4m3(x, dtype: tl.constexpr, native: tl.constexpr):
    """The e4m3 numbers of uint8 `x` in `dtype`: exact in bf16, fp16 and fp32.

    Without `native`, x becomes the bits of fp16 numbers 2^8 times smaller, subnormal numbers included.
    """
    if native:
        return x.to(tl.float8e4nv, bitcast=True).to(dtype)
    else:
        wide = x.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        return (half.to(tl.float16, bitcast=True) * 256.0).to(dtype)


@triton.jit
def encode_e4m3(x):
    """The bits (uint8) of the e4m3 numbers nearest to fp32 `x`, ties to even; NaN where |x| >= 480."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    last_kept = (magnitude >> 20) & 1
    normal = (magnitude - (120 << 23) + 0x7FFFF + last_kept) >> 20
    # The addition rounds to the last place of its fp32 result.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + SUBNORMAL_UNIT).to(tl.int32, bitcast=True) - SUBNORMAL_BITS
    code = tl.where(magnitude < NORMAL_BITS, subnormal, tl.where(magnitude < OVERFLOW_BITS, normal, 0x7F))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize(x):
    """(e4m3 codes uint8 [N, D], scale codes uint8 [N]) of vectors x [N, D]."""
    x = x.to(tl.float32)
    # Bits are compared as integers, where NaN and infinity are the largest: a maximum of numbers would lose NaN.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    code = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > LARGEST_FRACTION).to(tl.int32)
    code = tl.maximum(code, 1)
    # 246 means 2^119, the largest scale whose inverse and whose product with 2^8 are fp32 numbers.
    inverse = (tl.maximum(254 - code, 8) << 23).to(tl.float32, bitcast=True)
    return encode_e4m3(x * inverse[:, None]), tl.where(code > 246, 255, code).to(tl.uint8)


@triton.jit
def decode_scales(codes):
    """The e8m0 numbers of uint8 `codes`, in fp32; fp32 scales as they are."""
    if codes.dtype == tl.float32:
        return codes
    else:
        scales = (codes.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        return tl.where(scales < float("inf"), scales, float("nan"))


@triton.jit
def load_scales(scales, column, mask):
    """The scales at scales + column."""
    return decode_scales(tl.load(scales + column, mask=mask, other=0))


@triton.jit
def dequantize(x, scale, dtype: tl.constexpr, native: tl.constexpr):
    """Vectors [N, D] in `dtype` from uint8 `x` and their scales [N], decoded."""
    return (decode_e4m3(x, tl.float32, native) * scale[:, None]).to(dtype)


@triton.jit
def load_stored(
    base,
    count,
    stride_s,
    stride_d,
    dtype: tl.constexpr,
    rows: tl.constexpr,
    head_dim: tl.constexpr,
    depth: tl.constexpr,
    native: tl.constexpr,
):
    """The first `count` vectors from `base` on as a tile [rows, depth], zero beyond.

    e4m3 numbers come in `dtype`, still to be multiplied by their scales.
    """
    x = load_tile(base, 0, count, stride_s, stride_d, rows, head_dim, depth)
    if base.dtype.element_ty == tl.uint8:
        # Through fp32: the conversion from fp16 to bf16 is slower than the two.
        x = decode_e4m3(x, tl.float32, native).to(dtype)
    return x


@triton.jit
def split_e4m3(x):
    """e4m3 numbers [2 N, D] of vectors x [N, D]: for each row, rows p and r with c x = p + r / 16, c a power of two.

    Two e4m3 numbers hold the 8 significant bits of a bf16 number that is at least 2^-13 of the largest in its row.
    """
    N: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    x = x.to(tl.float32)
    exponent = tl.max((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, axis=1)
    # The largest number becomes 128 .. 256: e4m3 ends at 448.
    factor = (tl.minimum(261 - exponent, 254) << 23).to(tl.float32, bitcast=True)
    x = x * factor[:, None]
    p = encode_e4m3(x)
    r = encode_e4m3((x - decode_e4m3(p, tl.float32, False)) * 16.0)
    both = tl.permute(tl.join(p, r), (0, 2, 1))
    return tl.reshape(both, [2 * N, D]).to(tl.float8e4nv, bitcast=True)


@triton.jit
def join_pairs(products):
    """Products [K, N] with vectors, from products [K, 2 N] with the rows that `split_e4m3` made of them."""
    K: tl.constexpr = products.shape[0]
    N: tl.constexpr = products.shape[1] // 2
    p, r = tl.split(tl.reshape(products, [K, N, 2]))
    return p + r * (1.0 / 16)


class Cache(NamedTuple):
    """How keys and values of the main branch are stored: contiguous and in the dtype of q where all is None."""

    page_table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """An e4m3 tensor as the kernels take it: uint8; any other as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
