"""The top-k of each query row, kept in registers: lists that blocks are inserted into, or tiles of packed keys.

A list (`TopkLists`) has one tensor [rows] per place: for a few rows, or for one row per thread. A tile (`TopkTile`)
takes any number of places and rows. In tiles and in memory a block is one int64, so that sorting and ties need no
second tensor:

    key = ordered(score) << 32 | (2^31 - 1 - id)

`ordered` maps fp32 to int32 monotonically, so a larger key is a better score and, among equal scores, the smaller
id. `-inf` marks a block that may not be chosen and `+inf` a forced one: scores proper are clamped to the finite
range. Tiles of keys are `[K, R]`, one column per query row, because Triton then gives all K keys of a row to one
thread, if there are rows enough, and a sorting network along K moves nothing between threads.
"""

# Kernels let tuples grow, which is another type to mypy each time.
# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

FLT_MAX = tl.constexpr(3.4028234663852886e38)
ID_MASK = tl.constexpr(0x7FFFFFFF)
ORDERED_NEG_INF = tl.constexpr(-2139095041)
EMPTY_KEY = tl.constexpr(-2139095041 << 32)


class TopkLists(NamedTuple):
    """The best blocks of each row, best first: `kept` scores and ids, tuples of [rows]."""

    scores: Any
    ids: Any


class TopkTile(NamedTuple):
    """The best blocks of each row as packed keys, descending, and blocks that are still to be merged into them.

    keys [kept, rows]; fresh [period, rows]: the scores of the current period's blocks; worst [rows]: the score that a
    new block has to beat.
    """

    keys: Any
    fresh: Any
    worst: Any


class Ids(NamedTuple):
    """block_indices [B, Hkv, Sq, topk] int32 and its strides, but for the last, which is 1.

    Kernels are not compiled for these strides, other than for those of a View.
    """

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_s: Any


def ids_of(block_indices: torch.Tensor) -> Ids:
    """The Ids of block_indices; a row of a batch alone, however large it is, has a stride that fits 32 bits."""
    stride_b, stride_h, stride_s, _ = block_indices.stride()
    return Ids(block_indices, stride_b if block_indices.shape[0] > 1 else 0, stride_h, stride_s)


class Outputs(NamedTuple):
    """Where the top-k goes: `Ids`, or, if not None, lists [sequences * Sq * Hkv, num_splits, kept]."""

    ids: Any
    lists_ptr: Any
    num_splits: Any


@triton.constexpr_function
def log2(power_of_two):
    """The exponent of a power of two, at compile time."""
    return power_of_two.bit_length() - 1


@triton.jit
def pack_keys(scores, ids):
    """Sortable int64 keys of fp32 `scores` and int32 `ids` (one shape). -0.0 ties with 0.0."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & ID_MASK)
    return (ordered.to(tl.int64) << 32) | (ids ^ ID_MASK).to(tl.int64)


@triton.jit
def key_scores(keys):
    """The fp32 scores of packed keys."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & ID_MASK)).to(tl.float32, bitcast=True)


@triton.jit
def exchange(x, span: tl.constexpr, stride: tl.constexpr, descending):
    """Order the pairs of x `[N, R]` that lie stride rows apart: one layer of a bitonic network.

    Runs of span rows alternate between the given order and its reverse, as the next wider layer needs.
    `descending` is 0 or 1, or an int32 tensor [1, 1, 1, R] of them.
    """
    N: tl.constexpr = x.shape[0]
    R: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, [N // (2 * stride), 2, stride, R])
    upper = tl.max(pairs, axis=1, keep_dims=True)
    lower = tl.min(pairs, axis=1, keep_dims=True)
    second = tl.arange(0, 2)[None, :, None, None]
    reverse = (tl.arange(0, N // (2 * stride)) // (span // (2 * stride)) % 2)[:, None, None, None]
    take_upper = second ^ reverse ^ descending
    return tl.reshape(tl.where(take_upper == 1, upper, lower), [N, R])


@triton.jit
def merge_bitonic(x, span: tl.constexpr, descending):
    """Sort each bitonic run of span rows of x `[N, R]`, every second run in reverse order."""
    STEPS: tl.constexpr = log2(span)
    for step in tl.static_range(STEPS):
        x = exchange(x, span, span >> (step + 1), descending)
    return x


@triton.jit
def sort_columns(x, descending: tl.constexpr):
    """Sort x `[N, R]` along N."""
    STEPS: tl.constexpr = log2(x.shape[0])
    for step in tl.static_range(STEPS):
        x = merge_bitonic(x, 2 << step, descending)
    return x


@triton.jit
def keep_best(kept, fresh, first_id):
    """Merge new block scores into the kept keys of each column.

    kept `[K, R]` keys, descending; fresh `[P, R]` fp32, P <= K, row p being block `first_id + p`. A bitonic half
    merge: kept against reversed fresh, the larger of each pair, sorted again.
    """
    K: tl.constexpr = kept.shape[0]
    P: tl.constexpr = fresh.shape[0]
    R: tl.constexpr = kept.shape[1]
    keys = sort_columns(pack_keys(fresh, first_id + tl.arange(0, P)[:, None]), 0)
    runs = tl.reshape(kept, [K // P, P, R])
    last = (tl.arange(0, K // P) == K // P - 1)[:, None, None]
    best = tl.where(last, tl.maximum(runs, keys[None, :, :]), runs)
    return merge_bitonic(tl.reshape(best, [K, R]), K, 1)


@triton.jit
def worst_kept(kept):
    """The score `[R]` that a new block has to beat: that of the last key of kept `[K, R]`."""
    return key_scores(tl.min(kept, axis=0))


@triton.jit
def ascending_ids(kept, topk):
    """Block ids `[K, R]` of the first `topk` keys of each column, ascending, -1 after the last."""
    rank = tl.arange(0, kept.shape[0])[:, None]
    chosen = ((kept >> 32) > ORDERED_NEG_INF) & (rank < topk)
    ids = tl.where(chosen, (kept & ID_MASK).to(tl.int32) ^ ID_MASK, ID_MASK)
    ids = sort_columns(ids, 0)
    return tl.where(ids == ID_MASK, -1, ids)


@triton.jit
def first_blocks(first, visible, C: tl.constexpr):
    """The TopkLists of the first `first` blocks, of those that a row sees; visible [rows] in keys.

    Places without a block have the score -inf and the id ID_MASK.
    """
    kept: tl.constexpr = C.kept
    scores = ()
    ids = ()
    for rank in tl.static_range(kept):
        given = (rank < first) & (rank * C.block_size < visible)
        scores += (tl.where(given, float("inf"), float("-inf")),)
        ids += (tl.where(given, rank, ID_MASK),)
    return TopkLists(scores, ids)


@triton.jit
def insert_block(lists, score, id):
    """The TopkLists with one more block in its place and without their last.

    score [rows], id [rows] or one number. A block goes behind those that score the same, and nowhere with -inf.
    """
    scores = ()
    ids = ()
    moved = score
    for rank in tl.static_range(len(lists.scores)):
        before = score > lists.scores[rank]
        scores += (tl.maximum(moved, lists.scores[rank]),)
        ids += (tl.where(before, id, lists.ids[rank]),)
        moved, id = tl.minimum(moved, lists.scores[rank]), tl.where(before, lists.ids[rank], id)
    return TopkLists(scores, ids)


@triton.jit
def ascending(ids, count: tl.constexpr):
    """The first `count` of a tuple of [rows], each row sorted."""
    found = ()
    for rank in tl.static_range(count):
        id = ids[rank]
        longer = ()
        for place in tl.static_range(rank):
            longer += (tl.minimum(id, found[place]),)
            id = tl.maximum(id, found[place])
        longer += (id,)
        found = longer
    return found


@triton.jit
def start_topk(first, visible, C: tl.constexpr):
    """The top-k of the first `first` blocks, of those that a row sees; visible [rows] in keys.

    With a period of 1 these are TopkLists, which are short enough for a thread to hold; else a TopkTile.
    """
    if C.period == 1:
        return first_blocks(first, visible, C)
    else:
        rank = tl.arange(0, C.kept)[:, None]
        given = (rank < first) & (rank * C.block_size < visible[None, :])
        keys = tl.where(given, pack_keys(tl.where(given, float("inf"), 0.0), rank), EMPTY_KEY)
        return TopkTile(keys, tl.full([C.period, visible.shape[0]], float("-inf"), tl.float32), worst_kept(keys))


@triton.jit
def collect(topk, best, block, flush, C: tl.constexpr):
    """The top-k with block's maxima `best` [rows]; a period's are merged when it is full, or when told to flush."""
    if C.period == 1:
        return insert_block(topk, best, block)
    else:
        keys, worst = topk.keys, topk.worst
        slot = block % C.period
        fresh = tl.where(tl.arange(0, C.period)[:, None] == slot, best[None, :], topk.fresh)
        if (slot == C.period - 1) | flush:
            if tl.max((tl.max(fresh, axis=0) > worst).to(tl.int32), axis=0) > 0:
                keys = keep_best(keys, fresh, block - slot)
                worst = worst_kept(keys)
            fresh = tl.full(fresh.shape, float("-inf"), tl.float32)
        return TopkTile(keys, fresh, worst)


@triton.jit
def list_row(sequence, offset, group, seqlen_q, num_kv_heads: tl.constexpr):
    """The row of lists of the offset-th query of a sequence, and of a group: known before anything is loaded."""
    return (sequence.to(tl.int64) * seqlen_q + offset) * num_kv_heads + group


@triton.jit
def ids_place(ids, batch, group, token):
    """Where the ids of queries and groups begin, in elements; int64."""
    batch, group, token = tl.cast(batch, tl.int64), tl.cast(group, tl.int64), tl.cast(token, tl.int64)
    return batch * ids.stride_b + group * ids.stride_h + token * ids.stride_s


@triton.jit
def store_topk(topk, outputs, ids_row, lists_row, live, C: tl.constexpr):
    """Write each live row's ids, ascending, to where `ids_place` says; or, to lists, its kept keys, descending."""
    count: tl.constexpr = C.topk
    kept: tl.constexpr = C.kept
    place = ids_row
    if outputs.lists_ptr is not None:
        place = (lists_row * outputs.num_splits + tl.program_id(1)) * C.kept
    if C.period == 1:
        if outputs.lists_ptr is None:
            ids = ascending(topk.ids, count)
            for rank in tl.static_range(count):
                tl.store(outputs.ids.ptr + place + rank, tl.where(ids[rank] == ID_MASK, -1, ids[rank]), mask=live)
        else:
            for rank in tl.static_range(kept):
                tl.store(outputs.lists_ptr + place + rank, pack_keys(topk.scores[rank], topk.ids[rank]), mask=live)
    else:
        rank = tl.arange(0, C.kept)[:, None]
        if outputs.lists_ptr is None:
            ids = ascending_ids(topk.keys, C.topk)
            tl.store(outputs.ids.ptr + place[None, :] + rank, ids, mask=live[None, :] & (rank < C.topk))
        else:
            tl.store(outputs.lists_ptr + place[None, :] + rank, topk.keys, mask=live[None, :])
