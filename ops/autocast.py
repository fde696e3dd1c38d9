"""Autocast for the operators: floating inputs are cast to the dtype of the region, statistics stay as they are, and
so does e4m3.

`torch.library.register_autocast` fixes one dtype for good; this follows the one that the user chose.
"""

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("flexmsa", "FRAGMENT")


def cast_to_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype of the autocast region they are in, unchanged outside of one."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    kept = (torch.float64, torch.float8_e4m3fn)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype not in kept else x for x in tensors)


def register_autocast(op: torch.library.CustomOpDef, *, cast: int) -> None:
    """Give `op` an autocast rule that casts its first `cast` arguments, and casts nothing inside the kernel."""
    for device in ("cpu", "cuda"):

        def rule(*args: Any, device: str = device) -> Any:
            inputs = cast_to_autocast(*args[:cast]) if cast else ()
            with torch.autocast(device, enabled=False):
                return op._opoverload(*inputs, *args[cast:])

        _library.impl(op._name, rule, f"Autocast{device.upper()}")
