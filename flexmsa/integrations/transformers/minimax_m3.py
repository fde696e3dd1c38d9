"""MiniMax-M3 of transformers through flexmsa, with packed documents, padding and a trainable indexer; no tensor has
Sq x Sk elements.

With `attn_implementation="flexmsa"`, four parts of transformers' model change:

- the text model makes the table of sequences once and passes it to all layers as their mask;
- the indexer computes its heads with its weights, norms, RoPE and cache, but does not select;
- the attention function selects, attends, and computes the index loss if requested;
- the outputs of the whole model have the sum of these losses, as index_loss.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as modeling

from flexmsa.integrations.transformers.attention import IMPLEMENTATION, Selection, check_shards
from flexmsa.integrations.transformers.batching import register_implementation
from flexmsa.integrations.transformers.data_parallel import check_replicas, prepare_shards
from flexmsa.integrations.transformers.index_branch import IndexHeads, has_index_branch
from flexmsa.integrations.transformers.losses import (
    IndexLosses,
    IndexLossValue,
    defer_losses,
    prepare_checkpointing,
    prepare_init_weights,
)
from flexmsa.integrations.transformers.outputs import prepare_outputs, with_index_loss
from flexmsa.integrations.transformers.paged import paged_batch
from flexmsa.integrations.transformers.sequences import find_sequences
from flexmsa.integrations.transformers.versions import CACHE, cache_name, check_parameters

__all__ = ["register"]


INDEXER = ("hidden_states", "position_embeddings", CACHE, "position_ids")
TEXT_MODEL = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds")


@functools.cache
def register() -> None:
    """Register `attn_implementation="flexmsa"` with transformers, for MiniMax-M3 text and vision-language models.

    Call it before `from_pretrained(..., attn_implementation="flexmsa")` or `model.set_attn_implementation("flexmsa")`;
    further calls do nothing. Models with another implementation do not change.

    >>> from transformers import AttentionInterface
    >>> register()
    >>> "flexmsa" in AttentionInterface().valid_keys()
    True
    """
    register_implementation()
    modeling.MiniMaxM3VLAttention.flexmsa_fallback = None  # type: ignore[attr-defined]
    # The vision tower is not causal.
    modeling.MiniMaxM3VLVisionAttention.flexmsa_fallback = "sdpa"  # type: ignore[attr-defined]
    modeling.MiniMaxM3VLAttention.__init__ = _attention_init(  # type: ignore[method-assign]
        modeling.MiniMaxM3VLAttention.__init__
    )
    prepare_init_weights(modeling.MiniMaxM3VLPreTrainedModel)
    for changed, wrap, parameters in (
        (modeling.MiniMaxM3VLIndexer, _indexer_forward, INDEXER),
        (modeling.MiniMaxM3VLTextModel, _text_model_forward, TEXT_MODEL),
        (modeling.MiniMaxM3VLForCausalLM, _causal_model_forward, ()),
        (modeling.MiniMaxM3SparseForConditionalGeneration, _causal_model_forward, ()),
    ):
        check_parameters(changed.forward, "self", *parameters)
        changed.forward = wrap(changed.forward)  # type: ignore[method-assign]
    for model in (modeling.MiniMaxM3VLForCausalLM, modeling.MiniMaxM3SparseForConditionalGeneration):
        prepare_outputs(model)


def _attention_init(init: Callable) -> Callable:
    """Wrap the attention's `__init__`: beside an indexer, add where the backward writes its loss."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if has_index_branch(self):
            self.index_loss_value = IndexLossValue()

    return wrapped


def _text_model_forward(forward: Callable) -> Callable:
    """Wrap the text model's `forward`: pass the table in a dict of masks, which it gives to every layer unchanged."""
    name = cache_name(forward)

    @functools.wraps(forward)
    def wrapped(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor | None] | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        cache = past_key_values if cache is None else cache
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if self.config._attn_implementation == IMPLEMENTATION and tokens is not None:
            padding = next(iter(attention_mask.values())) if isinstance(attention_mask, dict) else attention_mask
            documents = kwargs.get("cu_seq_lens_q")
            table: Any = None
            paged = paged_batch(tokens, cache, kwargs)
            if paged is not None:
                table = paged.table
                kwargs["paged"] = paged
                if name != CACHE:
                    # The attention function takes it from there, as transformers' own do.
                    kwargs[CACHE], cache = cache, None
            elif kwargs.get("shards") is None:
                table = find_sequences(tokens, padding, position_ids, documents, cache)
            else:
                check_shards(kwargs["shards"], padding, position_ids)
            attention_mask = {"full_attention": table}
            if self.training and torch.is_grad_enabled():
                prepare_checkpointing(self)
                losses: IndexLosses | None = kwargs.get("index_losses")
                if losses is not None and losses.in_backward:
                    defer_losses(losses, self)
        return forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            **{name: cache},
            **kwargs,
        )

    return wrapped


def _causal_model_forward(forward: Callable) -> Callable:
    """Wrap the whole model's `forward`: the index losses are outputs too, so that data parallel finds their weights."""

    @functools.wraps(forward)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        losses: IndexLosses | None = kwargs.get("index_losses")
        if losses is None or self.config.get_text_config()._attn_implementation != IMPLEMENTATION:
            return forward(self, *args, **kwargs)
        if self.training and torch.is_grad_enabled():
            check_replicas(self)
            prepare_shards(self, returns_losses=False)
        output = forward(self, *args, **kwargs)
        if not losses.values:
            return output
        return with_index_loss(output, losses.sum()) if isinstance(output, Mapping) else (*output, losses.sum())

    return wrapped


def _indexer_forward(forward: Callable) -> Callable:
    """Wrap the indexer's `forward`: compute the same heads, from a detached input, and no scores."""

    @functools.wraps(forward)
    def wrapped(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None,
        position_ids: Tensor,
    ) -> Tensor | Selection:
        if self.config._attn_implementation != IMPLEMENTATION:
            return forward(self, hidden_states, position_embeddings, cache, position_ids)
        detached = hidden_states.detach()

        def heads(projection: nn.Module, norm: nn.Module) -> Tensor:
            return norm(torch.unflatten(projection(detached), -1, (-1, self.head_dim))).transpose(1, 2)

        cos, sin = (x[..., : self.head_dim] for x in position_embeddings)
        index_q, index_k = modeling.apply_rotary_pos_emb(
            heads(self.q_proj, self.q_norm), heads(self.k_proj, self.k_norm), cos, sin
        )
        if cache is not None and not isinstance(cache, PagedAttentionCache):
            index_k = cache.layers[self.layer_idx].update_index(index_k)
        return Selection(IndexHeads(index_q, index_k), self.block_size, self.topk_blocks, self.local_blocks)

    return wrapped
