"""The index loss's sums: the number of losses in the mean, and partial gradients, in a fixed order.

grad_index_k is summed over work items, grad_index_q over top-k slots.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...sequences import table_rows
from ..common.launch import Launch
from ..common.records import load_sequence
from ..common.sizes import cdiv
from ..schedule.inverse_index import find_token_range, load_block
from ..schedule.work_items import load_share
from .loads import LossCall

# Keys, or tokens, that one program sums for.
ROWS = tl.constexpr(16)


class Scale(NamedTuple):
    """number: fp64 scalar, what the sum of the losses is divided by; unit: fp32 scalar, see `launch`."""

    number: torch.Tensor
    unit: torch.Tensor


@triton.jit
def loss_scale_kernel(sequences_ptr, grad_loss_ptr, count_ptr, result, num_sequences, num_kv_heads, index_scale):
    """Scale; grad_loss None is 1, count None the (batch, group, query) that see a key, at least 1. One program."""
    if count_ptr is not None:
        count = tl.load(count_ptr).to(tl.float64)
    else:
        with_keys = tl.zeros([ROWS], tl.int64)
        for start in range(0, num_sequences, ROWS):
            n = start + tl.arange(0, ROWS)
            sequence = load_sequence(sequences_ptr, n, n < num_sequences)
            queries, keys = sequence.q_end - sequence.q_start, sequence.k_end - sequence.k_start
            with_keys += tl.maximum(tl.minimum(queries, keys), 0)
        count = tl.maximum(tl.sum(with_keys, axis=0) * num_kv_heads, 1).to(tl.float64)
    unit = (index_scale / count).to(tl.float32)
    if grad_loss_ptr is not None:
        unit *= tl.load(grad_loss_ptr).to(tl.float32)
    tl.store(result.number, count)
    tl.store(result.unit, unit)


def loss_scale(
    sequences: torch.Tensor,
    grad_loss: torch.Tensor | None,
    count: torch.Tensor | None,
    num_kv_heads: int,
    index_scale: float,
) -> Scale:
    """The Scale of a call, for a gradient of the loss of grad_loss, and for count: scalars, see `loss_scale_kernel`."""
    result = Scale(sequences.new_empty((), dtype=torch.float64), sequences.new_empty((), dtype=torch.float32))
    tensors = {"sequences_ptr": sequences, "grad_loss_ptr": grad_loss, "count_ptr": count, "result": result}
    sizes = {"num_sequences": table_rows(sequences).shape[0], "num_kv_heads": num_kv_heads, "index_scale": index_scale}
    Launch(loss_scale_kernel, (1, 1, 1), tensors | sizes, {}).run()
    return result


@triton.jit
def sum_items_kernel(gradients, index, items, sizes, first_range, C: tl.constexpr):
    """grad_k += the sum of partial_k over the work items of a block's list, if there are several.

    Program (block, i, n) owns ROWS of the block's keys, in range n of a pass.
    """
    INDEX_DEPTH: tl.constexpr = C.index_depth
    number = tl.program_id(0)
    share = load_share(items, first_range, tl.program_id(2), number)
    if share.num_items == 0:
        return
    block = load_block(index.blocks, number)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, INDEX_DEPTH)
    inside = (block.first_key + column < block.stop_key)[:, None] & (depth < C.index_head_dim)[None, :]
    offsets = column[:, None] * C.index_head_dim + depth[None, :]
    total = tl.zeros([ROWS, INDEX_DEPTH], tl.float32)
    for item in tl.range(0, share.num_items, num_stages=4):
        slot = gradients.partial_k + (share.first_slot + item) * (C.parts * C.columns) * C.index_head_dim
        total += tl.load(slot + offsets, mask=inside, other=0.0)
    row = (tl.program_id(2) * sizes.batch + block.batch) * sizes.seqlen_k + block.first_key
    place = gradients.grad_k + row * C.index_head_dim + offsets
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def sum_slots_kernel(gradients, index, sizes, first_range, C: tl.constexpr):
    """grad_q of ROWS tokens of range program_id(2) of a pass: the sums of partial_q over their used top-k slots."""
    INDEX_DEPTH: tl.constexpr = C.index_depth
    PARTS: tl.constexpr = C.parts
    tokens = find_token_range(index, first_range + tl.program_id(2), index.topk)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tokens.num_tokens
    first_entry = tl.program_id(2).to(tl.int64) * index.range_tokens * index.topk
    depth = tl.arange(0, INDEX_DEPTH)
    deep = (depth < C.index_head_dim)[None, :]
    grad_q = tl.zeros([ROWS, INDEX_DEPTH], tl.float32)
    for slot in range(0, index.topk):
        entry = row * index.topk + slot
        used = tl.load(index.numbers + tokens.first_entry + entry, mask=live, other=index.none) < index.none
        for part in tl.static_range(PARTS):
            place = ((first_entry + entry) * PARTS + part)[:, None] * C.index_head_dim + depth[None, :]
            grad_q += tl.load(gradients.partial_q + place, mask=used[:, None] & deep, other=0.0).to(tl.float32)
    token = tokens.first_token + row
    batch, query = token // sizes.seqlen_q, token % sizes.seqlen_q
    place = ((batch * sizes.num_kv_heads + tokens.group) * sizes.seqlen_q + query) * C.index_head_dim
    place = gradients.grad_q + place[:, None] + depth[None, :]
    grad_q = (grad_q * tl.load(gradients.unit)).to(gradients.grad_q.dtype.element_ty)
    tl.store(place, grad_q, mask=live[:, None] & deep)


def sum_items(x: LossCall) -> Launch:
    """Adds partial_k of a pass to grad_k."""
    grid = x.index.num_blocks, cdiv(x.constants.parts * x.constants.columns, ROWS.value), 1
    return Launch(sum_items_kernel, grid, x.arguments(sum_items_kernel), {"C": x.constants})


def sum_slots(x: LossCall) -> Launch:
    """Fills grad_q of a pass from its partial_q."""
    grid = cdiv(x.index.range_tokens, ROWS.value), 1, 1
    return Launch(sum_slots_kernel, grid, x.arguments(sum_slots_kernel), {"C": x.constants})
