"""Vectors stored as e4m3 numbers with one scale per vector: vector = scale * stored, the scale an e8m0 number.

An e8m0 number is one byte, a power of two or NaN; its code is held as uint8. The scale is the least with which the
largest number of the vector is at most 448, e4m3's largest. A vector that is not finite, or beyond 448 * 2^119, has the
scale NaN and counts as NaN throughout, whatever its stored numbers.

PyTorch converts e4m3 on a CPU one number at a time. This module shifts bits instead: s eeee mmm becomes
s 0eeee mmm0000000, which as a float16 is the same number divided by 2^8, exactly, subnormals included; or
s 0000eeee mmm0000, which as a bfloat16 is the number divided by 2^120. This alone would read e4m3's own
code of NaN as 480. A vector whose scale is a number never contains that code, but pages without scales of tokens may.
It is rare, so numbers are searched for it before any is replaced.
"""

import torch
from torch import Tensor

SHIFT = 2.0**8
BFLOAT16_SHIFT = 2.0**120
# The largest subnormal number.
LARGEST_SUBNORMAL = 7 * 2.0**-9
# The bits of a float32's fraction, and those of 448 = 1.75 * 2^8.
_FRACTION, _LARGEST_FRACTION = 0x7FFFFF, 0x600000
# The code of 2^119. A larger scale times SHIFT might exceed float32.
_LAST = 246
_NAN = 255
# The code of NaN among e4m3 numbers, without the sign.
_CODE_OF_NAN = 127
# The bits that a number fills: all of a float16 but the highest of its exponent and the last seven, and all of a
# bfloat16 but the four highest of its exponent and the last four.
_FLOAT16, _BFLOAT16 = -0x4080, -0x7810


def is_e4m3(x: Tensor) -> bool:
    """Whether x is stored as e4m3 numbers."""
    return x.dtype == torch.float8_e4m3fn


def as_float16(stored: Tensor, bits: Tensor | None = None) -> Tensor:
    """The e4m3 numbers ``stored`` divided by ``SHIFT``, in the memory of ``bits`` (int16), if given."""
    bits = torch.empty(stored.shape, dtype=torch.int16) if bits is None else bits
    return _spread(stored, 2**7, _FLOAT16, bits, torch.float16)


def as_bfloat16(stored: Tensor, bits: Tensor) -> Tensor:
    """The numbers divided by ``BFLOAT16_SHIFT``: e4m3's subnormals stay subnormal, and products may flush them to 0."""
    return _spread(stored, 2**4, _BFLOAT16, bits, torch.bfloat16)


def _spread(stored: Tensor, factor: int, mask: int, bits: Tensor, dtype: torch.dtype) -> Tensor:
    codes = stored.view(torch.int8)
    # Sign extension to 16 bits puts the sign into the highest bit.
    numbers = bits.copy_(codes).mul_(factor).bitwise_and_(mask).view(dtype)
    if _contains_nan(codes):
        numbers.masked_fill_(codes & _CODE_OF_NAN == _CODE_OF_NAN, torch.nan)
    return numbers


def _contains_nan(codes: Tensor) -> bool:
    # The code is the largest int8 number, and with the sign the largest uint8 number. Two maxima are much faster than a
    # comparison of every number.
    if codes.numel() == 0:
        return False
    return int(codes.amax()) == _CODE_OF_NAN or int(codes.view(torch.uint8).amax()) == 128 + _CODE_OF_NAN


def as_scales(codes: Tensor) -> Tensor:
    """The scales of these codes."""
    return codes.view(torch.float8_e8m0fnu)


def each_scale(codes: Tensor | None, stored: Tensor) -> Tensor | None:
    """The codes of the vectors stored [P,H,S,D], as [P,H,S]: codes [S] are those of each page and head."""
    return codes if codes is None or codes.dim() > 1 else codes.expand(stored.shape[:-1])


def factors(scales: Tensor) -> Tensor:
    """The factors that turn numbers of ``as_float16`` back into the original ones."""
    return scales.to(torch.float32) * SHIFT


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] to e4m3 numbers [..., D] and the codes of their scales [...]."""
    x = x.to(torch.float32)
    largest = x.abs().amax(-1).view(torch.int32)
    code = (largest >> 23) - 8 + (largest & _FRACTION > _LARGEST_FRACTION).int()
    code = torch.where(code > _LAST, _NAN, code.clamp(min=1)).to(torch.uint8)
    return (x / as_scales(code).to(torch.float32)[..., None]).to(torch.float8_e4m3fn), code
