"""MiniMax-M3 of transformers through flexmsa: nothing of size Sq x Sk, documents and padding right, a trained indexer.

Three places of transformers' model change, and only where `attn_implementation="flexmsa"`:

- the text model finds, once for all layers, which keys each token sees, and hands that to them as their mask;
- the indexer returns its heads, with its weights, norms, RoPE and cache, and leaves the selection to
- the attention function, which selects, attends, and computes the index loss when asked to.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

from flexmsa import functional, ops, validation
from flexmsa.backends import choose_backend
from flexmsa.integrations.transformers.losses import IndexLosses
from flexmsa.integrations.transformers.sequences import document_table, row_table

__all__ = ["register"]

IMPLEMENTATION = "flexmsa"


@functools.cache
def register() -> None:
    """Make `attn_implementation="flexmsa"` known to transformers, for MiniMax-M3 text and vision-language models.

    Call it before `from_pretrained(..., attn_implementation="flexmsa")` or `model.set_attn_implementation("flexmsa")`;
    calling it again does nothing. Models with another implementation run as before.

    >>> register()
    >>> "flexmsa" in AttentionInterface().valid_keys()
    True
    """
    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _padding_mask)
    modeling.MiniMaxM3VLIndexer.forward = _indexer_forward(modeling.MiniMaxM3VLIndexer.forward)
    modeling.MiniMaxM3VLTextModel.forward = _text_model_forward(modeling.MiniMaxM3VLTextModel.forward)


class _IndexHeads(NamedTuple):
    """What the indexer gives in place of block indices: index_q [B, Hkv, Sq, Di], index_k [B, 1, Sk, Di]."""

    index_q: Tensor
    index_k: Tensor


def _padding_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """Hand on the padding, [B, keys]; `generate` calls this before it enters the model."""
    return attention_mask


def _text_model_forward(forward: Callable) -> Callable:
    """Wrap the text model's `forward`: a mask in a dict is one that it gives to every layer as it is."""

    @functools.wraps(forward)
    def wrapped(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if self.config._attn_implementation == IMPLEMENTATION and tokens is not None:
            padding = next(iter(attention_mask.values())) if isinstance(attention_mask, dict) else attention_mask
            sequences = _find_sequences(tokens, padding, position_ids, past_key_values, kwargs.get("cu_seq_lens_q"))
            attention_mask = {"full_attention": sequences}
        return forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    return wrapped


def _find_sequences(
    tokens: Tensor,
    padding: Tensor | None,
    position_ids: Tensor | None,
    cache: Cache | None,
    cu_seqlens: Tensor | None,
) -> Tensor | None:
    """The table of sequences, or None where each row is one that ends with the last key given."""
    seqlen = tokens.shape[1]
    past, is_full = 0, True
    if cache is not None:
        past = cache.get_seq_length()
        # A static cache hands out all of its buffer, and its own counter as the length.
        is_full = isinstance(past, int) and past + seqlen == cache.get_mask_sizes(seqlen, 0)[0]
    if isinstance(past, Tensor):
        past = past.to(tokens.device)
    if cu_seqlens is not None:
        return document_table(cu_seqlens, tokens, past)
    if padding is None and position_ids is None and is_full:
        return None
    return row_table(padding, position_ids, tokens, past)


def _indexer_forward(forward: Callable) -> Callable:
    """Wrap the indexer's `forward`: the same heads, of a detached input, and no scores."""

    @functools.wraps(forward)
    def wrapped(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None,
        position_ids: Tensor,
    ) -> Tensor | _IndexHeads:
        if self.config._attn_implementation != IMPLEMENTATION:
            return forward(self, hidden_states, position_embeddings, past_key_values, position_ids)
        detached = hidden_states.detach()

        def heads(projection: nn.Module, norm: nn.Module) -> Tensor:
            return norm(projection(detached).unflatten(-1, (-1, self.head_dim))).transpose(1, 2)

        cos, sin = (x[..., : self.head_dim] for x in position_embeddings)
        index_q, index_k = modeling.apply_rotary_pos_emb(
            heads(self.q_proj, self.q_norm), heads(self.k_proj, self.k_norm), cos, sin
        )
        if past_key_values is not None:
            index_k = past_key_values.layers[self.layer_idx].update_index(index_k)
        return _IndexHeads(index_q, index_k)

    return wrapped


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    block_indices: _IndexHeads | None = None,
    index_losses: IndexLosses | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D] to out [B, Sq, Hq, D].

    `attention_mask` is the table of sequences, or None; the vision tower, which is not causal, goes to PyTorch.
    """
    if isinstance(module, modeling.MiniMaxM3VLVisionAttention):
        attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if not isinstance(module, modeling.MiniMaxM3VLAttention):
        raise NotImplementedError(
            f'attn_implementation="flexmsa": expected a MiniMax-M3 model, got {type(module).__name__}; '
            "convert other models first"
        )
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        raise ValueError(
            f"attention_mask: expected the table of sequences, got {attention_mask.dtype} "
            f"{list(attention_mask.shape)}; call the model, not a layer of it"
        )
    if dropout:
        raise NotImplementedError(f"attention_dropout: expected 0, got {dropout}; set config.attention_dropout = 0")
    query, key, value = ops.cast_to_autocast(query, key, value)
    if block_indices is None:
        out = _attend_densely(query, key, value, attention_mask, scaling)
    else:
        heads = _IndexHeads(*ops.cast_to_autocast(*block_indices))
        out = _attend_sparsely(module, query, key, value, heads, attention_mask, scaling, index_losses)
    return out.transpose(1, 2), None


def _attend_densely(q: Tensor, k: Tensor, v: Tensor, sequences: Tensor | None, scale: float) -> Tensor:
    """A layer without an indexer: every visible key."""
    if q.shape[2] == 1:
        mask = None
        if sequences is not None:
            key = torch.arange(k.shape[2], device=k.device)
            mask = ((key >= sequences[:, 3:4]) & (key < sequences[:, 4:]))[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if sequences is None:
        out = functional.block_sparse_attention(q, k, v, None, scale=scale)
        assert isinstance(out, Tensor)
        return out
    return _main_branch(q, k, v, None, sequences, _DENSE_BLOCK, scale)[0]


# Keys taken at once where there is nothing to select.
_DENSE_BLOCK = 128


def _attend_sparsely(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: _IndexHeads,
    sequences: Tensor | None,
    scale: float,
    index_losses: IndexLosses | None,
) -> Tensor:
    indexer, (index_q, index_k) = module.indexer, heads
    block_size, topk = indexer.block_size, indexer.topk_blocks
    validation.check_branches_match(q, k, index_q, index_k)
    validation.check_settings(block_size, topk, indexer.local_blocks)
    if sequences is None:
        sequences = ops.sequence_table(q, None, None, None, k.shape[2])
    block_indices = None
    if topk is not None:
        backend = choose_backend("select_blocks", None, q)
        block_indices = ops.select_blocks(
            index_q.detach(), index_k.detach(), sequences, block_size, topk, indexer.local_blocks, 0, backend
        )
    out, lse = _main_branch(q, k, v, block_indices, sequences, block_size, scale)
    if index_losses is None:
        return out
    loss, _, _ = ops.index_loss(
        q.detach(),
        k.detach(),
        index_q,
        index_k,
        block_indices,
        lse.detach(),
        sequences,
        block_size,
        scale,
        indexer.head_dim**-0.5,
        torch.is_grad_enabled() and (index_q.requires_grad or index_k.requires_grad),
        choose_backend("index_loss", None, q),
    )
    return index_losses.record(module.layer_idx, loss, out)


def _main_branch(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor | None, sequences: Tensor, block_size: int, scale: float
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, D] and lse [B, Hq, Sq]; without gradients through the kernels for serving."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    attend = ops.block_sparse_attention if needs_grad else ops.attend_blocks
    backend = choose_backend("block_sparse_attention", None, q)
    return attend(q, k, v, block_indices, sequences, block_size, scale, backend)
