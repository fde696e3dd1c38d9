"""Ranges in a profile, named after the steps of a layer."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["profiled"]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def profiled(name: str) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Show the function's calls as "flexmsa: name" in a profile; without a profiler, only look whether one runs."""

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
                return function(*args, **kwargs)
            with torch.profiler.record_function(f"flexmsa: {name}"):
                return function(*args, **kwargs)

        return call

    return decorate
