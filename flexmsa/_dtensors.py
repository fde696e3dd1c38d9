"""Functions of plain tensors that also take DTensors."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import Tensor
from torch.nn import Parameter

__all__ = ["takes_dtensors"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def takes_dtensors(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let a function of plain tensors take DTensors: see `flexmsa.distributed`."""
    signature = inspect.signature(function)
    name = next(iter(signature.parameters))

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0] if args else kwargs.get(name)
        # Tested by its attribute, because the class's import takes a second.
        if type(first) in (Tensor, Parameter) or not hasattr(first, "device_mesh"):
            return function(*args, **kwargs)
        from flexmsa.distributed import dtensors

        return dtensors.call(function, signature.bind(*args, **kwargs).arguments)

    return call
