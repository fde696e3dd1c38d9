"""Which tiles of neighbouring tokens walk the union of their tokens' blocks (see `walk`), and those unions.

In trained models neighbours choose much the same blocks. `choose_tiles` finds the union of every tile, sorted, with a
bit for each token that chose the block; a tile whose union is longer than `walk_limit` is left to the KV-outer order,
and its list is never used. The choice is made on the device, tile by tile, and is a function of block_indices alone.

A block of the walk costs 4 T G Bk D FLOPs whether all tokens chose the block or one. So it pays while the union is less
than about 2 topk: on an H200 a block more in every union costs 1 ms at 128K tokens of M3's shape, and topk blocks a
token in KV-outer order 34 ms, whatever the union.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.primitives import find_tile, load_sequence, tile_ends
from .config import ForwardConfig

NO_BLOCK = tl.constexpr(0x7FFFFFFF)


class Walk(NamedTuple):
    """One tile's row of walks; see `Tiles`."""

    length: Any
    num_whole: Any
    batch: Any
    first: Any
    stop: Any
    k_start: Any
    num_keys: Any
    shift: Any


@triton.jit
def load_walk(walks_ptr, number):
    """The Walk of a tile and group."""
    row = walks_ptr + number * 8
    length, num_whole, batch, first = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    stop, k_start, num_keys, shift = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    return Walk(length, num_whole, batch, first, stop, k_start, num_keys, shift)


@triton.jit
def join_members(block_a, members_a, block_b, members_b):
    """Segmented or: the members of equal neighbouring blocks together."""
    return block_b, tl.where(block_a == block_b, members_a | members_b, members_b)


@triton.jit
def union_kernel(
    ids_ptr,
    sequences_ptr,
    tile_ends_ptr,
    list_ptr,
    members_ptr,
    walks_ptr,
    skip_ptr,
    stride_ib,
    stride_ih,
    stride_is,
    stride_ik,
    num_sequences,
    num_tiles,
    seqlen_q,
    num_tokens,
    limit,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The union of one tile and group: list, members [limit], and its row of walks; see `Tiles`.

    The length is 0, and skip of the tile's tokens too, if the union is longer than `limit`.
    """
    number = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    sequence, tile = find_tile(number, tile_ends_ptr, num_sequences, seqlen_q, TOKENS, TABLE)
    if sequence >= num_sequences:
        return
    batch, q_start, q_end, k_start, k_end = load_sequence(sequences_ptr, sequence)
    first = q_start + tile * TOKENS
    if first >= q_end:
        return
    place = tl.arange(0, ROWS * SLOTS)
    row, slot = place // SLOTS, place % SLOTS
    query = first + row
    live = (row < TOKENS) & (query < q_end)
    ids_row = ids_ptr + batch * stride_ib + group * stride_ih + query.to(tl.int64) * stride_is
    ids = tl.load(ids_row + slot.to(tl.int64) * stride_ik, mask=live & (slot < TOPK), other=-1).to(tl.int64)
    seen = (ids >= 0) & (ids * BLOCK < k_end - q_end + query + 1 - k_start)
    ordered = tl.sort(tl.where(seen, ids, NO_BLOCK) * 64 + row)
    block, member = (ordered // 64).to(tl.int32), tl.full([ROWS * SLOTS], 1, tl.int64) << (ordered % 64)
    before = tl.gather(block, tl.maximum(place - 1, 0), axis=0)
    fresh = (block != NO_BLOCK) & ((block != before) | (place == 0))
    _, members = tl.associative_scan((block, member), axis=0, combine_fn=join_members, reverse=True)
    length = tl.sum(fresh.to(tl.int32), axis=0)
    rank = tl.cumsum(fresh.to(tl.int32), axis=0) - 1
    length = tl.where(length <= limit, length, 0)
    whole = fresh & ((block.to(tl.int64) + 1) * BLOCK <= k_end - q_end + first + 1 - k_start)
    num_whole = tl.sum(whole.to(tl.int32), axis=0)
    union = group * num_tiles + number
    tl.store(list_ptr + union * limit + rank, block, mask=fresh & (rank < length))
    tl.store(members_ptr + union * limit + rank, members, mask=fresh & (rank < length))
    walk = walks_ptr + union * 8
    tl.store(walk, length)
    tl.store(walk + 1, tl.where(length > 0, num_whole, 0))
    tl.store(walk + 2, batch.to(tl.int32))
    tl.store(walk + 3, first)
    tl.store(walk + 4, tl.minimum(first + TOKENS, q_end))
    tl.store(walk + 5, k_start)
    tl.store(walk + 6, k_end - k_start)
    tl.store(walk + 7, k_end - q_end - k_start)
    token = batch * seqlen_q + first + tl.arange(0, ROWS)
    inside = (tl.arange(0, ROWS) < TOKENS) & (first + tl.arange(0, ROWS) < q_end)
    skipped = tl.where(length > 0, 1, 0).to(tl.int8)
    tl.store(skip_ptr + group * num_tokens + token, tl.broadcast_to(skipped, [ROWS]), mask=inside)


@dataclass(frozen=True)
class Tiles:
    """Made by `choose_tiles`; for G groups and T tiles:

    list [G, T, limit] int32 and members [G, T, limit] int64: the union's blocks, ascending, and a bit for each of the
    `tokens` tokens that chose it. walks [G, T, 8] int32: blocks in the list, 0 for a tile that does not walk, and how
    many of them every token sees whole; the tile's batch row, first query and last query + 1; its sequence's first key,
    number of keys and shift: query i sees the sequence's keys j <= i + shift. skip [G, B*Sq] int8: tokens that the
    KV-outer order leaves out, because their tile walks. None when dense.
    """

    ends: torch.Tensor
    num_tiles: int
    table: bool
    tokens: int
    limit: int
    list: torch.Tensor | None = None
    members: torch.Tensor | None = None
    walks: torch.Tensor | None = None
    skip: torch.Tensor | None = None


def union_constants(
    config: ForwardConfig, group_size: int, topk: int, block_size: int, table: bool
) -> dict[str, int | bool]:
    """The compile-time arguments of `union_kernel`."""
    tokens = config.walk_tokens(group_size, topk)
    return {
        "TOPK": topk,
        "BLOCK": block_size,
        "TOKENS": tokens,
        "TABLE": table,
        "ROWS": triton.next_power_of_2(tokens),
        "SLOTS": triton.next_power_of_2(topk),
    }


def union_warps(constants) -> int:
    """Warps of `union_kernel`: four choices to sort a thread, as far as that goes."""
    return max(1, min(8, constants["ROWS"] * constants["SLOTS"] // 128))


def choose_tiles(block_indices, sequences, q, k, block_size: int, config: ForwardConfig) -> Tiles:
    """Find which tiles walk, and their unions; block_indices None makes every tile walk every visible block."""
    batch, num_heads, seqlen_q, _ = q.shape
    num_kv_heads = k.shape[1]
    topk = 1 if block_indices is None else block_indices.shape[3]
    tokens = config.walk_tokens(num_heads // num_kv_heads, topk)
    ends, num_tiles, table = tile_ends(sequences, batch, seqlen_q, tokens)
    if block_indices is None:
        return Tiles(ends, num_tiles, table, tokens, 0)
    limit = min(config.walk_limit, tokens * topk)
    skip = sequences.new_zeros(num_kv_heads, batch * seqlen_q, dtype=torch.int8)
    walks = sequences.new_zeros(num_kv_heads, num_tiles, 8)
    blocks = sequences.new_empty(num_kv_heads, num_tiles, limit)
    members = sequences.new_empty(num_kv_heads, num_tiles, limit, dtype=torch.int64)
    constants = union_constants(config, num_heads // num_kv_heads, topk, block_size, table)
    if limit > 0:
        union_kernel[(num_tiles, num_kv_heads)](
            block_indices,
            sequences,
            ends,
            blocks,
            members,
            walks,
            skip,
            *block_indices.stride(),
            sequences.shape[0],
            num_tiles,
            seqlen_q,
            batch * seqlen_q,
            limit,
            **constants,
            num_warps=union_warps(constants),
        )
    return Tiles(ends, num_tiles, table, tokens, limit, blocks, members, walks, skip)
