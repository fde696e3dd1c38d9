"""Selective activation checkpointing that does not repeat the selection."""

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

from flexmsa import ops

__all__ = ["save_selection_policy"]


def save_selection_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the results of selection, main branch and index loss; recompute everything else.

    The recomputed forward pass then attends to the same blocks as the first, and neither the quadratic index branch
    nor the attention runs twice. Per token this saves topk ids for each group, out and lse.

    >>> from functools import partial
    >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    >>> contexts = partial(create_selective_checkpoint_contexts, save_selection_policy)
    >>> layer = MSAttention(MSAConfig(hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, index_head_dim=16))
    >>> x = torch.randn(1, 8, 32, requires_grad=True)
    >>> out, index_loss = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    """
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


_SAVED = {
    torch.ops.flexmsa.select_blocks.default,
    torch.ops.flexmsa.block_sparse_attention.default,
    torch.ops.flexmsa.index_loss.default,
}
assert ops.select_blocks  # Importing ops registers the operators.
