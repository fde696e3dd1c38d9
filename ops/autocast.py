"""Autocast for the operators: cast floating inputs to the region's dtype; keep float64, e4m3 and statistics.

`torch.library.register_autocast` fixes one dtype at registration; this reads the user's dtype in each call.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def cast_to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of the enclosing autocast region, unchanged outside one."""
    device = tensors[0].device.type
    # PyTorch has no autocast for meta tensors, and raises.
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    kept = (torch.float64, torch.float8_e4m3fn)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype not in kept else x for x in tensors)


def autocast_rule(op: Any, device: str, cast: int) -> Callable[..., Any]:
    """The rule of an operator in an autocast region: cast its first arguments, and disable autocast in the kernel."""

    def rule(*args: Any) -> Any:
        inputs = cast_to_autocast(*args[:cast]) if cast else ()
        # As `torch.autocast(device, enabled=False)`, in a tenth of the time.
        torch.set_autocast_enabled(device, False)
        try:
            return op(*inputs, *args[cast:])
        finally:
            torch.set_autocast_enabled(device, True)

    return rule
