"""The backward's sums of what `backward_gradient` keeps apart: dK and dV over pieces, dQ over slots, both in order."""

import triton
import triton.language as tl

from ..schedule.inverse_index import load_block
from ..schedule.work_items import ItemsRecord, load_share
from .gradient import partial_offsets


@triton.jit(do_not_specialize=["chunk", "group"])
def sum_pieces_kernel(
    blocks_ptr,
    shares_ptr,
    partial_k_ptr,
    partial_v_ptr,
    grad_k_ptr,
    grad_v_ptr,
    chunk,
    group,
    seqlen_k,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add the pieces of block program_id(0)'s list, if there are several, to KEYS of its keys' gradients."""
    block = tl.program_id(0)
    share = load_share(ItemsRecord(0, shares_ptr, 0, tl.num_programs(0)), chunk, block)
    slot, pieces = share.first_slot, share.num_items
    if pieces == 0:
        return
    owned = load_block(blocks_ptr, block)
    batch, first_key, stop_key = owned.batch, owned.first_key, owned.stop_key
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)[:, None]
    depth = tl.arange(0, DEPTH)[None, :]
    mask = (first_key + key < stop_key) & (key < BLOCK) & (depth < HEAD_DIM)
    tile = key * HEAD_DIM + depth
    place = ((batch * num_kv_heads + group) * seqlen_k + first_key) * HEAD_DIM + tile
    grad_k = tl.load(grad_k_ptr + place, mask=mask, other=0.0)
    grad_v = tl.load(grad_v_ptr + place, mask=mask, other=0.0)
    for piece in tl.range(0, pieces, num_stages=4):
        partial = (slot + piece) * BLOCK * HEAD_DIM + tile
        grad_k += tl.load(partial_k_ptr + partial, mask=mask, other=0.0)
        grad_v += tl.load(partial_v_ptr + partial, mask=mask, other=0.0)
    tl.store(grad_k_ptr + place, grad_k, mask=mask)
    tl.store(grad_v_ptr + place, grad_v, mask=mask)


@triton.jit(do_not_specialize=["group", "token0"])
def sum_slots_kernel(
    places_ptr,
    partial_q_ptr,
    grad_q_ptr,
    group,
    token0,
    seqlen_q,
    num_kv_heads,
    topk,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    INSIDE: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """grad_q [B, Hq, Sq, D] of TILE heads of token `token0 + program_id(0)`; a slot of no list has place -1."""
    local = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    depth = tl.arange(0, DEPTH)[None, :]
    mask = (head < HEADS) & (depth < HEAD_DIM)
    offsets = partial_offsets(head, depth, HEADS, HEAD_DIM, INSIDE)
    grad_q = tl.zeros([TILE, DEPTH], tl.float32)
    for slot in tl.range(0, topk, loop_unroll_factor=4):
        place = tl.load(places_ptr + local * topk + slot).to(tl.int64)
        partial = partial_q_ptr + place * (HEADS * HEAD_DIM) + offsets
        grad_q += tl.load(partial, mask=mask & (place >= 0), other=0.0).to(tl.float32)
    token = tl.cast(token0, tl.int64) + local
    batch, query = token // seqlen_q, token % seqlen_q
    row = ((batch * num_kv_heads + group) * HEADS + head) * seqlen_q + query
    tl.store(grad_q_ptr + row * HEAD_DIM + depth, grad_q.to(grad_q_ptr.dtype.element_ty), mask=mask)
