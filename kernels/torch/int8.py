"""Vectors stored as int8 numbers with one float32 scale per vector: vector = scale * stored.

The scale is a 127th of the vector's largest number, and at least 2^-126; the stored numbers are the nearest to vector /
scale, ties to even. Division and rounding are those of IEEE 754, so every device stores the same bits. A vector that is
not finite has zeros and the scale NaN, and counts as NaN.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from flexmsa.kernels.torch import fp8

_LEAST_SCALE = 2.0**-126


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors x [..., D] to int8 numbers [..., D] and their scales [...]."""
    x = x.to(torch.float32)
    largest = x.abs().amax(-1)
    # Some devices multiply by the rounded inverse of a divisor that is a plain number.
    scale = (largest / torch.full_like(largest, 127.0)).clamp(min=_LEAST_SCALE)
    finite = largest < torch.inf
    numbers = torch.where(finite[..., None], (x / scale[..., None]).round(), 0.0)
    return numbers.to(torch.int8), torch.where(finite, scale, torch.nan)


def quantizer(stored: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What makes numbers of the dtype of ``stored``, int8 or e4m3, and their scales."""
    return quantize if stored.dtype == torch.int8 else fp8.quantize


@functools.cache
def multiplies_int8() -> bool:
    """Whether the CPU has instructions for products of int8, AVX512_VNNI: without them PyTorch's are slow."""
    return torch.cpu._is_vnni_supported()


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """The int32 products [R, n] of int8 queries [R, Di] and keys [n, Di], on a CPU."""
    return torch._int_mm(queries, keys.T)
