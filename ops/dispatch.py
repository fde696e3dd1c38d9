"""Which package of kernels runs an operator."""

import functools
import warnings
from typing import Any


@functools.cache
def _warn_slow(operation: str, device: str) -> None:
    warnings.warn(
        f"flexmsa: {operation} runs through the plain PyTorch kernels on {device}, which wait for the device and are "
        "slower than its own kernels would be",
        stacklevel=2,
    )


def run_kernel(backend: str, kernel: str, *args: Any) -> Any:
    """Run a kernel by name from the package "cpu" (plain PyTorch, any device) or "triton" (imported on first use)."""
    if backend == "triton":
        from flexmsa.kernels import triton

        return getattr(triton, kernel)(*args)
    from flexmsa.kernels import cpu

    device = args[0].device
    if device.type == "cpu":
        return getattr(cpu, kernel)(*args)
    _warn_slow(kernel, device.type)
    with device:
        return getattr(cpu, kernel)(*args)
