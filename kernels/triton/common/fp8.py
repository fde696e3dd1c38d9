"""Vectors kept as e4m3 numbers with one scale each: vector = scale * stored, the scale an e8m0 number.

That is a power of two in a byte, held as uint8, code c for 2^(c - 127) and 255 for NaN: the least with which the
largest number is at most e4m3's largest, 448. A power of two, because products with it are exact. A scale for each
token, because appending then never changes what was stored before. A vector that is not finite, or beyond 448 * 2^119,
counts as NaN throughout, whatever was stored. The kernels take e4m3 as uint8 too, and decode and encode the bits
themselves where the GPU has no such type. (PyTorch's type of these scales is not used: Inductor compiles no operator
that writes to it.)
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .primitives import load_tile
from .target import Target, storage_constants

# fp32 bits: the fraction of 448, which is 1.75 * 2^8; 480, the first number that e4m3 cannot round to 448; 2^-6, its
# smallest normal number; and 2^14, the number whose last place is 2^-9, as that of e4m3's subnormals.
LARGEST_FRACTION = tl.constexpr(0x600000)
OVERFLOW_BITS = tl.constexpr(0x43F00000)
NORMAL_BITS = tl.constexpr(0x3C800000)
SUBNORMAL_BITS = tl.constexpr(0x46800000)
SUBNORMAL_UNIT = tl.constexpr(16384.0)


@triton.jit
def decode_e4m3(x, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """The e4m3 numbers of uint8 `x` in `dtype`: exact in bf16, fp16 and fp32.

    Not NATIVE, as the bits of fp16 numbers 2^8 times smaller, subnormals included.
    """
    if NATIVE:
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
    # An addition of fp32 rounds to the last place that it keeps.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + SUBNORMAL_UNIT).to(tl.int32, bitcast=True) - SUBNORMAL_BITS
    code = tl.where(magnitude < NORMAL_BITS, subnormal, tl.where(magnitude < OVERFLOW_BITS, normal, 0x7F))
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def quantize(x):
    """(e4m3 codes uint8 [N, D], scale codes uint8 [N]) of vectors x [N, D]."""
    x = x.to(tl.float32)
    # As integers, the bits of NaN and infinity are the largest: a maximum of numbers would lose NaN.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    code = (largest >> 23) - 8 + ((largest & 0x7FFFFF) > LARGEST_FRACTION).to(tl.int32)
    code = tl.maximum(code, 1)
    # 246 is 2^119: the last whose inverse, and 2^8 times itself, are fp32 numbers as well.
    inverse = (tl.maximum(254 - code, 8) << 23).to(tl.float32, bitcast=True)
    return encode_e4m3(x * inverse[:, None]), tl.where(code > 246, 255, code).to(tl.uint8)


@triton.jit
def decode_scales(codes):
    """The e8m0 numbers of uint8 `codes`, in fp32."""
    scales = (codes.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return tl.where(scales < float("inf"), scales, float("nan"))


@triton.jit
def load_scales(scales, column, mask):
    """The scales at scales + column."""
    return decode_scales(tl.load(scales + column, mask=mask, other=0))


@triton.jit
def dequantize(x, scale, dtype: tl.constexpr, NATIVE: tl.constexpr):
    """Vectors [N, D] in `dtype` from uint8 `x` and their scales [N], decoded."""
    return (decode_e4m3(x, tl.float32, NATIVE) * scale[:, None]).to(dtype)


@triton.jit
def load_stored(
    base, count, stride_s, stride_d, dtype: tl.constexpr,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The first `count` vectors from `base` on as a tile [COLUMNS, DEPTH], zero beyond.

    SCALED: e4m3 numbers in `dtype`, still to be multiplied by their scales.
    """
    x = load_tile(base, 0, count, stride_s, stride_d, COLUMNS, HEAD_DIM, DEPTH)
    # By way of fp32: from fp16 to bf16 the conversion is slower than the two.
    return decode_e4m3(x, tl.float32, NATIVE).to(dtype) if SCALED else x


@triton.jit
def load_vectors(
    base, scales, count, stride_s, stride_d, dtype: tl.constexpr,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The first `count` vectors from `base` on as a tile [COLUMNS, DEPTH], zero beyond; SCALED: dequantized."""
    x = load_tile(base, 0, count, stride_s, stride_d, COLUMNS, HEAD_DIM, DEPTH)
    if SCALED:
        column = tl.arange(0, COLUMNS)
        x = dequantize(x, load_scales(scales, column, column < count), dtype, NATIVE)
    return x


@triton.jit
def split_e4m3(x):
    """e4m3 numbers [2 N, D] for vectors x [N, D]: rows p and r in turn, with x = p + r / 16 up to a power of two a row.

    Two of them hold the 8 significant bits of a bf16 number, but of one less than 2^-13 of the largest in its row.
    """
    N: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    x = x.to(tl.float32)
    exponent = tl.max((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, axis=1)
    # The largest number comes to 128 .. 256: e4m3 ends at 448.
    factor = (tl.minimum(261 - exponent, 254) << 23).to(tl.float32, bitcast=True)
    x = x * factor[:, None]
    p = encode_e4m3(x)
    r = encode_e4m3((x - decode_e4m3(p, tl.float32, False)) * 16.0)
    both = tl.permute(tl.join(p, r), (0, 2, 1))
    return tl.reshape(both, [2 * N, D]).to(tl.float8e4nv, bitcast=True)


@triton.jit
def join_pairs(products):
    """Products [K, N] with vectors, from products [K, 2 N] with the rows of their `split_e4m3`."""
    K: tl.constexpr = products.shape[0]
    N: tl.constexpr = products.shape[1] // 2
    p, r = tl.split(tl.reshape(products, [K, N, 2]))
    return p + r * (1.0 / 16)


class Cache(NamedTuple):
    """How the attention's keys and values are kept: contiguous and in the dtype of q where all is None."""

    page_table: torch.Tensor | None = None
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None

    def constants(self, target: Target) -> dict[str, int | bool]:
        """The compile-time arguments that say so."""
        return storage_constants(target, self.page_table is not None, self.k_scale is not None)


def as_bits(x: torch.Tensor) -> torch.Tensor:
    """An e4m3 tensor as the kernels take it: uint8; any other as it is."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
