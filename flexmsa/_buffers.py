"""The tensors that a cache keeps."""

import torch
from torch import Tensor

from flexmsa.kernels.problem import SCALE_DTYPES

__all__ = ["FP8", "as_bits", "dequantised", "is_recorded", "new_scale", "rounded_to_int8"]

FP8 = torch.float8_e4m3fn


def as_bits(buffer: Tensor) -> Tensor:
    """Return e4m3 buffers as uint8, because not every device can copy rows of e4m3; others unchanged."""
    return buffer.view(torch.uint8) if buffer.dtype == FP8 else buffer


def new_scale(buffer: Tensor) -> Tensor | None:
    """Return room for the scales of a buffer's vectors: codes of e4m3's, float32 for int8, None for other dtypes."""
    dtype = SCALE_DTYPES.get(buffer.dtype)
    return None if dtype is None else torch.zeros(buffer.shape[:-1], dtype=dtype, device=buffer.device)


def dequantised(buffer: Tensor, scale: Tensor) -> Tensor:
    """Return e4m3 or int8 vectors times their scales, in float32, or in the dtype of int8's scales."""
    factor = scale.view(torch.float8_e8m0fnu).float() if buffer.dtype == FP8 else scale
    return buffer.float() * factor[..., None]


def rounded_to_int8(x: Tensor) -> Tensor:
    """Return the int8 numbers that stand for index queries x beside int8 index keys, in float64, without their scales.

    A query's scale changes no order among its scores.
    """
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    scale = (largest / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(largest < torch.inf, (x / scale).round(), 0.0).double()


def is_recorded(x: Tensor) -> bool:
    """Return whether code for the device of x is being compiled or captured, so that no value can be read."""
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
