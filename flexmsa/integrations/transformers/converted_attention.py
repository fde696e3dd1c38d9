"""A converted model: its state, and the hook that computes the index heads of each attention module.

A transformers attention module keeps its projections, norms, RoPE and cache. A forward pre-hook adds keyword arguments,
which the module passes to the attention function (see attention.py); so that function gets the index heads together
with q, k and v. Each call of the model makes one `ForwardPass` and passes it to the hooks in the same way: the whole
model where there are index losses or a measurement, and else the model below its head. transformers' exporters take
what the whole model is called with for inputs of its graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from flexmsa.config import MSAConfig
from flexmsa.integrations.transformers.attention import IMPLEMENTATION, Selection
from flexmsa.integrations.transformers.batching import register_implementation
from flexmsa.integrations.transformers.gathered import GatheredRows
from flexmsa.integrations.transformers.health import LayerHealth, measure, untrained_heads
from flexmsa.integrations.transformers.index_branch import (
    IndexHeads,
    cache_index_keys,
    has_index_branch,
    has_index_keys,
    project_index,
)
from flexmsa.integrations.transformers.paged import PagedBatch, paged_batch
from flexmsa.integrations.transformers.sequences import find_sequences
from flexmsa.integrations.transformers.versions import CACHE, cache_of, check_parameters

__all__ = ["Conversion", "ForwardPass", "Report", "hook_modules"]


@dataclass
class ForwardPass:
    """One call of a converted model.

    Attributes:
        has_positions: the caller passed position_ids, which may separate documents.
        with_health: compare the selection of each index branch with the attention of the main branch.
        health: layer number -> the result.
        sequences: the table of sequences or `GatheredRows`, None if every row is one sequence; valid if
            `has_sequences`, which the first layer sets.
        paged: the batch of requests of continuous batching, which the first layer sets.
    """

    has_positions: bool = True
    with_health: bool = False
    health: dict[int, LayerHealth] = field(default_factory=dict)
    sequences: Tensor | GatheredRows | None = None
    has_sequences: bool = False
    paged: PagedBatch | None = None

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, Any], with_health: bool = False) -> Self:
        """Return that of a model that is called with these arguments."""
        # A positional argument after the tokens may be position_ids.
        return cls(len(args) > 1 or kwargs.get("position_ids") is not None, with_health)


class Report(NamedTuple):
    """The results of the last forward pass, detached.

    Attributes:
        lm_loss: scalar, the model's own loss, as the mean over this batch's tokens; None without labels.
        values: the index losses of the converted layers; empty if they were not requested.
        health: of the converted layers; empty unless it was requested.
    """

    lm_loss: Tensor | None = None
    values: tuple[Tensor, ...] = ()
    health: tuple[LayerHealth, ...] = ()

    @property
    def index_losses(self) -> Tensor | None:
        """[converted layers], NaN before a backward that computes them; None if they were not requested."""
        return torch.stack([x.to(self.values[0].device) for x in self.values]) if self.values else None


@dataclass
class Conversion:
    """The state of a converted model, `model.flexmsa`.

    Attributes:
        config: the settings of every converted layer.
        layers: the numbers of the converted layers.
        fallback: the attention implementation of layers with a sliding window.
        warm_up: whether the main branch is dense.
        index_loss_weight: of the summed index losses in the loss of a model in training mode.
        index_loss_count: what the sum of each layer's losses is divided by; None is their number in this forward. See
            `flexmsa.integrations.transformers.index_loss_count`.
        loss_in_backward: whether the backward computes the index losses in training mode; `outputs.index_loss` is then
            a 0 that has their gradient.
        with_health: measure each forward pass.
        select: replaces the index branch's selection: (index_q, index_k, config) -> block_indices
            [B, Hkv, Sq, topk], such as `random_blocks`; for rows of one sequence each.
        report: the results of the last forward pass.
        frozen: the parameters that the warm-up froze and the sparse phase trains again.
        collected: where forward passes in training mode put their index losses instead of adding them to
            `outputs.loss`; None: they add them.
        waits: an index loss was computed whose backward has not been seen by an optimizer.
    """

    config: MSAConfig
    layers: tuple[int, ...]
    fallback: str
    warm_up: bool = True
    index_loss_weight: float = 1.0
    index_loss_count: Tensor | float | None = None
    loss_in_backward: bool = True
    with_health: bool = False
    select: Callable[[Tensor, Tensor, MSAConfig], Tensor] | None = None
    report: Report = field(default_factory=Report)
    frozen: set[str] = field(default_factory=set)
    collected: list[Tensor] | None = None
    waits: bool = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A model that was pickled may arrive in a process that has converted none.
        register_implementation()
        self.__dict__.update(state)

    def selection(self, heads: IndexHeads) -> Selection:
        """Return the `Selection` of a layer with these index heads."""
        config, select = self.config, self.select
        return Selection(
            heads,
            config.block_size,
            None if self.warm_up else config.topk,
            config.num_local_blocks,
            config.num_init_blocks,
            None if select is None else lambda index_q, index_k: select(index_q, index_k, config),
        )


def hook_modules(decoder: nn.Module, attention: Mapping[nn.Module, str | None], conversion: Conversion) -> None:
    """Let attention modules attend through flexmsa, or through what they are mapped to if it is not None.

    Args:
        decoder: the model below its head.
        attention: its attention modules, with or without an index branch.
        conversion: the state of the model.
    """
    register_implementation()
    for module, fallback in attention.items():
        check_parameters(type(module).forward, "hidden_states", CACHE)
        # As attributes of the module, both are copied together with the model.
        module.msa = conversion  # type: ignore[assignment]
        module.flexmsa_fallback = fallback  # type: ignore[assignment]
        module.register_forward_pre_hook(_before_attention, with_kwargs=True)
    decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)


def _before_decoder(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Add a `ForwardPass` to the keyword arguments, unless the whole model's hook did."""
    if module.config.get_text_config()._attn_implementation != IMPLEMENTATION or "msa_pass" in kwargs:
        return args, kwargs
    return args, {**kwargs, "msa_pass": ForwardPass.of(args, kwargs)}


def _before_attention(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Add the table of sequences, the index heads and the function that measures them to the keyword arguments."""
    kwargs = dict(kwargs)
    forward_pass = kwargs.pop("msa_pass", None) or ForwardPass()
    hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = cache_of(kwargs)
    if module.flexmsa_fallback is not None or module.config._attn_implementation != IMPLEMENTATION:
        kwargs.pop("index_losses", None)
        # The steps that follow may select again, among all keys.
        if cache is not None and has_index_branch(module) and has_index_keys(cache, module.layer_idx):
            heads = project_index(module, module, hidden_states, kwargs["position_embeddings"])
            cache_index_keys(cache, module.layer_idx, heads.index_k)
        return args, kwargs
    whole = kwargs.get("shards") is None
    kwargs["attention_mask"] = (
        _sequences(forward_pass, hidden_states, cache, module.layer_idx, kwargs) if whole else None
    )
    if forward_pass.paged is not None:
        kwargs["paged"] = forward_pass.paged
    if not has_index_branch(module):
        return args, kwargs
    rope = kwargs["position_embeddings"]
    heads = project_index(module, module, hidden_states, rope)
    if cache is not None and forward_pass.paged is None:
        heads = IndexHeads(heads.index_q, cache_index_keys(cache, module.layer_idx, heads.index_k))
    kwargs["block_indices"] = module.msa.selection(heads)
    # A checkpointed layer runs again in the backward pass, but is measured only once.
    if forward_pass.with_health and module.layer_idx not in forward_pass.health:
        untrained = untrained_heads(module, module.msa.config, hidden_states, rope)
        kwargs["observe"] = partial(_observe, forward_pass, module, heads, untrained)
    return args, kwargs


@torch.no_grad()
def _observe(
    forward_pass: ForwardPass,
    module: Any,
    heads: IndexHeads,
    untrained: IndexHeads,
    q: Tensor,
    k: Tensor,
    sequences: Tensor | GatheredRows | None,
    scale: float,
) -> None:
    if isinstance(sequences, GatheredRows):
        q, k = sequences.gather_queries(q), sequences.gather_keys(k)
        heads, untrained = heads.gathered(sequences), untrained.gathered(sequences)
        sequences = sequences.table
    forward_pass.health[module.layer_idx] = measure(q, k, heads, untrained, sequences, module.msa.config, scale)


def _sequences(
    forward_pass: ForwardPass, hidden_states: Tensor, cache: Cache | None, layer_idx: int, kwargs: dict[str, Any]
) -> Tensor | GatheredRows | None:
    """Return the table of sequences on the device of this layer; the first layer of a forward pass makes it."""
    if forward_pass.has_sequences:
        found = forward_pass.sequences
        return None if found is None else found.to(hidden_states.device)
    paged = paged_batch(hidden_states, cache, kwargs)
    if paged is not None:
        if forward_pass.with_health:
            raise ValueError("with_health: expected False in generate_batch, got True; measure with generate")
        forward_pass.paged, forward_pass.sequences, forward_pass.has_sequences = paged, paged.table, True
        return paged.table
    position_ids = kwargs.get("position_ids") if forward_pass.has_positions else None
    mask, cu_seqlens = kwargs.get("attention_mask"), kwargs.get("cu_seq_lens_q")
    sequences = find_sequences(hidden_states, mask, position_ids, cu_seqlens, cache, layer_idx)
    # A traced, checkpointed layer must not change objects outside it.
    if not torch.compiler.is_compiling():
        forward_pass.sequences, forward_pass.has_sequences = sequences, True
    return sequences
