"""Rotary position embedding."""

import torch
from torch import Tensor

__all__ = ["rotate", "rotation"]


def rotation(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines [B or 1, 1, S, rotary_dim / 2], float32, by which `rotate` rotates.

    Args:
        positions: [B or 1, S] int, counted from each sequence's first token.
    """
    exponent = torch.arange(0, rotary_dim, 2, device=positions.device, dtype=torch.float32) / max(1, rotary_dim)
    angle = positions[:, None, :, None].float() * theta**-exponent
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to the first rotary_dim dimensions of x [B, H, S, D].

    In pairs (i, i + rotary_dim / 2).
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim == 0:
        return x
    left, right = x[..., :rotary_dim].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    rotated = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(x.dtype)
    return rotated if rotary_dim == x.shape[-1] else torch.cat([rotated, x[..., rotary_dim:]], dim=-1)
