"""The tensors that a cache keeps."""

import torch
from torch import Tensor

__all__ = ["FP8", "as_bits", "dequantised", "is_recorded"]

FP8 = torch.float8_e4m3fn


def as_bits(buffer: Tensor) -> Tensor:
    """Return e4m3 buffers as uint8, because not every device can copy rows of e4m3; others unchanged."""
    return buffer.view(torch.uint8) if buffer.dtype == FP8 else buffer


def dequantised(buffer: Tensor, scale: Tensor) -> Tensor:
    """Return e4m3 vectors times their scales, in float32."""
    return buffer.float() * scale.view(torch.float8_e8m0fnu).float()[..., None]


def is_recorded(x: Tensor) -> bool:
    """Return whether code for the device of x is being compiled or captured, so that no value can be read."""
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
