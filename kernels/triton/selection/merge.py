"""The merge of the lists that several programs have kept of one query row's blocks (see `ranking.store_ranking`)."""

import torch
import triton
import triton.language as tl

from ..common.primitives import await_previous, find_tile, load_sequence, tile_ends
from ..common.target import Target
from .topk import EMPTY_KEY, ID_MASK, ORDERED_NEG_INF, ascending_ids, list_row, merge_bitonic

# Keys of longer lists are too many to compare all pairs.
COMPARED = tl.constexpr(64)


@triton.jit
def query_lists(lists_ptr, sequence, offset, group, seqlen_q, num_lists, GROUPS: tl.constexpr, KEPT: tl.constexpr):
    """Where the lists [num_lists, KEPT] of a query and group are, the offset-th of its sequence."""
    return lists_ptr + list_row(sequence, offset, group, seqlen_q, GROUPS) * num_lists * KEPT


@triton.jit
def block_ids(keys):
    """The blocks of keys, -1 for EMPTY_KEY."""
    return tl.where((keys >> 32) > ORDERED_NEG_INF, (keys & ID_MASK).to(tl.int32) ^ ID_MASK, -1)


@triton.jit
def places(best, keys):
    """How many of best `[K]`, descending, and keys `[N]`, in any order, come before each of keys, and of best.

    All pairs are compared, at once: few keys take less time so than in the many steps of a sort. Keys are distinct, but
    for EMPTY_KEY.
    """
    place = tl.sum((keys[:, None] > keys[None, :]).to(tl.int32), axis=0)
    place += tl.sum((best[:, None] > keys[None, :]).to(tl.int32), axis=0)
    return place, tl.arange(0, best.shape[0]) + tl.sum((keys[:, None] > best[None, :]).to(tl.int32), axis=0)


@triton.jit
def at_place(place, x, COUNT: tl.constexpr, nothing):
    """`[COUNT]`: of x `[N]`, what has that place; nothing where there is none."""
    return tl.max(tl.where(place[:, None] == tl.arange(0, COUNT)[None, :], x[:, None], nothing), axis=0)


@triton.jit
def keep_first(best, keys):
    """The K first of best `[K]`, descending, and of keys `[N]`, in any order; descending again."""
    K: tl.constexpr = best.shape[0]
    place, best_place = places(best, keys)
    return tl.maximum(at_place(place, keys, K, EMPTY_KEY), at_place(best_place, best, K, EMPTY_KEY))


@triton.jit
def first_numbers(keys, COUNT: tl.constexpr):
    """The numbers `[COUNT]` of the largest of keys `[N]`, largest first; -1 for some that are EMPTY_KEY."""
    place = tl.sum((keys[:, None] > keys[None, :]).to(tl.int32), axis=0)
    return at_place(place, tl.arange(0, keys.shape[0]), COUNT, -1)


@triton.jit
def best_splits(lists_ptr, num_lists, KEPT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr):
    """The numbers `[KEPT]` of the lists whose best blocks are best, -1 for some without blocks.

    They are looked for in the KEPT groups, of GROUP neighbouring lists, that have the best ones.
    """
    number = tl.arange(0, HEADS)
    heads = tl.load(lists_ptr + number * KEPT, mask=number < num_lists, other=EMPTY_KEY)
    if GROUP == 1:
        return first_numbers(heads, KEPT)
    else:
        groups = first_numbers(tl.max(tl.reshape(heads, [HEADS // GROUP, GROUP]), axis=1), KEPT)
        members = tl.where(groups >= 0, groups, HEADS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        members = tl.reshape(members, [KEPT * GROUP])
        heads = tl.load(lists_ptr + members * KEPT, mask=members < num_lists, other=EMPTY_KEY)
        number = first_numbers(heads, KEPT)
        return tl.where(number >= 0, tl.gather(members, tl.maximum(number, 0), axis=0), -1)


@triton.jit
def load_lines(lists_ptr, splits, num_lists, first, KEPT: tl.constexpr, LINES: tl.constexpr):
    """Keys `[LINES * KEPT]` of the lists `splits` `[KEPT]`, behind their best: those that can be among the KEPT best.

    Of the r-th list, from 0, these are KEPT - 1 - r, since r best blocks and its own before them are better. So lists r
    and KEPT - 2 - r have KEPT in all: they share line r.
    """
    place = tl.arange(0, LINES * KEPT)
    line, column = first + place // KEPT, place % KEPT
    own = column < KEPT - 1 - line
    depth = tl.where(own, column + 1, column - (KEPT - 2 - line))
    # The list in the middle has no other.
    wanted = own | (line < KEPT // 2 - 1)
    split = tl.gather(splits, tl.where(own, line, KEPT - 2 - line), axis=0)
    wanted = wanted & (split >= 0) & (split < num_lists)
    return tl.load(lists_ptr + split * KEPT + depth, mask=wanted, other=EMPTY_KEY)


@triton.jit
def merge_lists(
    lists_ptr, num_lists,
    TOPK: tl.constexpr, KEPT: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """The best TOPK blocks, best first and then -1, `[KEPT]`, of a query's lists [num_lists, KEPT], each descending.

    They are in the KEPT lists whose best blocks are best.
    """
    splits = best_splits(lists_ptr, num_lists, KEPT, HEADS, GROUP)
    best = tl.load(lists_ptr + splits * KEPT, mask=(splits >= 0) & (splits < num_lists), other=EMPTY_KEY)
    for first in range(0, KEPT // 2 - LINES, LINES):
        best = keep_first(best, load_lines(lists_ptr, splits, num_lists, first, KEPT, LINES))
    keys = load_lines(lists_ptr, splits, num_lists, KEPT // 2 - LINES, KEPT, LINES)
    place, best_place = places(best, keys)
    ids = tl.maximum(at_place(place, block_ids(keys), KEPT, -1), at_place(best_place, block_ids(best), KEPT, -1))
    return tl.where(tl.arange(0, KEPT) < TOPK, ids, -1)


@triton.jit
def merge_long_lists(lists_ptr, num_lists, KEPT: tl.constexpr):
    """The KEPT best keys, descending, `[KEPT, 1]`, of a query's lists [num_lists, KEPT], each descending."""
    rank = tl.arange(0, KEPT)[:, None]
    best = tl.load(lists_ptr + rank)
    for number in range(1, num_lists):
        ascending = tl.load(lists_ptr + number * KEPT + KEPT - 1 - rank)
        best = merge_bitonic(tl.maximum(best, ascending), KEPT, 1)
    return best


@triton.jit
def sort_ids(ids):
    """ids `[KEPT]` in ascending order, -1 last."""
    known = tl.where(ids >= 0, ids, ID_MASK)
    return at_place(tl.sum((known[:, None] < known[None, :]).to(tl.int32), axis=0), ids, ids.shape[0], -1)


@triton.jit(do_not_specialize=["num_sequences", "seqlen_q", "num_lists"])
def merge_kernel(
    lists_ptr,
    ids_ptr,
    sequences_ptr,
    tile_ends_ptr,
    num_sequences,
    seqlen_q,
    num_lists,
    GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    TABLE: tl.constexpr,
    KEPT: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    LINES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ids of one query and group, ascending, from its lists. Grid (queries, GROUPS)."""
    await_previous(OVERLAP)
    sequence, offset = find_tile(tl.program_id(0), tile_ends_ptr, num_sequences, seqlen_q, 1, TABLE)
    if sequence >= num_sequences:
        return
    batch, q_start, q_end, _, _ = load_sequence(sequences_ptr, sequence)
    lists = query_lists(lists_ptr, sequence, offset, tl.program_id(1), seqlen_q, num_lists, GROUPS, KEPT)
    if KEPT > COMPARED:
        ids = ascending_ids(merge_long_lists(lists, num_lists, KEPT), TOPK)
        slot = tl.arange(0, KEPT)[:, None]
    else:
        ids = sort_ids(merge_lists(lists, num_lists, TOPK, KEPT, HEADS, GROUP, LINES))
        slot = tl.arange(0, KEPT)
    if q_start + offset < q_end:
        row = (batch * GROUPS + tl.program_id(1)) * seqlen_q + q_start + offset
        tl.store(ids_ptr + row * TOPK + slot, ids, mask=slot < TOPK)


def merge_constants(kept: int, num_lists: int) -> dict[str, int]:
    """The compile-time arguments of `merge_lists`: up to 128 keys are compared at once."""
    heads = triton.next_power_of_2(num_lists)
    group = heads // 64 if heads > 128 else 1
    return {"KEPT": kept, "HEADS": heads, "GROUP": group, "LINES": min(kept // 2, max(1, 128 // kept))}


def merge_splits(lists: torch.Tensor, block_indices: torch.Tensor, sequences: torch.Tensor, target: Target) -> None:
    """Write block_indices [B, Hkv, Sq, topk] from the lists of `selection.rank_blocks`."""
    batch, num_kv_heads, seqlen_q, topk = block_indices.shape
    ends, num_queries, table = tile_ends(sequences, batch, seqlen_q, 1)
    merge_kernel[(num_queries, num_kv_heads)](
        lists,
        block_indices,
        sequences,
        ends,
        sequences.shape[0],
        seqlen_q,
        lists.shape[1],
        GROUPS=num_kv_heads,
        TOPK=topk,
        TABLE=table,
        **merge_constants(lists.shape[2], lists.shape[1]),
        **target.overlap(),
        num_warps=4,
    )
