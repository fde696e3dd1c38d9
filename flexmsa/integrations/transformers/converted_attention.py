"""Attention in a converted model: a hook that computes the index heads, and the function that attends with them.

A transformers attention module keeps its projections, norms, RoPE and cache. A forward pre-hook adds one keyword
argument, which the module hands on to the attention function that `flexmsa_converted` names; so the index heads arrive
beside q, k and v. A `ForwardPass`, made once for each call of the model, travels the same way and collects the losses.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, StaticLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexmsa import functional, ops
from flexmsa.backends import choose_backend
from flexmsa.config import MSAConfig
from flexmsa.integrations.transformers.health import LayerHealth, measure, untrained_heads
from flexmsa.integrations.transformers.index_branch import IndexHeads, cache_index_keys, project_index
from flexmsa.integrations.transformers.sequences import document_table, row_table
from flexmsa.types import AuxRequest

__all__ = ["IMPLEMENTATION", "Conversion", "ForwardPass", "Report", "hook_attention", "keep_losses_when_checkpointing"]

IMPLEMENTATION = "flexmsa_converted"
# Where attention is dense, blocks change nothing but the speed.
_DENSE_BLOCK_SIZE = 128


@dataclass
class ForwardPass:
    """One call of a converted model: what its layers are asked for, and what they found.

    Attributes:
        with_index_loss: compute the loss of each index branch.
        with_health: compare what each index branch selects with where the main branch looks.
        index_losses, health: of the converted layers, in their order.
        sequences: the table of sequences, None where every row is one causal sequence; `has_sequences` once a layer has
            found out.
    """

    with_index_loss: bool = False
    with_health: bool = False
    index_losses: list[Tensor] = field(default_factory=list)
    health: list[LayerHealth] = field(default_factory=list)
    sequences: Tensor | None = None
    has_sequences: bool = False


class Report(NamedTuple):
    """What the last forward pass found, detached.

    Attributes:
        lm_loss: scalar, the model's own loss; None without labels.
        index_losses: [converted layers]; None if they were not computed.
        health: of the converted layers; empty unless it was asked for.
    """

    lm_loss: Tensor | None = None
    index_losses: Tensor | None = None
    health: tuple[LayerHealth, ...] = ()


@dataclass
class Conversion:
    """The state of a converted model, `model.flexmsa`.

    Attributes:
        config: the settings of every converted layer.
        layers: the numbers of the converted layers.
        fallback: the attention implementation of layers with a sliding window.
        warm_up: whether the main branch is dense.
        index_loss_weight: of the summed index losses in the loss of a model in training mode.
        with_health: measure each forward pass.
        select: instead of the index branch's choice, (index_q, index_k, config) -> block_indices [B, Hkv, Sq, topk],
            such as `random_blocks`; for rows of one causal sequence each.
        report: what the last forward pass found.
        frozen: the parameters that the warm-up froze and the sparse phase trains again.
    """

    config: MSAConfig
    layers: tuple[int, ...]
    fallback: str
    warm_up: bool = True
    index_loss_weight: float = 1.0
    with_health: bool = False
    select: Callable[[Tensor, Tensor, MSAConfig], Tensor] | None = None
    report: Report = field(default_factory=Report)
    frozen: set[str] = field(default_factory=set)

    @property
    def topk(self) -> int | None:
        """Blocks that a query attends to; None in the warm-up."""
        return None if self.warm_up else self.config.topk

    @property
    def block_size(self) -> int:
        """Keys in one block; in the warm-up a size that is fast."""
        return _DENSE_BLOCK_SIZE if self.warm_up else self.config.block_size


class _LayerInput(NamedTuple):
    """What the pre-hook hands to the attention function; index heads are None in a layer that was not converted."""

    forward_pass: ForwardPass
    heads: IndexHeads | None
    untrained: IndexHeads | None


def hook_attention(module: nn.Module, conversion: Conversion) -> None:
    """Let `module`, with or without an index branch, attend through flexmsa."""
    # Copied together with its model, as an attribute of the module is.
    module.msa = conversion  # type: ignore[assignment]
    module.register_forward_pre_hook(_before_attention, with_kwargs=True)


def _before_attention(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    forward_pass = kwargs.pop("msa_pass", None) or ForwardPass()
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
    if not forward_pass.has_sequences:
        forward_pass.sequences = _sequences(hidden_states, _past(cache, module.layer_idx), kwargs)
        forward_pass.has_sequences = True
    heads = untrained = None
    if hasattr(module, "index_q_proj"):
        rope = kwargs["position_embeddings"]
        heads = project_index(module, module, hidden_states, rope)
        if forward_pass.with_health:
            untrained = untrained_heads(module, module.msa.config, hidden_states, rope)
        if cache is not None:
            heads = IndexHeads(heads.index_q, cache_index_keys(cache, module.layer_idx, heads.index_k))
    return args, {**kwargs, "msa_input": _LayerInput(forward_pass, heads, untrained)}


def _past(cache: Cache | None, layer_idx: int) -> int | Tensor:
    """How many keys a layer has before the new ones: a tensor for a static cache."""
    if cache is None or len(cache.layers) <= layer_idx:
        return 0
    layer = cache.layers[layer_idx]
    return layer.cumulative_length if isinstance(layer, StaticLayer) else layer.get_seq_length()


def _sequences(hidden_states: Tensor, past: int | Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The table of sequences of this forward pass, or None where every row is one that starts here."""
    documents = kwargs.get("cu_seq_lens_q")
    if documents is not None:
        return document_table(documents, hidden_states, past)
    mask = kwargs.get("attention_mask")
    past = past.to(hidden_states.device) if isinstance(past, Tensor) else past
    table = row_table(mask, kwargs.get("position_ids"), hidden_states, past)
    starts_here = mask is None and isinstance(past, int) and past == 0
    return None if starts_here and len(table) == len(hidden_states) else table


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    msa_input: _LayerInput | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D] to ([B, Sq, Hq, D], None)."""
    conversion = module.msa
    if msa_input is None:
        kwargs.pop("msa_pass", None)
        attend = ALL_ATTENTION_FUNCTIONS[conversion.fallback]
        return attend(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if dropout:
        raise ValueError(f"attention_dropout: expected 0, which is all that flexmsa does, got {dropout}")
    forward_pass, heads, untrained = msa_input
    sequences = forward_pass.sequences
    if heads is None:
        out = _dense(query, key, value, sequences, scaling)
        return out.transpose(1, 2).contiguous(), None
    with_loss = forward_pass.with_index_loss
    if sequences is None and conversion.select is None:
        out, index_loss = _one_sequence_a_row(query, key, value, heads, conversion, scaling, with_loss)
    else:
        out, index_loss = _any_sequences(query, key, value, heads, sequences, conversion, scaling, with_loss)
    if index_loss is not None:
        forward_pass.index_losses.append(index_loss)
    if untrained is not None:
        forward_pass.health.append(measure(query, key, heads, untrained, sequences, conversion.config, scaling))
    return out.transpose(1, 2).contiguous(), None


def _dense(q: Tensor, k: Tensor, v: Tensor, sequences: Tensor | None, scale: float | None) -> Tensor:
    """A layer without an index branch."""
    if sequences is None:
        return functional.block_sparse_attention(q, k, v, None, block_size=_DENSE_BLOCK_SIZE, scale=scale)  # type: ignore[return-value]
    q, k, v = ops.cast_to_autocast(q, k, v)
    backend = choose_backend("block_sparse_attention", None, q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return ops.block_sparse_attention(q, k, v, None, sequences, _DENSE_BLOCK_SIZE, scale, backend)[0]


def _one_sequence_a_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: IndexHeads,
    conversion: Conversion,
    scale: float | None,
    with_loss: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output and the index loss of plain causal rows, through whatever is fastest for them."""
    config = conversion.config
    out, extra = functional.attention(
        q,
        k,
        v,
        *(x.to(q.dtype) for x in heads),
        block_size=conversion.block_size,
        topk=conversion.topk,
        num_local_blocks=config.num_local_blocks,
        num_init_blocks=config.num_init_blocks,
        scale=scale,
        return_aux=AuxRequest(index_loss=with_loss),
    )
    return out, extra.index_loss  # type: ignore[union-attr]


def _any_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: IndexHeads,
    sequences: Tensor | None,
    conversion: Conversion,
    scale: float | None,
    with_loss: bool,
) -> tuple[Tensor, Tensor | None]:
    """The output and the index loss of the sequences in the table, or with a selection of the user's own."""
    config, size = conversion.config, conversion.block_size
    q, k, v, index_q, index_k = ops.cast_to_autocast(q, k, v, *(x.to(q.dtype) for x in heads))
    backends = {
        step: choose_backend(step, None, q) for step in ("select_blocks", "block_sparse_attention", "index_loss")
    }
    if sequences is None:
        sequences = ops.sequence_table(q, None, None, None, k.shape[2])
    elif conversion.select is not None:
        raise ValueError("select: expected rows of one causal sequence each, got padding, packed documents or a cache")
    if conversion.topk is None:
        block_indices = None
    elif conversion.select is not None:
        block_indices = conversion.select(index_q, index_k, config)
    else:
        forced = config.num_local_blocks, config.num_init_blocks
        block_indices = ops.select_blocks(
            index_q.detach(), index_k.detach(), sequences, size, conversion.topk, *forced, backends["select_blocks"]
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    attend = ops.block_sparse_attention if needs_grad else ops.attend_blocks
    out, lse = attend(q, k, v, block_indices, sequences, size, scale, backends["block_sparse_attention"])
    if not with_loss:
        return out, None
    index_loss, _, _ = ops.index_loss(
        q.detach(),
        k.detach(),
        index_q,
        index_k,
        block_indices,
        lse.detach(),
        sequences,
        size,
        scale,
        index_q.shape[-1] ** -0.5,
        torch.is_grad_enabled() and index_q.requires_grad,
        backends["index_loss"],
    )
    return out, index_loss


def _mask(*args: Any, config: PreTrainedConfig, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The mask function: the padding as it is for flexmsa, a dense mask only for layers with a sliding window."""
    if "local_size" not in kwargs:
        return attention_mask
    make = ALL_MASK_ATTENTION_FUNCTIONS[config.flexmsa["fallback"]]
    return make(*args, config=config, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def keep_losses_when_checkpointing(model: nn.Module) -> None:
    """Make what a checkpointed layer finds one of its outputs, so that its gradient survives the recomputation."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            run = layer._gradient_checkpointing_func
            if not isinstance(run, _Checkpoint):
                layer._gradient_checkpointing_func = _Checkpoint(run)


class _Checkpoint:
    """`checkpoint` of transformers, for a layer whose keyword arguments hold a ForwardPass."""

    def __init__(self, checkpoint: Callable) -> None:
        self.checkpoint = checkpoint

    def __call__(self, layer: partial, *args: Any) -> Any:
        outer: ForwardPass | None = layer.keywords.get("msa_pass")
        if outer is None:
            return self.checkpoint(layer, *args)
        runs: list[ForwardPass] = []

        def run(*args: Any) -> tuple:
            # The recomputation must not measure again.
            inner = dataclasses.replace(outer, index_losses=[], health=[], with_health=outer.with_health and not runs)
            runs.append(inner)
            return (layer(*args, msa_pass=inner), *inner.index_losses)

        out, *index_losses = self.checkpoint(run, *args)
        outer.index_losses.extend(index_losses)
        outer.health.extend(runs[0].health)
        outer.sequences, outer.has_sequences = runs[0].sequences, runs[0].has_sequences
        return out
