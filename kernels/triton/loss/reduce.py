"""The index loss's sums of what `loss_gradient` keeps apart: grad_index_k over pieces, grad_index_q over slots."""

import triton
import triton.language as tl

from ..schedule.inverse_index import IndexRecord, find_token_range, load_block
from ..schedule.work_items import ItemsRecord, load_share
from .loads import VARYING


@triton.jit(do_not_specialize=VARYING)
def sum_pieces_kernel(
    blocks_ptr,
    shares_ptr,
    partial_k_ptr,
    grad_k_ptr,
    seqlen_k,
    chunk,
    num_blocks,
    INDEX_DIM: tl.constexpr,
    INDEX_DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad_k += the sum of partial_k [slot, SIZE, Di] over the pieces of a block's list, if it has several.

    Program (block, i) owns ROWS of its keys; SIZE: keys of all its parts.
    """
    block = tl.program_id(0)
    share = load_share(ItemsRecord(0, shares_ptr, 0, num_blocks), chunk, block)
    slot, pieces = share.first_slot, share.num_items
    if pieces == 0:
        return
    owned = load_block(blocks_ptr, block)
    batch, first_key, stop_key = owned.batch, owned.first_key, owned.stop_key
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, INDEX_DEPTH)
    inside = (first_key + column < stop_key)[:, None] & (depth < INDEX_DIM)[None, :]
    offsets = column[:, None] * INDEX_DIM + depth[None, :]
    total = tl.zeros([ROWS, INDEX_DEPTH], tl.float32)
    for piece in tl.range(0, pieces, num_stages=4):
        total += tl.load(partial_k_ptr + (slot + piece) * SIZE * INDEX_DIM + offsets, mask=inside, other=0.0)
    place = grad_k_ptr + (batch * seqlen_k + first_key) * INDEX_DIM + offsets
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def sum_slots_kernel(
    numbers_ptr,
    unit_ptr,
    partial_q_ptr,
    grad_q_ptr,
    num_groups,
    seqlen_q,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    none,
    topk,
    INDEX_DIM: tl.constexpr,
    INDEX_DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad_q [B, Hkv, Sq, Di] of ROWS tokens: the sums of partial_q over their used slots, in order."""
    tokens = find_token_range(IndexRecord(0, 0, 0, 0, first_token, num_tokens, chunk_tokens, 0), chunk, topk)
    group, origin, token0 = tokens.group, tokens.first_entry, tokens.first_token
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.minimum(chunk_tokens, first_token + num_tokens - token0)
    depth = tl.arange(0, INDEX_DEPTH)
    deep = (depth < INDEX_DIM)[None, :]
    grad_q = tl.zeros([ROWS, INDEX_DEPTH], tl.float32)
    for slot in range(0, topk):
        local = row * topk + slot
        used = tl.load(numbers_ptr + origin + local, mask=live, other=none) < none
        for part in tl.static_range(PARTS):
            place = partial_q_ptr + (local * PARTS + part)[:, None] * INDEX_DIM + depth[None, :]
            grad_q += tl.load(place, mask=used[:, None] & deep, other=0.0)
    token = token0 + row
    place = ((token // seqlen_q * num_groups + group) * seqlen_q + token % seqlen_q) * INDEX_DIM
    tl.store(grad_q_ptr + place[:, None] + depth[None, :], grad_q * tl.load(unit_ptr), mask=live[:, None] & deep)
