"""Vectors kept as e4m3 numbers with one scale each: vector = scale * stored, the scale an e8m0 number.

That is a power of two in a byte, or NaN, its code held as uint8: the least with which the largest number is at most
e4m3's largest, 448. A vector that is not finite, or beyond 448 * 2^119, counts as NaN throughout, whatever was stored.

PyTorch converts e4m3 on a CPU one number at a time. Here the bits s eeee mmm become s 0eeee mmm0000000, and these, as
a float16, are the same number divided by 2^8: exactly, subnormals included. The code of e4m3's own NaN is never stored
in a vector whose scale is a number, and is read as 480.
"""

import torch
from torch import Tensor

SHIFT = 2.0**8
# The bits of a float32's fraction, and those of 448 = 1.75 * 2^8.
_FRACTION, _LARGEST_FRACTION = 0x7FFFFF, 0x600000
# The code of 2^119, beyond which a scale times SHIFT might be no float32.
_LAST = 246
_NAN = 255
# All bits of a float16 but the highest of its exponent.
_MASK = -0x4080


def is_e4m3(x: Tensor) -> bool:
    """Whether x holds e4m3 numbers."""
    return x.dtype == torch.float8_e4m3fn


def as_float16(stored: Tensor, bits: Tensor | None = None) -> Tensor:
    """The e4m3 numbers ``stored`` divided by ``SHIFT``, in the memory of ``bits`` (int16), if given."""
    bits = torch.empty(stored.shape, dtype=torch.int16) if bits is None else bits
    # The signed byte widened to 16 bits repeats its sign, which so comes to stand in the highest bit too.
    return bits.copy_(stored.view(torch.int8)).mul_(128).bitwise_and_(_MASK).view(torch.float16)


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
