"""The merge of the lists that several programs have kept of one query's blocks (see `topk.store_topk`).

A list has `kept` keys, best first (see `topk` for keys). All lists of a query and group are neighbours in memory. Their
number is known at run time. Constants follow it in two variants only (`merge_constants`), so that a cache that grows
compiles at most twice.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import Launch, Options
from ..common.overlap import await_previous
from ..common.records import load_sequence
from ..common.target import target_of
from ..common.tiles import find_tile, tile_table
from .topk import (
    EMPTY_KEY,
    ID_MASK,
    ORDERED_NEG_INF,
    ascending_ids,
    ids_of,
    ids_place,
    key_scores,
    list_row,
    merge_bitonic,
)

# Keys of longer lists are too many to compare all pairs.
COMPARED = 64
# Up to so many lists take the first variant of constants.
FEW_LISTS = 64


class Lists(NamedTuple):
    """The lists that the splits of a selection have kept, taken by kernels as they are.

    keys: [sequences * Sq * Hkv, num_lists, kept] int64; max_lists: no call of this problem on this GPU has more lists
    per query.
    """

    keys: torch.Tensor
    num_lists: int
    kept: int
    max_lists: int

    @property
    def constants(self) -> "MergeConstants":
        """For `merge_lists`."""
        return merge_constants(self.kept, self.num_lists, self.max_lists)


@dataclass(frozen=True)
class MergeConstants:
    """Constants of `merge_lists`.

    kept: keys per list; heads: most lists, a power of two; group: neighbouring lists of which the best is compared
    first; lines: pairs of lists whose keys are compared at once, up to 128 keys.
    """

    kept: int
    heads: int
    group: int
    lines: int


@functools.lru_cache
def merge_constants(kept: int, num_lists: int, max_lists: int) -> MergeConstants:
    """The MergeConstants of one of two variants: up to FEW_LISTS lists, or up to max_lists, at least 128.

    A few lists take no longer for the bound of 64: that is 32 comparisons per thread, about 0.1 us. Long lists are
    merged one after the other, and have a single variant.
    """
    if kept > COMPARED:
        return MergeConstants(kept, 0, 0, 0)
    heads = FEW_LISTS if num_lists <= FEW_LISTS else max(128, triton.next_power_of_2(max(num_lists, max_lists)))
    return MergeConstants(kept, heads, heads // 64 if heads > 128 else 1, min(kept // 2, max(1, 128 // kept)))


class Places(NamedTuple):
    """Ranks of the best keys so far and of other keys, among all of them."""

    best: Any
    keys: Any


@triton.jit
def query_lists(lists_ptr, num_lists, tile, group, seqlen_q, num_kv_heads: tl.constexpr, kept: tl.constexpr):
    """Where the lists [num_lists, kept] of a query and group begin; tile: the query, as a Tile of one token."""
    return lists_ptr + list_row(tile.sequence, tile.number, group, seqlen_q, num_kv_heads) * num_lists * kept


@triton.jit
def block_ids(keys):
    """The blocks of keys, -1 for EMPTY_KEY."""
    return tl.where((keys >> 32) > ORDERED_NEG_INF, (keys & ID_MASK).to(tl.int32) ^ ID_MASK, -1)


@triton.jit
def places(best, keys):
    """The Places of best `[K]`, descending, and of keys `[N]`, in any order: how many come before each.

    All pairs are compared, at once: for few keys that takes less time than the many steps of a sort. Keys are distinct,
    but for EMPTY_KEY.
    """
    place = tl.sum((keys[:, None] > keys[None, :]).to(tl.int32), axis=0)
    place += tl.sum((best[:, None] > keys[None, :]).to(tl.int32), axis=0)
    ahead = tl.sum((keys[:, None] > best[None, :]).to(tl.int32), axis=0)
    return Places(tl.arange(0, best.shape[0]) + ahead, place)


@triton.jit
def at_place(place, x, count: tl.constexpr, nothing):
    """`[count]`: the entry of x `[N]` that has each place; nothing where no entry has it."""
    return tl.max(tl.where(place[:, None] == tl.arange(0, count)[None, :], x[:, None], nothing), axis=0)


@triton.jit
def keep_first(best, keys):
    """The K best of best `[K]`, descending, and of keys `[N]`, in any order; descending again."""
    K: tl.constexpr = best.shape[0]
    place = places(best, keys)
    return tl.maximum(at_place(place.keys, keys, K, EMPTY_KEY), at_place(place.best, best, K, EMPTY_KEY))


@triton.jit
def first_numbers(keys, count: tl.constexpr):
    """The numbers `[count]` of the largest of keys `[N]`, largest first; -1 for some that are EMPTY_KEY."""
    place = tl.sum((keys[:, None] > keys[None, :]).to(tl.int32), axis=0)
    return at_place(place, tl.arange(0, keys.shape[0]), count, -1)


@triton.jit
def best_splits(lists_ptr, num_lists, C: tl.constexpr):
    """The numbers `[kept]` of the lists whose best blocks are best, -1 for some without blocks.

    The candidates are the lists of the `kept` groups, of C.group neighbouring lists, that have the best blocks.
    """
    number = tl.arange(0, C.heads)
    heads = tl.load(lists_ptr + number * C.kept, mask=number < num_lists, other=EMPTY_KEY)
    if C.group == 1:
        return first_numbers(heads, C.kept)
    else:
        groups = first_numbers(tl.max(tl.reshape(heads, [C.heads // C.group, C.group]), axis=1), C.kept)
        members = tl.where(groups >= 0, groups, C.heads)[:, None] * C.group + tl.arange(0, C.group)[None, :]
        members = tl.reshape(members, [C.kept * C.group])
        heads = tl.load(lists_ptr + members * C.kept, mask=members < num_lists, other=EMPTY_KEY)
        number = first_numbers(heads, C.kept)
        return tl.where(number >= 0, tl.gather(members, tl.maximum(number, 0), axis=0), -1)


@triton.jit
def load_lines(lists_ptr, splits, num_lists, first, C: tl.constexpr):
    """Keys `[lines * kept]` of the lists `splits` `[kept]`, behind their best: those that can be among the kept best.

    Of the r-th list, from 0, these are kept - 1 - r, since r best blocks and its own before them are better. So lists r
    and kept - 2 - r have `kept` in all: they share line r.
    """
    place = tl.arange(0, C.lines * C.kept)
    line, column = first + place // C.kept, place % C.kept
    own = column < C.kept - 1 - line
    depth = tl.where(own, column + 1, column - (C.kept - 2 - line))
    # The list in the middle has no other.
    wanted = own | (line < C.kept // 2 - 1)
    split = tl.gather(splits, tl.where(own, line, C.kept - 2 - line), axis=0)
    wanted = wanted & (split >= 0) & (split < num_lists)
    return tl.load(lists_ptr + split * C.kept + depth, mask=wanted, other=EMPTY_KEY)


@triton.jit
def merge_lists(lists_ptr, num_lists, topk: tl.constexpr, C: tl.constexpr):
    """The best topk blocks, best first and then -1, `[kept]`, of a query's lists [num_lists, kept], each descending.

    They are in the `kept` lists whose best blocks are best.
    """
    splits = best_splits(lists_ptr, num_lists, C)
    best = tl.load(lists_ptr + splits * C.kept, mask=(splits >= 0) & (splits < num_lists), other=EMPTY_KEY)
    for first in range(0, C.kept // 2 - C.lines, C.lines):
        best = keep_first(best, load_lines(lists_ptr, splits, num_lists, first, C))
    keys = load_lines(lists_ptr, splits, num_lists, C.kept // 2 - C.lines, C)
    place = places(best, keys)
    ids = tl.maximum(
        at_place(place.keys, block_ids(keys), C.kept, -1), at_place(place.best, block_ids(best), C.kept, -1)
    )
    return tl.where(tl.arange(0, C.kept) < topk, ids, -1)


@triton.jit
def merge_keys(lists_ptr, num_lists, C: tl.constexpr):
    """The `kept` best keys, descending, of the lists of `merge_lists`."""
    splits = best_splits(lists_ptr, num_lists, C)
    best = tl.load(lists_ptr + splits * C.kept, mask=(splits >= 0) & (splits < num_lists), other=EMPTY_KEY)
    for first in range(0, C.kept // 2, C.lines):
        best = keep_first(best, load_lines(lists_ptr, splits, num_lists, first, C))
    return best


@triton.jit
def merge_long_lists(lists_ptr, num_lists, kept: tl.constexpr):
    """The `kept` best keys, descending, `[kept, 1]`, of a query's lists [num_lists, kept], each descending."""
    rank = tl.arange(0, kept)[:, None]
    best = tl.load(lists_ptr + rank)
    for number in range(1, num_lists):
        ascending = tl.load(lists_ptr + number * kept + kept - 1 - rank)
        best = merge_bitonic(tl.maximum(best, ascending), kept, 1)
    return best


@triton.jit
def sort_ids(ids):
    """ids `[kept]` in ascending order, -1 last."""
    known = tl.where(ids >= 0, ids, ID_MASK)
    return at_place(tl.sum((known[:, None] < known[None, :]).to(tl.int32), axis=0), ids, ids.shape[0], -1)


@dataclass(frozen=True)
class MergeKernelConstants:
    """Constants of `merge_kernel`; lists: its `heads` are 0 where lists are too long to compare all pairs of keys."""

    num_kv_heads: int
    topk: int
    lists: MergeConstants
    overlap: bool


@triton.jit
def merge_ids(lists_ptr, num_lists, ids_ptr, live, C: tl.constexpr):
    """Write the ids of one query and group, ascending, from its lists, if it is live; C: MergeKernelConstants."""
    # Triton 3.6 passes a field that is not a number to a function only if it has a name of its own.
    merging: tl.constexpr = C.lists
    kept: tl.constexpr = C.lists.kept
    if C.lists.heads > 0:
        ids = sort_ids(merge_lists(lists_ptr, num_lists, C.topk, merging))
        slot = tl.arange(0, kept)
    else:
        ids = ascending_ids(merge_long_lists(lists_ptr, num_lists, kept), C.topk)
        slot = tl.arange(0, kept)[:, None]
    tl.store(ids_ptr + slot, ids, mask=live & (slot < C.topk))


@triton.jit
def merge_kernel(lists, ids_to, scores_ptr, sequences_ptr, tiles, C: tl.constexpr):
    """ids of one query and group from its lists: ascending, or, with scores, the best first.

    Grid (queries, num_kv_heads).
    """
    await_previous(C.overlap)
    tile = find_tile(tl.program_id(0), tiles, 1)
    if tile.sequence >= tiles.num_sequences:
        return
    sequence = load_sequence(sequences_ptr, tile.sequence)
    # Triton 3.6 passes a field that is not a number to a function only if it has a name of its own.
    merging: tl.constexpr = C.lists
    kept: tl.constexpr = C.lists.kept
    group = tl.program_id(1)
    lists_ptr = query_lists(lists.keys, lists.num_lists, tile, group, tiles.seqlen_q, C.num_kv_heads, kept)
    token = sequence.q_start + tile.number
    # A branch would wait for the sequence before lists are loaded.
    live = token < sequence.q_end
    ids_ptr = ids_to.ptr + ids_place(ids_to, sequence.batch, group, token)
    if scores_ptr is None:
        merge_ids(lists_ptr, lists.num_lists, ids_ptr, live, C)
    else:
        if C.lists.heads > 0:
            keys = merge_keys(lists_ptr, lists.num_lists, merging)
            slot = tl.arange(0, kept)
        else:
            keys = merge_long_lists(lists_ptr, lists.num_lists, kept)
            slot = tl.arange(0, kept)[:, None]
        tl.store(ids_ptr + slot, block_ids(keys), mask=live & (slot < C.topk))
        row = (sequence.batch * C.num_kv_heads + group) * tiles.seqlen_q + token
        tl.store(scores_ptr + row * C.topk + slot, key_scores(keys), mask=live & (slot < C.topk))


def merge_splits(
    lists: Lists, block_indices: torch.Tensor, sequences: torch.Tensor, scores: torch.Tensor | None = None
) -> None:
    """Write block_indices [B, Hkv, Sq, topk] from the lists of `launch.rank_blocks`; with scores, the best first.

    block_indices may have any strides but the last, scores are contiguous.
    """
    batch, num_kv_heads, seqlen_q, topk = block_indices.shape
    tiles, num_queries = tile_table(sequences, batch, seqlen_q, 1)
    overlap = target_of(block_indices.device).overlaps
    results = {"ids_to": ids_of(block_indices), "scores_ptr": scores}
    arguments = {"lists": lists, **results, "sequences_ptr": sequences, "tiles": tiles}
    constants = MergeKernelConstants(num_kv_heads, topk, lists.constants, overlap)
    options = Options(num_warps=4, overlap=overlap)
    Launch(merge_kernel, (num_queries, num_kv_heads, 1), arguments, {"C": constants}, options).run()
