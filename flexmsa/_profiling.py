"""Ranges in a profile, named after the steps of a layer."""

import contextlib

import torch

__all__ = ["step"]


def step(name: str) -> contextlib.AbstractContextManager[object]:
    """The range "flexmsa: name" while a profiler runs; otherwise nothing, because a range costs the host time."""
    if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
        return contextlib.nullcontext()
    return torch.profiler.record_function(f"flexmsa: {name}")
