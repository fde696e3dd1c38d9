"""Attention of a few queries to the chosen blocks of a cache, contiguous or paged.

    out[i, h] = sum_j p_j v[j],  p = softmax(scale * <q[i, h], k[j]>)  over the visible keys j of the chosen blocks
    lse[i, h] = log sum_j exp(scale * <q[i, h], k[j]>)                 natural log, fp32

Layouts: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], any strides; block_indices [B, Hkv, Sq, topk] of integers, ids relative
to the query's sequence, where anything that is no visible block is skipped; out [B, Hq, Sq, D] in q's dtype, lse
[B, Hq, Sq] fp32, contiguous. Hq = G * Hkv, and the G heads of a group are neighbours. Sequences as in
`flexmsa.kernels`; keys outside them, and keys that the query does not see, are never read. With page_table [B,
max_pages], k and v are pages [num_pages, Hkv, block_size, D]. e4m3 keys and values are converted to q's dtype once
loaded; their scales [.., Hkv, Sk] are multiplied into the scores of the keys and the weights of the values.

Program (i, group, split) owns one query of one group, all G heads of it as the rows of its tile, and a share of the
topk chosen blocks, of which a step takes `columns` keys. With more than one split it writes a normalised partial
result, out and lse, [B*Hq*Sq, num_splits, D] and [B*Hq*Sq, num_splits] fp32, which `combine` weighs together.

Where the selection was split, the chosen blocks are those of its lists. Each program merges the lists of its query and
group for itself: a kernel for that, with its launch, its loads and its stores, takes 1 to 3 us more.

Cost: 2 Hkv topk block_size D elements of k and v are read per query: 4 MB at M3's shape in bf16, 1 us. The scoring
before it reads Sk Di elements, 60 us at 1M keys (see `selection`). The rest is latency: of the launches of append,
select and attend, of combine where the blocks are split, and of the loads that wait for each other.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...problem import Problem
from ..common.fp8 import decode_scales, load_stored
from ..common.overlap import announce_next, await_previous
from ..common.records import load_sequence, locate_block
from ..common.softmax import LN_2, LOG2_E, softmax_update
from ..common.target import Target, padded
from ..common.tiles import find_tile
from ..selection.merge import MergeConstants, merge_lists, query_lists, sort_ids
from .config import AttendConfig, num_steps


@dataclass(frozen=True)
class AttendConstants:
    """Constants of `attend_kernel`.

    group_size, rows: G, and G padded; head_dim, depth: D, and D padded; slots: topk padded, as are merged lists;
    columns: keys per step; single: each program has one step; merge: of the lists to merge, None where the ids are
    given; native: see `fp8`.
    """

    num_kv_heads: int
    group_size: int
    rows: int
    head_dim: int
    depth: int
    block_size: int
    topk: int
    slots: int
    columns: int
    single: bool
    merge: MergeConstants | None
    native: bool
    overlap: bool


class Results(NamedTuple):
    """Where out, a View [B, Hq, Sq, D] or of partial results [B, Hq, Sq, num_splits, D], and lse go.

    lse [B*Hq*Sq, num_splits] is contiguous, and so are partial results.
    """

    out: Any
    lse: Any
    num_splits: Any


class Step(NamedTuple):
    """The keys of a step: their row in the cache, the first of them, how many; 0 if there is no block to attend to.

    k_codes, v_codes: the codes of the scales of the keys and of the values.
    """

    row: Any
    key: Any
    count: Any
    k_codes: Any
    v_codes: Any


@triton.jit
def load_codes(scale_ptr, first, count, columns: tl.constexpr):
    """The codes [columns] of the scales of `count` vectors, from number `first` on; zeros without scales."""
    if scale_ptr is None:
        # None cannot be returned: Triton 3.6 makes tensors of all that is.
        return tl.zeros([columns], tl.uint8)
    else:
        column = tl.arange(0, columns)
        return tl.load(scale_ptr + first + column, mask=column < count, other=0)


@triton.jit
def find_step(ids, step, visible, sequence, pages, scales, merged: tl.constexpr, C: tl.constexpr):
    """The Step of that number.

    `ids` [slots] are all choices of the query. Ids that were not `merged` may be anything, and a block that is chosen
    twice is attended to once.
    """
    PARTS: tl.constexpr = (C.block_size + C.columns - 1) // C.columns
    slot = step // PARTS
    place = tl.arange(0, ids.shape[0])
    block = tl.max(tl.where(place == slot, ids, -1), axis=0)
    chosen = block >= 0
    if not merged:
        earlier = (ids == block) & (place < slot)
        fresh = tl.max(earlier.to(tl.int32), axis=0) == 0
        chosen = chosen & fresh & (block < tl.cdiv(visible, C.block_size))
    block = tl.where(chosen, block, 0).to(tl.int32)
    first = step % PARTS * C.columns
    count = tl.where(chosen, tl.minimum(visible - block * C.block_size, C.block_size) - first, 0)
    place = locate_block(pages, sequence.batch, sequence.k_start, block, C.block_size)
    key = (place.key + first).to(tl.int64)
    number = (place.row * C.num_kv_heads + tl.program_id(1)) * scales.seqlen_k + key
    k_codes = load_codes(scales.k, number, count, C.columns)
    return Step(place.row, key, count, k_codes, load_codes(scales.v, number, count, C.columns))


@triton.jit
def load_step(x, step, group, dtype: tl.constexpr, C: tl.constexpr):
    """The keys or values [columns, depth] of a Step from their View, e4m3 numbers without their scales."""
    base = x.ptr + step.row * x.stride_b + group * x.stride_h + step.key * x.stride_s
    return load_stored(base, step.count, x.stride_s, x.stride_d, dtype, C.columns, C.head_dim, C.depth, C.native)


@triton.jit
def store_id(ids_ptr, ids, slot):
    """Write the id of slot `slot` at its place in ascending order; -1 stay at theirs, after the others."""
    id = tl.max(tl.where(tl.arange(0, ids.shape[0]) == slot, ids, -1), axis=0)
    smaller = tl.sum(((ids >= 0) & (ids < id)).to(tl.int32), axis=0)
    tl.store(ids_ptr + tl.where(id >= 0, smaller, slot), id)


@triton.jit
def attend_step(acc, row_max, row_sum, heads, keys, values, step, group, scale, scaled: tl.constexpr, C: tl.constexpr):
    """The state of `softmax_update` after a Step, for the query heads [rows, depth]."""
    dtype: tl.constexpr = heads.dtype
    precision: tl.constexpr = "ieee" if dtype == tl.float32 else "tf32"
    k = load_step(keys, step, group, dtype, C)
    v = load_step(values, step, group, dtype, C)
    k_scales, v_scales = 1.0, 1.0
    if scaled:
        k_scales, v_scales = decode_scales(step.k_codes)[None, :], decode_scales(step.v_codes)[None, :]
        if dtype == tl.float16:
            # Weights times scales may exceed the range of fp16, values do not.
            v, v_scales = (v * tl.trans(v_scales)).to(dtype), 1.0
    scores = tl.dot(heads, tl.trans(k), input_precision=precision) * (scale * LOG2_E) * k_scales
    scores = tl.where((tl.arange(0, C.columns) < step.count)[None, :], scores, float("-inf"))
    return softmax_update(acc, row_max, row_sum, scores, v, v_scales)


@triton.jit
def store_results(results, acc, row_max, row_sum, batch, group, token, seqlen_q, C: tl.constexpr):
    """Write out and lse of a query's heads, or of a split of them, from the state of `softmax_update`."""
    head, depth = tl.arange(0, acc.shape[0]), tl.arange(0, acc.shape[1])
    live = (head < C.group_size)[:, None] & (depth < C.head_dim)[None, :]
    # A sum that is NaN is no zero: such a row sees keys.
    seen = row_sum != 0.0
    total = tl.where(seen, row_sum, 1.0)
    lse = tl.where(seen, (row_max + tl.log2(total)) * LN_2, float("-inf"))
    number = group * C.group_size + head
    place = (batch * C.num_kv_heads * C.group_size + number) * seqlen_q + token
    to = results.out
    out_ptr = to.ptr + batch * to.stride_b + token * to.stride_s + tl.program_id(2) * C.head_dim
    out = (acc / total[:, None]).to(to.ptr.dtype.element_ty)
    announce_next(C.overlap)
    tl.store(out_ptr + number[:, None] * to.stride_h + depth[None, :], out, mask=live)
    tl.store(results.lse + place * results.num_splits + tl.program_id(2), lse, mask=head < C.group_size)


@triton.jit
def attend_kernel(
    q, keys, values, scales, pages, ids_view, lists, sequences_ptr, tiles, results, scale, C: tl.constexpr
):
    """See the module's docstring. Grid (queries, num_kv_heads, num_splits).

    lists: of `selection.merge`, None where the ids are given. Views are arguments of their own: inside a record that
    does not end with a constant, Triton 3.6 forgets their constant stride at a return.
    """
    await_previous(C.overlap)
    tile = find_tile(tl.program_id(0), tiles, 1)
    if tile.sequence >= tiles.num_sequences:
        return
    sequence = load_sequence(sequences_ptr, tile.sequence)
    group = tl.program_id(1).to(tl.int64)
    num_splits = results.num_splits
    merged: tl.constexpr = lists is not None
    scaled: tl.constexpr = scales.k is not None
    if merged:
        # The sequence arrives during the merge, and is not needed for it.
        # Triton 3.6 passes a field that is not a number to a function only if it has a name of its own.
        merge: tl.constexpr = C.merge
        lists_ptr = query_lists(lists.keys, lists.num_lists, tile, group, tiles.seqlen_q, C.num_kv_heads, C.slots)
        ids = merge_lists(lists_ptr, lists.num_lists, C.topk, merge)
        if not C.single and num_splits < C.topk:
            # Programs with several blocks take them in ascending order: blocks that neighbours share are then in L2.
            ids = sort_ids(ids)
    token = sequence.q_start + tile.number
    if token >= sequence.q_end:
        return
    visible = sequence.k_end - sequence.k_start - sequence.q_end + token + 1
    token = token.to(tl.int64)

    ROWS: tl.constexpr = C.rows
    DEPTH: tl.constexpr = C.depth
    head = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    live = (head < C.group_size)[:, None] & (depth < C.head_dim)[None, :]
    q_heads = (group * C.group_size + head)[:, None] * q.stride_h + depth.to(tl.int64)[None, :] * q.stride_d
    q_ptrs = q.ptr + sequence.batch * q.stride_b + token * q.stride_s + q_heads
    if not C.single:
        heads = tl.load(q_ptrs, mask=live, other=0.0)
    ids_ptr = ids_view.ptr + sequence.batch * ids_view.stride_b + group * ids_view.stride_h + token * ids_view.stride_s

    PARTS: tl.constexpr = (C.block_size + C.columns - 1) // C.columns
    share = tl.cdiv(C.topk * PARTS, num_splits)
    begin = tl.program_id(2) * share
    acc = tl.zeros([ROWS, DEPTH], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    end = tl.where(visible > 0, tl.minimum(begin + share, C.topk * PARTS), begin)
    if not merged:
        slot = tl.arange(0, C.slots)
        ids = tl.load(ids_ptr + slot.to(tl.int64) * ids_view.stride_d, mask=slot < C.topk, other=-1)
    # Steps are found one ahead: an address that waits for a load would keep loads of keys from running ahead. Codes are
    # loaded then as well, because bytes are not copied asynchronously.
    at = find_step(ids, tl.minimum(begin, end - 1), visible, sequence, pages, scales, merged, C)
    for step in range(begin, end):
        now = at
        if C.single:
            # The only step is at `begin`. Loads that do not depend on the step would be moved before the loop, and
            # waited for one by one; these three are issued together.
            heads = tl.load(q_ptrs + (step - begin) * q.stride_s, mask=live, other=0.0)
            now = Step(at.row, at.key + (step - begin) * C.columns, at.count, at.k_codes, at.v_codes)
        acc, row_max, row_sum = attend_step(acc, row_max, row_sum, heads, keys, values, now, group, scale, scaled, C)
        if not C.single:
            at = find_step(ids, tl.minimum(step + 1, end - 1), visible, sequence, pages, scales, merged, C)

    store_results(results, acc, row_max, row_sum, sequence.batch, group, token, tiles.seqlen_q, C)
    if merged:
        for slot in range(tl.cdiv(begin, PARTS), tl.minimum(tl.cdiv(begin + share, PARTS), C.topk)):
            store_id(ids_ptr, ids, slot)


@functools.lru_cache
def attend_constants(
    problem: Problem, target: Target, config: AttendConfig, merge: MergeConstants | None
) -> AttendConstants:
    """Constants of `attend_kernel`; merge: None where the ids are given."""
    topk = problem.topk or 1
    return AttendConstants(
        num_kv_heads=problem.num_kv_heads,
        group_size=problem.group_size,
        rows=padded(problem.group_size),
        head_dim=problem.head_dim,
        depth=padded(problem.head_dim),
        block_size=problem.block_size,
        topk=topk,
        slots=triton.next_power_of_2(topk) if merge is None else merge.kept,
        columns=config.columns,
        single=config.num_splits == num_steps(problem, config.columns),
        merge=merge,
        native=problem.scaled and target.has_e4m3,
        overlap=target.overlaps,
    )
