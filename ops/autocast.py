"""Autocast for the operators: cast floating inputs to the region's dtype; keep float64, e4m3 and statistics.

`torch.library.register_autocast` fixes one dtype at registration; this reads the user's dtype in each call.
"""

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("flexmsa", "FRAGMENT")


def cast_to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of the enclosing autocast region, unchanged outside one."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    kept = (torch.float64, torch.float8_e4m3fn)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype not in kept else x for x in tensors)


def register_autocast(op: torch.library.CustomOpDef, *, cast: int) -> None:
    """Give `op` an autocast rule: cast its first `cast` arguments, and disable autocast inside the kernel."""
    for device in ("cpu", "cuda"):

        def rule(*args: Any, device: str = device) -> Any:
            inputs = cast_to_autocast(*args[:cast]) if cast else ()
            with torch.autocast(device, enabled=False):
                return op._opoverload(*inputs, *args[cast:])

        _library.impl(op._name, rule, f"Autocast{device.upper()}")
