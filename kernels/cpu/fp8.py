"""Vectors kept as e4m3 numbers with one float32 scale each: vector = scale * stored, scale = max |vector| / 448.

PyTorch converts e4m3 on a CPU one number at a time. Here the bits s eeee mmm become s 0eeee mmm0000000, and these, as
a float16, are the same number divided by 2^8: exactly, subnormals included. A vector that is not finite has a scale
that is not: it counts as NaN throughout, whatever was stored. The code of e4m3's own NaN is never stored in a vector
with a finite scale, and is read as 480.
"""

import torch
from torch import Tensor

LARGEST = 448.0
SHIFT = 2.0**8
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


def factors(scale: Tensor) -> Tensor:
    """What the numbers of ``as_float16`` are to be multiplied by: NaN for a vector that is not finite."""
    return scale * SHIFT + (scale - scale)


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] to e4m3 numbers [..., D] and scales [...]; the scale of a zero vector is 0."""
    x = x.to(torch.float32)
    scale = x.abs().amax(-1) / LARGEST
    divisor = scale.masked_fill(scale == 0, 1.0)
    stored = torch.where((scale == 0)[..., None], 0.0, x / divisor[..., None])
    return stored.to(torch.float8_e4m3fn), scale
