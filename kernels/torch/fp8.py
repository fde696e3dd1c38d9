"""Vectors kept as e4m3 numbers with one scale each: vector = scale * stored, the scale an e8m0 number.

That is a power of two in a byte, or NaN, its code held as uint8: the least with which the largest number is at most
e4m3's largest, 448. A vector that is not finite, or beyond 448 * 2^119, counts as NaN throughout, whatever was stored.

PyTorch converts e4m3 on a CPU one number at a time. Here the bits s eeee mmm become s 0eeee mmm0000000, and these, as
a float16, are the same number divided by 2^8: exactly, subnormals included. As a bfloat16, s 0000eeee mmm0000 are it
divided by 2^120. The code of e4m3's own NaN is never stored in a vector whose scale is a number, and is read as 480.
"""

import torch
from torch import Tensor

SHIFT = 2.0**8
BFLOAT16_SHIFT = 2.0**120
# The largest subnormal number.
LARGEST_SUBNORMAL = 7 * 2.0**-9
# The bits of a float32's fraction, and those of 448 = 1.75 * 2^8.
_FRACTION, _LARGEST_FRACTION = 0x7FFFFF, 0x600000
# The code of 2^119, beyond which a scale times SHIFT might be no float32.
_LAST = 246
_NAN = 255
# Where the bits of a number come to stand: all of a float16 but the highest of its exponent and the last seven, and all
# of a bfloat16 but the four highest of its exponent and the last four.
_FLOAT16, _BFLOAT16 = -0x4080, -0x7810


def is_e4m3(x: Tensor) -> bool:
    """Whether x holds e4m3 numbers."""
    return x.dtype == torch.float8_e4m3fn


def as_float16(stored: Tensor, bits: Tensor | None = None) -> Tensor:
    """The e4m3 numbers ``stored`` divided by ``SHIFT``, in the memory of ``bits`` (int16), if given."""
    bits = torch.empty(stored.shape, dtype=torch.int16) if bits is None else bits
    return _spread(stored, 2**7, _FLOAT16, bits).view(torch.float16)


def as_bfloat16(stored: Tensor, bits: Tensor) -> Tensor:
    """The same divided by ``BFLOAT16_SHIFT``: e4m3's subnormals are bfloat16's, which products may take for zero."""
    return _spread(stored, 2**4, _BFLOAT16, bits).view(torch.bfloat16)


def _spread(stored: Tensor, factor: int, mask: int, bits: Tensor) -> Tensor:
    # The signed byte widened to 16 bits repeats its sign, which so comes to stand in the highest bit too.
    return bits.copy_(stored.view(torch.int8)).mul_(factor).bitwise_and_(mask)


def as_scales(codes: Tensor) -> Tensor:
    """The scales whose codes these are."""
    return codes.view(torch.float8_e8m0fnu)


def factors(scales: Tensor) -> Tensor:
    """What the numbers of ``as_float16`` are to be multiplied by."""
    return scales.to(torch.float32) * SHIFT


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] to e4m3 numbers [..., D] and the codes of their scales [...]."""
    x = x.to(torch.float32)
    largest = x.abs().amax(-1).view(torch.int32)
    code = (largest >> 23) - 8 + (largest & _FRACTION > _LARGEST_FRACTION).int()
    code = torch.where(code > _LAST, _NAN, code.clamp(min=1)).to(torch.uint8)
    return (x / as_scales(code).to(torch.float32)[..., None]).to(torch.float8_e4m3fn), code
