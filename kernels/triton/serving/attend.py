"""Attention of a few queries over the chosen blocks of a cache, contiguous or paged.

    out[i, h] = sum_j p_j v[j],  p = softmax(scale * <q[i, h], k[j]>)  over the visible keys j of the chosen blocks
    lse[i, h] = log sum_j exp(scale * <q[i, h], k[j]>)                 natural log, fp32

Layouts: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], any strides; block_indices [B, Hkv, Sq, topk] int32, ids relative to
the query's sequence, anything that is no visible block is skipped; out [B, Hq, Sq, D] in q's dtype, lse [B, Hq, Sq]
fp32, contiguous. Hq = G * Hkv, heads of a group being neighbours. Sequences as in `flexmsa.kernels`; keys outside
them, and keys that the query does not see, are never read. With page_table [B, max_pages], k and v are pages
[num_pages, Hkv, block_size, D]. In e4m3 they are brought into q's dtype once loaded, and have scales of their shape but
for D: s_j of scores of key j, and of the weight of value j.

One program owns one query of one group, all G heads of it as the rows of its tile, and a share of the topk chosen
blocks, walked `chunk` keys at a step. With more than one share it writes a normalised partial out and its lse,
[B*Hq*Sq, splits, D] and [B*Hq*Sq, splits] fp32, which `combine_splits` weighs together.

Where the selection was split, the blocks are those of its lists. Each program merges the lists of its query and group
for itself: a kernel of its own, with its launch, its loads and its stores, takes 1 to 3 us more.

Cost: 2 Hkv topk block_size D elements of k and v are read per query, 4 MB at M3's shape in bf16, 1 us; scoring before
it reads Sk Di elements, 60 us at 1M keys (see `selection`). What is left is latency: of the launches of append, select
and attend, and of combine where the work is split, and of what each has to wait for in turn.
"""

import triton
import triton.language as tl

from ..common.fp8 import decode_scales, load_stored
from ..common.primitives import (
    LN_2,
    LOG2_E,
    announce_next,
    await_previous,
    find_tile,
    load_sequence,
    locate_block,
    softmax_update,
)
from ..common.target import padded
from ..common.tiles import Tile
from ..selection.merge import Lists, MergeConstants, merge_lists, query_lists, sort_ids
from .config import AttendConfig

LENGTHS = ["num_sequences", "seqlen_q", "seqlen_k", "max_pages", "num_pages", "num_splits", "num_lists"]


@triton.jit
def find_keys(
    ids, step, visible, page_table_ptr, max_pages, num_pages, batch, k_start,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PAGED: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """The keys of a step: (row of the cache, first key, how many), none if its block is not to be attended to.

    `ids` are all choices of the query. Those that no MERGE has made may be anything, and a block that is chosen twice
    is attended to once.
    """
    CHUNKS: tl.constexpr = (BLOCK + CHUNK - 1) // CHUNK
    slot = step // CHUNKS
    place = tl.arange(0, ids.shape[0])
    block = tl.max(tl.where(place == slot, ids, -1), axis=0)
    chosen = block >= 0
    if not MERGE:
        earlier = (ids == block) & (place < slot)
        fresh = tl.max(earlier.to(tl.int32), axis=0) == 0
        chosen = chosen & fresh & (block < tl.cdiv(visible, BLOCK))
    block = tl.where(chosen, block, 0).to(tl.int32)
    first = step % CHUNKS * CHUNK
    count = tl.where(chosen, tl.minimum(visible - block * BLOCK, BLOCK) - first, 0)
    row, key = locate_block(page_table_ptr, max_pages, batch, k_start, block, num_pages, BLOCK, PAGED)
    return row, (key + first).to(tl.int64), count


@triton.jit
def find_codes(
    k_scale_ptr, v_scale_ptr, row, key, count, seqlen_k,
    GROUPS: tl.constexpr, CHUNK: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The codes of the scales of a step's keys and values; zeros if there are none, not SCALED."""
    column = tl.arange(0, CHUNK)
    vector = (row * GROUPS + tl.program_id(1)) * seqlen_k + key
    stored = (column < count) & SCALED
    k_codes = tl.load(k_scale_ptr + vector + column, mask=stored, other=0)
    return k_codes, tl.load(v_scale_ptr + vector + column, mask=stored, other=0)


@triton.jit
def store_id(ids_ptr, ids, slot):
    """Write the id in slot `slot` where it belongs in ascending order; -1 stay where they are, behind the others."""
    id = tl.max(tl.where(tl.arange(0, ids.shape[0]) == slot, ids, -1), axis=0)
    smaller = tl.sum(((ids >= 0) & (ids < id)).to(tl.int32), axis=0)
    tl.store(ids_ptr + tl.where(id >= 0, smaller, slot), id)


@triton.jit(do_not_specialize=LENGTHS)
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    block_indices_ptr,
    lists_ptr,
    sequences_ptr,
    tile_ends_ptr,
    page_table_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_ib,
    stride_ih,
    stride_is,
    stride_ik,
    num_sequences,
    seqlen_q,
    seqlen_k,
    max_pages,
    num_pages,
    num_splits,
    num_lists,
    scale,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    TABLE: tl.constexpr,
    SINGLE: tl.constexpr,
    MERGE: tl.constexpr,
    ASCENDING: tl.constexpr,
    MERGING: tl.constexpr,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """See the module's docstring. Grid (queries, GROUPS, splits); HEADS is G, and out and lse [B*Hq*Sq, splits, ..].

    With MERGE the choice is that of the lists, and block_indices, which are contiguous, are written.
    """
    await_previous(OVERLAP)
    sequence, offset = find_tile(tl.program_id(0), tile_ends_ptr, num_sequences, seqlen_q, 1, TABLE)
    if sequence >= num_sequences:
        return
    batch, q_start, q_end, k_start, k_end = load_sequence(sequences_ptr, sequence)
    group = tl.program_id(1).to(tl.int64)
    if MERGE:
        # Before the sequence is looked at, which then arrives meanwhile.
        lists = query_lists(lists_ptr, num_lists, Tile(sequence, offset), group, seqlen_q, GROUPS, SLOTS)
        ids = merge_lists(lists, num_lists, TOPK, MERGING)
        if ASCENDING:
            ids = sort_ids(ids)
    token = q_start + offset
    if token >= q_end:
        return
    visible = k_end - k_start - q_end + token + 1
    token = token.to(tl.int64)

    head = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    live = (head < HEADS)[:, None] & (depth < HEAD_DIM)[None, :]
    q_heads = (group * HEADS + head)[:, None] * stride_qh + depth.to(tl.int64)[None, :] * stride_qd
    q_ptrs = q_ptr + batch * stride_qb + token * stride_qs + q_heads
    if not SINGLE:
        q = tl.load(q_ptrs, mask=live, other=0.0)
    ids_ptr = block_indices_ptr + batch * stride_ib + group * stride_ih + token * stride_is

    CHUNKS: tl.constexpr = (BLOCK + CHUNK - 1) // CHUNK
    share = tl.cdiv(TOPK * CHUNKS, num_splits)
    begin = tl.program_id(2) * share
    precision: tl.constexpr = "ieee" if q_ptr.dtype.element_ty == tl.float32 else "tf32"
    acc = tl.zeros([ROWS, DEPTH], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    end = tl.where(visible > 0, tl.minimum(begin + share, TOPK * CHUNKS), begin)
    slot = tl.arange(0, SLOTS)
    if not MERGE:
        ids = tl.load(ids_ptr + slot * stride_ik, mask=slot < TOPK, other=-1)
    # Found a step ahead: what an address waits for would keep the loads of keys from running ahead. Codes are loaded
    # then as well, as bytes are not copied asynchronously.
    row, key, count = find_keys(
        ids, tl.minimum(begin, end - 1), visible, page_table_ptr, max_pages, num_pages, batch, k_start,
        BLOCK, CHUNK, PAGED, MERGE,
    )  # fmt: skip
    k_codes, v_codes = find_codes(k_scale_ptr, v_scale_ptr, row, key, count, seqlen_k, GROUPS, CHUNK, SCALED)
    for step in range(begin, end):
        if SINGLE:
            # The only step is at `begin`. What a loop loads from one place in all steps is loaded before it, and waited
            # for one by one; these three are asked for together.
            q = tl.load(q_ptrs + (step - begin) * stride_qs, mask=live, other=0.0)
            key += (step - begin) * CHUNK
        k = load_stored(
            k_ptr + row * stride_kb + group * stride_kh + key * stride_ks, count,
            stride_ks, stride_kd, q.dtype, CHUNK, HEAD_DIM, DEPTH, SCALED, NATIVE,
        )  # fmt: skip
        v = load_stored(
            v_ptr + row * stride_vb + group * stride_vh + key * stride_vs, count,
            stride_vs, stride_vd, q.dtype, CHUNK, HEAD_DIM, DEPTH, SCALED, NATIVE,
        )  # fmt: skip
        k_scales, v_scales = 1.0, 1.0
        if SCALED:
            k_scales, v_scales = decode_scales(k_codes)[None, :], decode_scales(v_codes)[None, :]
            if q.dtype == tl.float16:
                # Weights times scales may leave its range, values do not.
                v, v_scales = (v * tl.trans(v_scales)).to(q.dtype), 1.0
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * (scale * LOG2_E) * k_scales
        scores = tl.where((tl.arange(0, CHUNK) < count)[None, :], scores, float("-inf"))
        acc, row_max, row_sum = softmax_update(acc, row_max, row_sum, scores, v, v_scales)
        if not SINGLE:
            row, key, count = find_keys(
                ids, tl.minimum(step + 1, end - 1), visible, page_table_ptr, max_pages, num_pages, batch, k_start,
                BLOCK, CHUNK, PAGED, MERGE,
            )  # fmt: skip
            k_codes, v_codes = find_codes(k_scale_ptr, v_scale_ptr, row, key, count, seqlen_k, GROUPS, CHUNK, SCALED)

    seen = row_sum > 0.0
    total = tl.where(seen, row_sum, 1.0)
    lse = tl.where(seen, (row_max + tl.log2(total)) * LN_2, float("-inf"))
    query = (batch * GROUPS * HEADS + group * HEADS + head) * seqlen_q + token
    place = query * num_splits + tl.program_id(2)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    announce_next(OVERLAP)
    tl.store(out_ptr + place[:, None] * HEAD_DIM + depth[None, :], out, mask=live)
    tl.store(lse_ptr + place, lse, mask=head < HEADS)
    if MERGE:
        for slot in range(tl.cdiv(begin, CHUNKS), tl.minimum(tl.cdiv(begin + share, CHUNKS), TOPK)):
            store_id(ids_ptr, ids, slot)


def attend_constants(
    config: AttendConfig,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    block_size: int,
    topk: int,
    table: bool,
    lists: Lists | None = None,
) -> dict[str, int | bool | MergeConstants | None]:
    """The compile-time arguments of `attend_kernel`, beside those of `storage_constants`."""
    return {
        "GROUPS": num_kv_heads,
        "HEADS": group_size,
        "HEAD_DIM": head_dim,
        "TOPK": topk,
        "SLOTS": triton.next_power_of_2(topk) if lists is None else lists.kept,
        "BLOCK": block_size,
        "ROWS": padded(group_size),
        "CHUNK": config.chunk,
        "DEPTH": padded(head_dim),
        "TABLE": table,
        "SINGLE": config.num_splits == topk * triton.cdiv(block_size, config.chunk),
        "MERGE": lists is not None,
        # Programs that walk several blocks do so in one order: what neighbours share is then in L2.
        "ASCENDING": config.num_splits < topk,
        "MERGING": None if lists is None else lists.constants,
    }
