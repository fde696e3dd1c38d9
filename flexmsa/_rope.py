"""Rotary position embedding."""

import torch
from torch import Tensor

__all__ = ["rotate"]


def rotate(x: Tensor, positions: Tensor, rotary_dim: int, theta: float) -> Tensor:
    """Apply rotary position embedding to the first `rotary_dim` dimensions, in pairs (i, i + rotary_dim / 2).

    Args:
        x: [B, H, S, D]; positions: [B, S] int, counted from each sequence's first token.
    """
    if rotary_dim == 0:
        return x
    exponent = torch.arange(0, rotary_dim, 2, device=x.device, dtype=torch.float32) / rotary_dim
    angle = positions[:, None, :, None].float() * theta**-exponent
    cos, sin = angle.cos(), angle.sin()
    left, right = x[..., :rotary_dim].to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    rotated = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), x[..., rotary_dim:]], dim=-1)
