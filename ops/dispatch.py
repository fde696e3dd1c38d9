"""Which package of kernels runs an operator."""

import functools
import warnings
from types import ModuleType

from torch import Tensor


@functools.cache
def _warn_slow(operation: str, device: str) -> None:
    warnings.warn(
        f"flexmsa: {operation} runs through the plain PyTorch kernels on {device}, which wait for the device and are "
        "slower than its own kernels would be",
        stacklevel=2,
    )


def kernels(backend: str, operation: str, x: Tensor) -> ModuleType:
    """Return the kernels named "cpu" (plain PyTorch, any device) or "triton" to run `operation` on `x`."""
    if backend == "triton":
        from flexmsa.kernels import triton

        return triton
    from flexmsa.kernels import cpu

    if x.device.type != "cpu":
        _warn_slow(operation, x.device.type)
    return cpu
