"""Which package of kernels runs an operator."""

import contextlib
import functools
import importlib
import warnings
from types import ModuleType
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
        backend: "triton" (imported on first use), or the plain PyTorch kernels, for any device.
        args: the function's arguments; the first is a tensor, on whose device the function runs.
    """
    device = args[0].device
    function = getattr(_package(backend), kernel)
    if device.type == "cpu":
        return function(*args)
    if backend == "triton":
        # Triton launches on the current device, and the tensors may be on another one.
        if device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return run_kernel(backend, kernel, *args)
        with _package(backend).expected(functools.partial(function, *args)):
            return function(*args)
    _warn_slow(kernel, device.type)
    with device:
        return function(*args)


def expected_training_step(*args: Any) -> contextlib.AbstractContextManager[None]:
    """Inside, the first launch that has to be compiled compiles a whole training step of these arguments with it."""
    package = _package("triton")
    return package.expected(functools.partial(package.short_training_step, *args))


@functools.cache
def _package(backend: str) -> ModuleType:
    # The reference has no operators of its own.
    return importlib.import_module("flexmsa.kernels.triton" if backend == "triton" else "flexmsa.kernels.torch")
