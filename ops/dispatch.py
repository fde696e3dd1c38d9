"""Which package of kernels runs an operator."""

import contextlib
import functools
import warnings
from typing import Any

import torch


@functools.cache
def _warn_slow(operation: str, device: str) -> None:
    warnings.warn(
        f"flexmsa: {operation} runs through the plain PyTorch kernels on {device}, which wait for the device and are "
        "slower than its own kernels would be",
        stacklevel=2,
    )


def run_kernel(backend: str, kernel: str, *args: Any) -> Any:
    """Run a kernel by name from the package "torch" (plain PyTorch, any device) or "triton" (imported on first use)."""
    device = args[0].device
    if backend == "triton":
        from flexmsa.kernels import triton

        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return getattr(triton, kernel)(*args)
    from flexmsa.kernels import torch as torch_kernels

    if device.type == "cpu":
        return getattr(torch_kernels, kernel)(*args)
    _warn_slow(kernel, device.type)
    with device:
        return getattr(torch_kernels, kernel)(*args)
