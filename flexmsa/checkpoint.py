"""Policies for selective activation checkpointing: what a layer saves, and what its recomputed forward repeats."""

from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy

from flexmsa import ops

__all__ = ["save_attention_policy", "save_selection_policy"]


def save_selection_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the selected ids; recompute everything else.

    The recomputed forward attends to the same blocks as the first, and the index branch, whose cost is quadratic, runs
    once. Per token and layer this saves topk ids of 4 bytes for each group.

    With the index loss in the backward (`MSAConfig.loss_in_backward`), neither forward computes the loss.

    >>> from functools import partial
    >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    >>> contexts = partial(create_selective_checkpoint_contexts, save_selection_policy)
    >>> layer = MSAttention(MSAConfig(hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, index_head_dim=16))
    >>> x = torch.randn(1, 8, 32, requires_grad=True)
    >>> out, index_loss = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    """
    return _save(op in _SELECTION)


def save_attention_policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Save the results of selection, main branch and index loss; recompute everything else.

    Faster than `save_selection_policy`, because the main branch runs once too, but takes more memory: per token and
    layer also out and lse, and if the forward computes the index loss, its gradients for index_q and index_k in
    float32.

    >>> from functools import partial
    >>> from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
    >>> contexts = partial(create_selective_checkpoint_contexts, save_attention_policy)
    >>> layer = MSAttention(MSAConfig(hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, index_head_dim=16))
    >>> x = torch.randn(1, 8, 32, requires_grad=True)
    >>> out, index_loss = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
    """
    return _save(op in _SELECTION or op in _ATTENTION)


def _save(wanted: bool) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if wanted else CheckpointPolicy.PREFER_RECOMPUTE


_SELECTION = frozenset({torch.ops.flexmsa.select_blocks.default})
_ATTENTION = frozenset(
    {
        torch.ops.flexmsa.block_sparse_attention.default,
        torch.ops.flexmsa.attention_and_index_loss.default,
        torch.ops.flexmsa.index_loss.default,
        # The dense warm-up through cuDNN, see dense.py.
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    }
)
assert ops.select_blocks  # Importing ops registers the operators.
