"""What the public functions ask of the index loss, checked."""

import torch
from torch import Tensor

from flexmsa.types import AuxRequest

__all__ = ["check_count", "check_value"]


def check_value(value: Tensor | None, aux: AuxRequest, q: Tensor) -> None:
    """Check index_loss_value, to which the backward writes the loss."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"index_loss_value: expected a tensor, got {type(value).__name__}")
    if not aux.any_loss:
        raise ValueError("index_loss_value: expected None without a request for the loss; pass it in return_aux")
    if value.dim() != 0 or value.dtype not in (torch.float32, torch.float64) or value.requires_grad:
        raise ValueError(
            "index_loss_value: expected a float32 scalar without a gradient, such as torch.tensor(nan), got "
            f"{value.dtype} {list(value.shape)}, requires_grad={value.requires_grad}"
        )
    if value.device != q.device:
        raise ValueError(f"index_loss_value: expected on {q.device}, where q is, got {value.device}")


def check_count(name: str, count: Tensor | float | None, q: Tensor) -> Tensor | None:
    """Return the count, by which the sum of the losses is divided, as a scalar tensor on q's device, or None."""
    if count is None:
        return None
    if isinstance(count, (int, float)) and not isinstance(count, bool):
        if not count > 0:
            raise ValueError(f"{name}: expected a number > 0, got {count}")
        return torch.full((), float(count), dtype=torch.float64, device=q.device)
    if not isinstance(count, Tensor):
        raise TypeError(f"{name}: expected a number or a scalar tensor, got {type(count).__name__}")
    if count.dim() != 0 or count.requires_grad or count.dtype in (torch.bool, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name}: expected a scalar without a gradient, of integers or float32 or float64, got {count.dtype} "
            f"{list(count.shape)}, requires_grad={count.requires_grad}; fully_shard casts tensors that a module takes: "
            "give it float(count)"
        )
    if count.device != q.device:
        raise ValueError(f"{name}: expected on {q.device}, where q is, got {count.device}")
    return count
