"""Tensors whose vectors lie in memory as those of fused projections and of parts of buffers do."""

import torch
from torch import Tensor


def lay_out(
    shape: tuple[int, int, int, int],
    *,
    strided: bool = False,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Return an uninitialised tensor [B, H, S, D].

    Args:
        strided: as a part of [B, S, H, D + 8], the strides of a fused projection; the rest of the memory is NaN.
        offset: elements of memory before the first.

    >>> lay_out((1, 2, 3, 4), strided=True).stride()
    (72, 12, 24, 1)
    """
    batch, heads, seqlen, size = shape
    if not strided:
        return torch.empty(offset + batch * heads * seqlen * size, dtype=dtype, device=device)[offset:].view(shape)
    wide = torch.empty(offset + batch * seqlen * heads * (size + 8), dtype=dtype, device=device).fill_(torch.nan)
    return wide[offset:].view(batch, seqlen, heads, size + 8).transpose(1, 2)[..., :size]
