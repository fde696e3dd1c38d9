"""`attn_implementation="flexmsa"`: the attention and the mask function that transformers calls.

MiniMax-M3's modules and converted modules pass the same arguments to them: as `attention_mask` the table of sequences,
or `GatheredRows` with one, and a `Selection` (index heads and settings, not ids) as `block_indices`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, or_masks
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexmsa import _core, _loss, ops, validation
from flexmsa._sequences import Sequences
from flexmsa.backends import choose_backend
from flexmsa.distributed.context_parallel import context_parallel_attention
from flexmsa.distributed.gather import gather_tokens
from flexmsa.distributed.gradients import total, with_total
from flexmsa.distributed.shards import SequenceShards
from flexmsa.integrations.transformers.gathered import GatheredRows
from flexmsa.integrations.transformers.index_branch import IndexHeads, has_index_branch, num_groups
from flexmsa.integrations.transformers.losses import IndexLosses
from flexmsa.integrations.transformers.paged import PagedBatch
from flexmsa.integrations.transformers.tensor_parallel import head_mesh
from flexmsa.kernels.rules import SelectionRule
from flexmsa.types import AuxOutput, AuxRequest

__all__ = ["IMPLEMENTATION", "Selection", "check_shards", "register_attention"]

IMPLEMENTATION = "flexmsa"
# In dense attention, the block size affects only the speed.
_DENSE_BLOCK_SIZE = 128


class Selection(NamedTuple):
    """How a layer selects blocks.

    Attributes:
        heads: index_q and index_k.
        block_size, topk, num_local_blocks, num_init_blocks: as for `flexmsa.attention`; topk None is the warm-up.
        select: replaces the index branch's selection: (index_q, index_k) -> block_indices [B, Hkv, Sq, topk], for
            rows of one sequence each.
    """

    heads: IndexHeads
    block_size: int
    topk: int | None
    num_local_blocks: int = 1
    num_init_blocks: int = 0
    select: Callable[[Tensor, Tensor], Tensor] | None = None


class LossRequest(NamedTuple):
    """How a layer computes its index loss.

    Attributes:
        value: where the backward writes it; None if the forward computes it.
        divisor: of the sum of the losses; None is their number, of all groups.
        mesh: the processes over which the heads are sharded.
    """

    value: Tensor | None
    divisor: Tensor | float | None
    mesh: DeviceMesh | None

    def groups(self, k: Tensor) -> int:
        """Return the number of groups of all processes; k has this one's."""
        return k.shape[1] * (1 if self.mesh is None else self.mesh.size())

    def of_own_heads(self, index_q: Tensor, index_k: Tensor) -> tuple[Tensor, Tensor]:
        """Return both; their backward adds up the processes' values."""
        if self.mesh is None or self.value is None:
            return index_q, index_k
        return with_total(index_q, index_k, self.value, [self.mesh.get_group()])

    def of_all_heads(self, loss: Tensor | None) -> Tensor:
        """Return the loss of all processes' heads; with a value, it is a 0 with this process's part of the gradient."""
        assert loss is not None
        return loss if self.mesh is None or self.value is not None else total(loss, self.mesh)


@functools.cache
def register_attention() -> None:
    """Register the implementation with transformers; further calls do nothing."""
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
    """Return the padding mask [B, keys] unchanged; for sliding-window layers, the mask of the fallback attention."""
    fallback = (getattr(config, "flexmsa", None) or {}).get("fallback")
    if "local_size" in kwargs and fallback is not None:
        given = {"config": config, "attention_mask": attention_mask, "q_offset": q_offset, "kv_length": kv_length}
        return ALL_MASK_ATTENTION_FUNCTIONS[fallback](*args, **given, **kwargs)
    _check_causal(kwargs.get("mask_function"))
    if attention_mask is None or not isinstance(q_offset, Tensor):
        return attention_mask
    # A static cache: generate's mask grows by one token per step, so a compiled step would compile again each time.
    return F.pad(attention_mask, (0, kv_length - attention_mask.shape[1]))


def _check_causal(function: Any) -> None:
    """Raise if queries may see later keys, as those of the same image do in some models."""
    # A traced function's parts cannot be seen.
    if function is None or function is causal_mask_function or torch.compiler.is_compiling():
        return
    if getattr(function, "__qualname__", "").startswith(or_masks.__qualname__):
        raise NotImplementedError(
            f"mask_function: expected causal attention, got {function.__qualname__}: tokens of an image, or all "
            "tokens, see each other in this model's layers with full attention; call it without token_type_ids for "
            "text, or keep the model dense"
        )
    # Documents in a row come as and_masks of several functions.
    for cell in getattr(function, "__closure__", None) or ():
        parts = cell.cell_contents
        for part in parts if isinstance(parts, tuple) else ():
            _check_causal(part)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | GatheredRows | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    block_indices: Selection | None = None,
    index_losses: IndexLosses | None = None,
    observe: Callable[[Tensor, Tensor, Tensor | GatheredRows | None, float], None] | None = None,
    shards: SequenceShards | None = None,
    paged: PagedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D] to out [B, Sq, Hq, D], and None for weights.

    If `module.flexmsa_fallback` names another implementation, that one attends (in layers with a sliding window, for
    example). `observe` is called with query, key, the table of sequences and scaling. With `shards`, q, k and v are
    this process's tokens. With `paged`, they are tokens of several requests; some versions of transformers have their
    earlier keys and values in k and v already.
    """
    if not hasattr(module, "flexmsa_fallback"):
        raise NotImplementedError(
            f'attn_implementation="flexmsa": expected MiniMax-M3 or a converted model, got {type(module).__name__}; '
            "call register() for the first, and convert(model) for others"
        )
    if module.flexmsa_fallback is not None:
        if shards is not None:
            raise ValueError("shards: expected full attention in all layers, got a layer with a sliding window")
        attend = ALL_ATTENTION_FUNCTIONS[module.flexmsa_fallback]
        return attend(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if isinstance(attention_mask, Tensor) and attention_mask.dtype != torch.int32:
        raise ValueError(
            f"attention_mask: expected the table of sequences, got {attention_mask.dtype} "
            f"{list(attention_mask.shape)}; call the model, not a layer of it"
        )
    validation.reject_context_parallel()
    if block_indices is None and has_index_branch(module):
        raise RuntimeError(f"{type(module).__name__} does not pass keyword arguments to its attention function")
    if has_index_branch(module):
        _check_heads(module, key)
    if dropout:
        raise NotImplementedError(f"attention_dropout: expected 0, got {dropout}; set config.attention_dropout = 0")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    number: Any = module.layer_idx
    if paged is not None and "cache" in kwargs:
        key, value = paged.update(number, key, value)
    if paged is not None and block_indices is not None:
        index_q, index_k = block_indices.heads
        block_indices = block_indices._replace(heads=IndexHeads(index_q, paged.update_index(number, index_k)))
    request = loss = None
    if index_losses is not None:
        request = LossRequest(index_losses.deferred.get(number), index_losses.count, head_mesh(module))
    observed = query, key
    rows = attention_mask if isinstance(attention_mask, GatheredRows) else None
    if rows is not None:
        query, key, value = rows.gather_queries(query), rows.gather_keys(key), rows.gather_keys(value)
        if block_indices is not None:
            block_indices = block_indices._replace(heads=block_indices.heads.gathered(rows))
    table = attention_mask if rows is None else rows.table
    if shards is not None:
        out, loss = _attend_with_shards(query, key, value, block_indices, shards, scale, request)
    elif block_indices is None:
        out = _attend_densely(query, key, value, table, scale)
    else:
        out, loss = _attend_sparsely(query, key, value, block_indices, table, scale, request)
    if index_losses is not None and loss is not None:
        index_losses.record(number, loss)
    if observe is not None:
        # After the attention: a checkpointed layer, which is not measured again, recomputes what it saved in order.
        observe(*observed, attention_mask, scale)
    if rows is not None:
        out = rows.restore(out)
    return out.transpose(1, 2).contiguous(), None


def _check_heads(module: Any, key: Tensor) -> None:
    """Raise if heads are sharded without the styles that make the index loss and its gradients whole."""
    groups = num_groups(module.config)
    if key.shape[1] != groups and head_mesh(module) is None:
        raise ValueError(
            f"{type(module).__name__}: expected its {groups} groups of heads, got {key.shape[1]}: they are sharded "
            "without their index branch; load a converted model by this package's from_pretrained with "
            'tp_plan="auto", and MiniMax-M3 with minimax_m3_tp_plan()'
        )


def _attend_densely(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, scale: float) -> Tensor:
    """Return the output [B, Hq, Sq, D] of a layer without an index branch: attention to every visible key."""
    q, k, v = ops.cast_to_autocast(q, k, v)
    if q.shape[2] == 1:
        mask = None
        if table is not None:
            key = torch.arange(k.shape[2], device=k.device)
            mask = ((key >= table[:, 3:4]) & (key < table[:, 4:]))[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    if table is None:
        _check_plain(q, k, v)
    sequences = Sequences(q, k.shape[2], table=table)
    settings = _settings(q, scale, table is None, _DENSE_BLOCK_SIZE)
    return _core.main_branch(q, k, v, None, sequences, settings, AuxRequest())[0]


def _attend_sparsely(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection,
    table: Tensor | None,
    scale: float,
    request: LossRequest | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the output [B, Hq, Sq, D] and, if requested, the index loss: 0 if the backward writes its value."""
    q, k, v, index_q, index_k = ops.cast_to_autocast(q, k, v, *(x.to(q.dtype) for x in selection.heads))
    validation.check_branches_match(q, k, index_q, index_k)
    _, block_size, topk, num_local_blocks, num_init_blocks, select = selection
    validation.check_settings(block_size, topk, num_local_blocks, num_init_blocks)
    is_plain = topk is None and table is None
    if is_plain:
        _check_plain(q, k, v, index_q, index_k)
    if select is not None and table is not None:
        raise ValueError("select: expected rows of one sequence each, got padding, packed documents or a static cache")
    rule = block_indices = None
    if topk is None:
        block_size = _DENSE_BLOCK_SIZE
    elif select is not None:
        block_indices = select(index_q.detach(), index_k.detach())
    else:
        rule = SelectionRule(block_size, topk, num_local_blocks, num_init_blocks)
    settings = _settings(q, scale, is_plain, block_size, rule, index_q.shape[-1] ** -0.5)
    sequences = Sequences(q, k.shape[2], table=table)
    if request is None:
        return _core.attention(q, k, v, index_q, index_k, sequences, settings, AuxRequest(), block_indices)[0], None
    count = _loss.check_count("index_loss_count", request.divisor, q)
    if count is None and request.mesh is not None:
        count = sequences.count(request.groups(k)).clamp(min=1)
    branches = q, k, v, *request.of_own_heads(index_q, index_k)
    aux = AuxRequest(index_loss=True)
    out, found = _core.attention(*branches, sequences, settings, aux, block_indices, request.value, count)
    return out, request.of_all_heads(found.index_loss)


def check_shards(shards: Any, attention_mask: Any, position_ids: Any) -> None:
    """Check what a model is called with beside the shards of its tokens."""
    if not isinstance(shards, SequenceShards):
        raise TypeError(f"shards: expected SequenceShards, got {type(shards).__name__}")
    if attention_mask is not None:
        raise ValueError("attention_mask: expected None with shards, got one; pack documents in place of padding")
    if position_ids is None:
        raise ValueError("position_ids: expected shards.row_positions() with shards, got None")


def _attend_with_shards(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    selection: Selection | None,
    shards: SequenceShards,
    scale: float,
    request: LossRequest | None,
) -> tuple[Tensor, Tensor | None]:
    """As `_attend_sparsely`, or for selection None `_attend_densely`, for this process's tokens of all."""
    if selection is None:
        q, k, v = ops.cast_to_autocast(q, k, v)
        k, v = gather_tokens([k, v], shards)
        sequences = Sequences(q, shards.seqlen, table=shards.fragments)
        settings = _settings(q, scale, False, _DENSE_BLOCK_SIZE)
        return _core.main_branch(q, k, v, None, sequences, settings, AuxRequest())[0], None
    heads, block_size, topk, num_local_blocks, num_init_blocks, select = selection
    if select is not None:
        raise ValueError("select: expected None with shards, which are parts of sequences, got a function")
    index_q, index_k = (x.to(q.dtype) for x in heads)
    loss: dict[str, Any] = {}
    if request is not None:
        index_q, index_k = request.of_own_heads(index_q, index_k)
        count = shards.index_loss_count(request.groups(k)) if request.divisor is None else request.divisor
        loss = {"index_loss_count": count, "index_loss_value": request.value}
    out, aux = context_parallel_attention(
        *(q, k, v, index_q, index_k, shards),
        block_size=block_size,
        topk=topk,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
        scale=scale,
        return_aux=AuxRequest(index_loss=request is not None),
        **loss,
    )
    assert isinstance(aux, AuxOutput)
    return out, None if request is None else request.of_all_heads(aux.index_loss)


def _check_plain(q: Tensor, k: Tensor, v: Tensor, *index: Tensor) -> None:
    validation.reject_forward_ad(q, k, v, *index)
    validation.check_main_inputs(q, k, v, None)


def _settings(
    q: Tensor,
    scale: float,
    is_plain: bool,
    block_size: int,
    rule: SelectionRule | None = None,
    index_scale: float = 1.0,
) -> _core.Settings:
    """Return the settings of a call.

    Dense attention to whole rows, `is_plain`, may use FlexAttention and cuDNN. All else uses the kernels that take a
    table of sequences.
    """
    backend = None if is_plain else choose_backend("block_sparse_attention", None, q)
    backend = "torch" if backend == "flex" else backend
    return _core.Settings(block_size, scale, index_scale, rule, backend)
