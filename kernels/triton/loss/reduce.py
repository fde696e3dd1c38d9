"""The index loss's sums of partial gradients: grad_index_k over work items, grad_index_q over top-k slots, in order."""

import triton
import triton.language as tl

from ..common.launch import Launch
from ..schedule.inverse_index import find_token_range, load_block
from ..schedule.work_items import load_share
from .loads import LossCall

# Keys, or tokens, that one program sums for.
ROWS = tl.constexpr(16)


@triton.jit
def sum_items_kernel(gradients, index, items, sizes, range_number, C: tl.constexpr):
    """grad_k += the sum of partial_k over the work items of a block's list, if there are several.

    Program (block, i) owns ROWS of the block's keys.
    """
    INDEX_DEPTH: tl.constexpr = C.index_depth
    number = tl.program_id(0)
    share = load_share(items, range_number, number)
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
    place = gradients.grad_k + (block.batch * sizes.seqlen_k + block.first_key) * C.index_head_dim + offsets
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit
def sum_slots_kernel(gradients, index, sizes, range_number, C: tl.constexpr):
    """grad_q of ROWS tokens: the sums of partial_q over their used top-k slots, in order."""
    INDEX_DEPTH: tl.constexpr = C.index_depth
    PARTS: tl.constexpr = C.parts
    tokens = find_token_range(index, range_number, index.topk)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tokens.num_tokens
    depth = tl.arange(0, INDEX_DEPTH)
    deep = (depth < C.index_head_dim)[None, :]
    grad_q = tl.zeros([ROWS, INDEX_DEPTH], tl.float32)
    for slot in range(0, index.topk):
        entry = row * index.topk + slot
        used = tl.load(index.numbers + tokens.first_entry + entry, mask=live, other=index.none) < index.none
        for part in tl.static_range(PARTS):
            place = gradients.partial_q + (entry * PARTS + part)[:, None] * C.index_head_dim + depth[None, :]
            grad_q += tl.load(place, mask=used[:, None] & deep, other=0.0)
    token = tokens.first_token + row
    batch, query = token // sizes.seqlen_q, token % sizes.seqlen_q
    place = ((batch * sizes.num_kv_heads + tokens.group) * sizes.seqlen_q + query) * C.index_head_dim
    place = gradients.grad_q + place[:, None] + depth[None, :]
    tl.store(place, grad_q * tl.load(gradients.unit), mask=live[:, None] & deep)


def sum_items(x: LossCall, range_number: int) -> Launch:
    """Adds partial_k of one token range to grad_k."""
    grid = x.index.num_blocks, triton.cdiv(x.constants.parts * x.constants.columns, ROWS.value), 1
    return Launch(sum_items_kernel, grid, x.arguments(sum_items_kernel, range_number), {"C": x.constants})


def sum_slots(x: LossCall, range_number: int) -> Launch:
    """Fills grad_q of one token range from its partial_q."""
    grid = triton.cdiv(x.index.range_tokens, ROWS.value), 1, 1
    return Launch(sum_slots_kernel, grid, x.arguments(sum_slots_kernel, range_number), {"C": x.constants})
