"""Which package of kernels runs an operator."""

import contextlib
import functools
import warnings
from typing import Any

import torch


@functools.cache
def _warn_slow(operation: str, device: str) -> None:
    warnings.warn(
        f"flexmsa: {operation} runs through the plain PyTorch kernels on {device}; they wait for the device and are "
        "slower than kernels made for it",
        stacklevel=2,
    )


def run_kernel(backend: str, kernel: str, *args: Any) -> Any:
    """Call the function named `kernel` of a package of kernels and return its result.

    Args:
        backend: "torch" (plain PyTorch, any device) or "triton" (imported on first use).
        args: the function's arguments; the first is a tensor, on whose device the function runs.
    """
    device = args[0].device
    if backend == "triton":
        from flexmsa.kernels import triton

        # Triton launches on the current device, and the tensors may be on another one.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return getattr(triton, kernel)(*args)
    from flexmsa.kernels import torch as torch_kernels

    if device.type == "cpu":
        return getattr(torch_kernels, kernel)(*args)
    _warn_slow(kernel, device.type)
    with device:
        return getattr(torch_kernels, kernel)(*args)
