"""The steps of MSA on checked tensors of one dtype: choose a backend and call it. Public functions and integrations
share them.
"""

import contextlib
import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexmsa import dense, flex, ops, reference
from flexmsa._profiling import profiled
from flexmsa._sequences import Sequences
from flexmsa.backends import choose_backend, dense_backend, step_backend
from flexmsa.kernels.rules import FEW_QUERIES, SelectionRule
from flexmsa.ops.attention import statistics_dtype
from flexmsa.types import AuxOutput, AuxRequest

__all__ = ["Settings", "attention", "chosen_scores", "index_loss", "main_branch", "requested", "select_blocks"]


# The most numbers of gathered index keys that are held at once.
_HELD = 2**25


@dataclass(frozen=True)
class Settings:
    """How to attend.

    Attributes:
        block_size: keys per block.
        scale, index_scale: factors of the main scores, and of the index scores in the loss.
        rule: how to select; None is the dense warm-up.
        backend: as for `flexmsa.attention`.
    """

    block_size: int
    scale: float
    index_scale: float = 1.0
    rule: SelectionRule | None = None
    backend: str | None = None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    sequences: Sequences,
    settings: Settings,
    aux: AuxRequest,
    block_indices: Tensor | None = None,
    loss_value: Tensor | None = None,
    loss_count: Tensor | None = None,
) -> tuple[Tensor, AuxOutput]:
    """Select, attend, and compute the index loss if `aux` requests it; given block_indices replace the selection.

    loss_value: the backward computes the loss, and writes it there; if the index branch is frozen, the forward does.
    Without gradients nothing does, since reentrant checkpointing runs its first forward so. loss_count: what the sum of
    the losses is divided by.
    """
    branches = q, k, v, index_q, index_k
    lse: Tensor | None
    loss: Tensor | None = None
    with_loss = aux.any_loss
    deferred = loss_value is not None and (_needs_grad(index_q, index_k) or not torch.is_grad_enabled())
    if block_indices is None and not with_loss:
        decoded = _decode(*branches, sequences, settings)
        if decoded is not None:
            out, lse, block_indices = decoded
            return out, requested(aux, lse, block_indices)
    number = loss_count
    if aux.index_loss_sum and loss_count is None:
        number = sequences.count(k.shape[1])
        loss_count = number.clamp(min=1)
    with _expected_step(branches, sequences, settings, with_loss, deferred, block_indices):
        if block_indices is None and settings.rule is not None:
            block_indices = select_blocks(index_q, index_k, sequences, settings.rule, settings.backend)
        # Without gradients there is no backward. FlexAttention and the reference have backwards of their own.
        together = with_loss and deferred and block_indices is not None and _needs_grad(q, k, v)
        backend = choose_backend("block_sparse_attention", settings.backend, q) if together else ""
        if together and backend in ("torch", "triton"):
            inputs = q, k, v, index_q, index_k, block_indices, sequences.table, loss_count, loss_value
            numbers = settings.block_size, settings.scale, settings.index_scale
            out, lse, loss = ops.attention_and_index_loss(*inputs, *numbers, backend)
            return out, requested(aux, lse, block_indices, loss, number)
        out, lse = main_branch(q, k, v, block_indices, sequences, settings, aux)
        if with_loss:
            assert lse is not None
            main = q, k, index_q, index_k
            value = loss_value if deferred else None
            loss = index_loss(*main, block_indices, lse, sequences, settings, value, loss_count)
            if loss_value is not None and not torch.is_grad_enabled():
                # That of an earlier call would look like this one's.
                loss_value.fill_(math.nan)
            elif loss_value is not None and not deferred:
                loss_value.copy_(loss)
        return out, requested(aux, lse, block_indices, loss, number)


@profiled("select and attend")
def _decode(
    q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor, sequences: Sequences, settings: Settings
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return out, lse and block_indices of a few queries without gradients, by one operator with fewer launches.

    None if that does not take these inputs.
    """
    rule = settings.rule
    if rule is None or q.shape[2] > FEW_QUERIES or _needs_grad(q, k, v, index_q, index_k):
        return None
    # vmap has no rule for operators that write their arguments.
    if _is_inside_vmap():
        return None
    backend = choose_backend("block_sparse_attention", settings.backend, q)
    if backend not in ("torch", "triton"):
        return None
    return select_and_attend(q, index_q, k, v, index_k, sequences.table, rule, settings.scale, backend)


def select_and_attend(
    q: Tensor,
    index_q: Tensor,
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    table: Tensor,
    rule: SelectionRule,
    scale: float,
    backend: str,
    page_table: Tensor | None = None,
    scales: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out, lse and block_indices of the sequences in a table, whose keys may be in pages and have scales."""
    out, ids = q.new_empty(q.shape), table.new_empty((*index_q.shape[:3], rule.topk))
    numbers = rule.block_size, rule.num_local_blocks, rule.num_init_blocks, scale, backend
    lse = ops.select_and_attend(q, index_q, k, v, index_k, table, *numbers, page_table, *scales, out, ids)
    return out, lse, ids


def _expected_step(
    branches: tuple[Tensor, ...], sequences: Sequences, settings: Settings, with_loss: bool, deferred: bool, ids: Any
) -> contextlib.AbstractContextManager[None]:
    """In training by the Triton kernels, let the first launch compile those of the whole step, forward and backward."""
    rule, q = settings.rule, branches[0]
    if rule is None or ids is not None or torch.compiler.is_compiling() or not _needs_grad(*branches[:3]):
        return contextlib.nullcontext()
    if choose_backend("block_sparse_attention", settings.backend, q) != "triton":
        return contextlib.nullcontext()
    scales = settings.scale, settings.index_scale
    return ops.expected_training_step(*branches, sequences.table, rule, *scales, with_loss, deferred)


@profiled("select blocks")
def select_blocks(
    index_q: Tensor, index_k: Tensor, sequences: Sequences, rule: SelectionRule, backend: str | None
) -> Tensor:
    """Return block_indices [B, Hkv, Sq, topk] int32."""
    backend = step_backend("select_blocks", backend, index_q)
    numbers = rule.block_size, rule.topk, rule.num_local_blocks, rule.num_init_blocks
    if backend == "reference":
        return reference.select_blocks(index_q, index_k, *sequences.key_ranges(), *numbers)
    index_q, index_k = index_q.detach(), index_k.detach()
    if sequences.ranges is None:
        return ops.select_blocks(index_q, index_k, sequences.table, *numbers, backend)
    # Kernels for long sequences are chosen by lengths that the host knows.
    found = [ops.select_blocks(*part, *numbers, backend) for part in sequences.parts(index_q, index_k)]
    padding = sequences.seqlen_q - sum(ids.shape[2] for ids in found)
    found.append(index_q.new_full((*index_q.shape[:2], padding, rule.topk), -1, dtype=torch.int32))
    return torch.cat(found, dim=2)


def chosen_scores(
    index_q: Tensor, index_k: Tensor, block_indices: Tensor, sequences: Sequences, block_size: int
) -> Tensor:
    """Return the scores [B, Hkv, Sq, topk] of blocks that were selected, -inf for -1: each gathered by its queries."""
    start, end = sequences.key_ranges()
    dtype = statistics_dtype(index_q)
    finite = torch.finfo(dtype)
    scores = torch.full(block_indices.shape, -torch.inf, dtype=dtype, device=index_q.device)
    offset = torch.arange(block_size, device=index_q.device)
    batch, groups, seqlen, topk = block_indices.shape
    rows = max(1, _HELD // max(1, groups * topk * block_size * index_q.shape[3]))
    for row, first in itertools.product(range(batch), range(0, seqlen, rows)):
        part = slice(first, first + rows)
        ids = block_indices[row, :, part].long()
        key = start[row, part, None, None] + ids[..., None] * block_size + offset
        seen = (ids >= 0)[..., None] & (key < end[row, part, None, None])
        keys = index_k[row, 0][key.clamp(0, index_k.shape[2] - 1)].to(dtype)
        # Autocast would round the scores.
        with torch.autocast(keys.device.type, enabled=False):
            found = torch.einsum("gnd,gntkd->gntk", index_q[row, :, part].to(dtype), keys)
        found = found.nan_to_num(nan=finite.min, posinf=finite.max, neginf=finite.min)
        scores[row, :, part] = found.masked_fill(~seen, -torch.inf).amax(-1)
    return scores


@profiled("attend")
def main_branch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor | None,
    sequences: Sequences,
    settings: Settings,
    aux: AuxRequest,
) -> tuple[Tensor, Tensor | None]:
    """Return out [B, Hq, Sq, D] and lse [B, Hq, Sq]; lse may be None if `aux` does not need it."""
    block_size, scale, backend = settings.block_size, settings.scale, settings.backend
    # cuDNN's lse has no gradient, and a user who requests the lse may want one.
    if block_indices is None and backend is None and not aux.lse and dense.cudnn_runs(q, k, sequences):
        return dense.cudnn_attention(q, k, v, scale)
    backend = (
        dense_backend(backend, q) if block_indices is None else choose_backend("block_sparse_attention", backend, q)
    )
    needs_grad = _needs_grad(q, k, v)
    if backend == "flex":
        if block_indices is None:
            mask = flex.dense_block_mask(q, k, sequences, needs_grad)
        else:
            mask = flex.selection_block_mask(block_indices, q.shape[1], block_size, sequences, needs_grad)
        result = flex.packed_flex_attention(q, k, v, mask, scale=scale, return_lse=aux.lse or aux.any_loss)
        return result if isinstance(result, tuple) else (result, None)
    if backend == "reference":
        ranges = sequences.key_ranges()
        return reference.block_sparse_attention(q, k, v, block_indices, *ranges, block_size, scale)
    return ops.block_sparse_attention(q, k, v, block_indices, sequences.table, block_size, scale, backend)


@profiled("index loss")
def index_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_indices: Tensor | None,
    lse: Tensor,
    sequences: Sequences,
    settings: Settings,
    value: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Return the scalar loss, with gradients to index_q and index_k only; 0 if the backward writes it to `value`.

    count: what the sum is divided by; None is the number of groups and queries that see a key.
    """
    backend = step_backend("index_loss", settings.backend, q)
    q, k, lse = q.detach(), k.detach(), lse.detach()
    if backend == "reference":
        branches, ranges = (q, k, index_q, index_k), sequences.key_ranges()
        scales = settings.scale, settings.index_scale
        loss = reference.index_loss(*branches, block_indices, *ranges, settings.block_size, *scales, count=count)
        if value is None:
            return loss
        value.copy_(loss.detach())
        return loss - loss.detach()
    inputs = q, k, index_q, index_k, block_indices, lse, sequences.table, count
    numbers = settings.block_size, settings.scale, settings.index_scale
    if value is not None:
        return ops.deferred_index_loss(*inputs, value, *numbers, backend)
    loss, _, _ = ops.index_loss(*inputs, *numbers, _needs_grad(index_q, index_k), backend)
    return loss


def requested(
    aux: AuxRequest,
    lse: Tensor | None,
    block_indices: Tensor | None,
    index_loss: Tensor | None = None,
    loss_count: Tensor | None = None,
) -> AuxOutput:
    """Return what `aux` requests of a call's results."""
    loss_sum = None
    if aux.index_loss_sum:
        assert index_loss is not None and loss_count is not None
        loss_sum = (index_loss * loss_count).to(index_loss.dtype)
    return AuxOutput(
        lse=lse if aux.lse else None,
        block_indices=block_indices if aux.block_indices else None,
        index_loss=index_loss if aux.index_loss else None,
        index_loss_sum=loss_sum,
        index_loss_count=loss_count if aux.index_loss_sum else None,
    )


def _needs_grad(*tensors: Tensor) -> bool:
    # A tensor inside vmap does not say whether the one outside needs a gradient.
    return torch.is_grad_enabled() and (_is_inside_vmap() or any(x.requires_grad for x in tensors))


def _is_inside_vmap() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
