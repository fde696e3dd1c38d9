"""Dense causal attention for the warm-up, with the fastest kernel that also returns the lse."""

import torch
from torch import Tensor

from flexmsa._sequences import Sequences

__all__ = ["cudnn_attention", "cudnn_runs"]

# Evaluated once at import: torch.compile cannot trace this expression.
_HAS_CUDNN = torch.backends.cudnn.is_available() and not torch.version.hip


def cudnn_runs(q: Tensor, k: Tensor, sequences: Sequences) -> bool:
    """Return whether cuDNN's fused attention applies: 16 bits, D <= 128, one whole sequence per row, Sq = Sk."""
    if q.device.type != "cuda" or not _HAS_CUDNN:
        return False
    fits = q.element_size() == 2 and q.shape[3] % 8 == 0 and q.shape[3] <= 128 and q.shape[2] == k.shape[2]
    return fits and sequences.are_whole and torch.cuda.get_device_capability(q.device) >= (8, 0)


def cudnn_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return out [B, Hq, S, D] and lse [B, Hq, S] float32; lse has no gradient."""
    # scaled_dot_product_attention calls the same operator but does not return the lse.
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, compute_log_sumexp=True, dropout_p=0.0, is_causal=True, return_debug_mask=False, scale=scale
    )
    return out.contiguous(), lse.detach().reshape(q.shape[:3])
