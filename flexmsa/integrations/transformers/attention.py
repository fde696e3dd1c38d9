"""`attn_implementation="flexmsa"`: the attention and the mask function that transformers calls.

MiniMax-M3's modules and those that `convert` changed hand them the same: the table of sequences as `attention_mask`,
and as `block_indices` not ids, but what a layer selects them with.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexmsa import functional, ops, validation
from flexmsa.backends import choose_backend
from flexmsa.integrations.transformers.index_branch import IndexHeads, has_index_branch
from flexmsa.integrations.transformers.losses import IndexLosses
from flexmsa.types import AuxRequest

__all__ = ["IMPLEMENTATION", "Selection", "register_attention"]

IMPLEMENTATION = "flexmsa"
# Where attention is dense, blocks change nothing but the speed.
_DENSE_BLOCK_SIZE = 128


class Selection(NamedTuple):
    """What the queries of a layer choose their blocks with.

    Attributes:
        heads: index_q and index_k.
        block_size, topk, num_local_blocks, num_init_blocks: as for `flexmsa.attention`; topk None is the warm-up.
        select: in place of the index branch's choice, (index_q, index_k) -> block_indices [B, Hkv, Sq, topk], for rows
            of one sequence each.
    """

    heads: IndexHeads
    block_size: int
    topk: int | None
    num_local_blocks: int = 1
    num_init_blocks: int = 0
    select: Callable[[Tensor, Tensor], Tensor] | None = None


@functools.cache
def register_attention() -> None:
    """Make the implementation known to transformers; calling it again does nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def _mask(
    *args: Any,
    config: PreTrainedConfig | None = None,
    attention_mask: Tensor | None = None,
    q_offset: int | Tensor = 0,
    kv_length: int = 0,
    **kwargs: Any,
) -> Tensor | None:
    """The padding as it is, [B, keys]; for the window layers of a converted model, the mask of its other attention."""
    fallback = (getattr(config, "flexmsa", None) or {}).get("fallback")
    if "local_size" in kwargs and fallback is not None:
        given = {"config": config, "attention_mask": attention_mask, "q_offset": q_offset, "kv_length": kv_length}
        return ALL_MASK_ATTENTION_FUNCTIONS[fallback](*args, **given, **kwargs)
    if attention_mask is None or not isinstance(q_offset, Tensor):
        return attention_mask
    # A static cache: generate's mask grows by a token a step, of which a compiled step would be compiled again.
    return F.pad(attention_mask, (0, kv_length - attention_mask.shape[1]))


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    block_indices: Selection | None = None,
    index_losses: IndexLosses | None = None,
    observe: Callable[[Tensor, Tensor, Tensor | None, float], None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D] to out [B, Sq, Hq, D], and no weights.

    `module.flexmsa_fallback` names the implementation that attends instead, where a module has nothing to select from;
    `observe` is called with query, key, the table of sequences and scaling.
    """
    if not hasattr(module, "flexmsa_fallback"):
        raise NotImplementedError(
            f'attn_implementation="flexmsa": expected MiniMax-M3 or a converted model, got {type(module).__name__}; '
            "call register() for the first, and convert(model) for others"
        )
    if module.flexmsa_fallback is not None:
        attend = ALL_ATTENTION_FUNCTIONS[module.flexmsa_fallback]
        return attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        raise ValueError(
            f"attention_mask: expected the table of sequences, got {attention_mask.dtype} "
            f"{list(attention_mask.shape)}; call the model, not a layer of it"
        )
    if block_indices is None and has_index_branch(module):
        raise RuntimeError(f"{type(module).__name__} does not hand keyword arguments on to its attention function")
    if dropout:
        raise NotImplementedError(f"attention_dropout: expected 0, got {dropout}; set config.attention_dropout = 0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if block_indices is None:
        out = _attend_densely(query, key, value, attention_mask, scale)
    else:
        out, loss = _attend_sparsely(
            query, key, value, block_indices, attention_mask, scale, with_loss=index_losses is not None
        )
        if index_losses is not None and loss is not None:
            index_losses.record(module.layer_idx, loss)  # type: ignore[arg-type]
    if observe is not None:
        observe(query, key, attention_mask, scale)
    return out.transpose(1, 2).contiguous(), None


def _attend_densely(q: Tensor, k: Tensor, v: Tensor, sequences: Tensor | None, scale: float) -> Tensor:
    """The output [B, Hq, Sq, D] of a layer without an index branch: every visible key."""
    q, k, v = ops.cast_to_autocast(q, k, v)
    if q.shape[2] == 1:
        mask = None
        if sequences is not None:
            key = torch.arange(k.shape[2], device=k.device)
            mask = ((key >= sequences[:, 3:4]) & (key < sequences[:, 4:]))[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if sequences is None:
        return functional.block_sparse_attention(q, k, v, None, scale=scale)  # type: ignore[return-value]
    return _main_branch(q, k, v, None, sequences, _DENSE_BLOCK_SIZE, scale)[0]


def _attend_sparsely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    sequences: Tensor | None,
    scale: float,
    with_loss: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output [B, Hq, Sq, D] and, if asked for, the index loss."""
    q, k, v, index_q, index_k = ops.cast_to_autocast(q, k, v, *(x.to(q.dtype) for x in selection.heads))
    validation.check_branches_match(q, k, index_q, index_k)
    validation.check_settings(
        selection.block_size, selection.topk, selection.num_local_blocks, selection.num_init_blocks
    )
    block_size = _DENSE_BLOCK_SIZE if selection.topk is None else selection.block_size
    if sequences is None and selection.topk is None:
        # Through the fastest dense kernel, which need not be one of flexmsa's own.
        wanted = AuxRequest(index_loss=with_loss)
        out, aux = functional.attention(
            q, k, v, index_q, index_k, block_size=block_size, topk=None, scale=scale, return_aux=wanted
        )
        return out, aux.index_loss  # type: ignore[union-attr]
    if selection.select is not None and sequences is not None:
        raise ValueError("select: expected rows of one sequence each, got padding, packed documents or a static cache")
    if sequences is None:
        sequences = ops.sequence_table(q, None, None, None, k.shape[2])
    block_indices = _select_blocks(index_q.detach(), index_k.detach(), selection, sequences)
    out, lse = _main_branch(q, k, v, block_indices, sequences, block_size, scale)
    if not with_loss:
        return out, None
    with_grad = torch.is_grad_enabled() and (index_q.requires_grad or index_k.requires_grad)
    index_loss, _, _ = ops.index_loss(
        q.detach(),
        k.detach(),
        index_q,
        index_k,
        block_indices,
        lse.detach(),
        sequences,
        block_size,
        scale,
        index_q.shape[-1] ** -0.5,
        with_grad,
        _backend("index_loss", q),
    )
    return out, index_loss


def _select_blocks(index_q: Tensor, index_k: Tensor, selection: Selection, sequences: Tensor) -> Tensor | None:
    """block_indices [B, Hkv, Sq, topk], None in the warm-up."""
    _, block_size, topk, num_local_blocks, num_init_blocks, select = selection
    if topk is None:
        return None
    if select is not None:
        return select(index_q, index_k)
    backend = _backend("select_blocks", index_q)
    return ops.select_blocks(index_q, index_k, sequences, block_size, topk, num_local_blocks, num_init_blocks, backend)


def _main_branch(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None, sequences: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, D] and lse [B, Hq, Sq]; without gradients through the kernels for serving."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    attend = ops.block_sparse_attention if needs_grad else ops.attend_blocks
    return attend(q, k, v, block_indices, sequences, block_size, scale, _backend("block_sparse_attention", q))


def _backend(step: str, x: Tensor) -> str:
    """The backend of a step on the device of `x`, of those that take a table of sequences."""
    backend = choose_backend(step, None, x)
    return "torch" if backend == "flex" else backend
