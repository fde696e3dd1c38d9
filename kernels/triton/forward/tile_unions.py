"""Tile unions: the blocks that the tokens of a tile chose between them, and which tiles work in query-major order.

In trained models, neighbours choose much the same blocks. `find_tile_unions` sorts the union of every tile, with a bit
per token that chose the block. A tile whose union is longer than `ForwardConfig.longest_union` is left to the key-major
order, and its union is never read. The device decides per tile, from block_indices alone.

A block of a tile union costs 4 T G Bk D FLOPs whether all T tokens chose the block or one. So query-major order pays
while the union is shorter than about 2 topk: on an H200, one more block in every union costs 1 ms at 128K tokens of
M3's shape, and topk blocks per token in key-major order cost 34 ms, whatever the union.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ..common.launch import Launch, Options, view
from ..common.records import load_sequence
from ..common.tiles import TileTable, find_tile, tile_table
from .config import ForwardConfig

NO_BLOCK = tl.constexpr(0x7FFFFFFF)


class TileUnions(NamedTuple):
    """The tile unions of G groups and T tiles, as an argument of a kernel. blocks is None: every visible block.

    rows [G, T, 8] int32: a `TileUnion` each. blocks [G, T, limit] int32: the union's blocks, ascending; members
    [G, T, limit] int64: a bit per token of the tile that chose the block. num_unions: G * T.
    """

    rows: Any
    blocks: Any
    members: Any
    num_tiles: Any
    num_unions: Any
    limit: Any


class TileUnion(NamedTuple):
    """The tile union of one tile and group.

    length: blocks, 0 where the tile is not query-major; num_whole: blocks that all tokens of the tile see whole; batch:
    the tile's batch row; first, stop: its first query and last query + 1; k_start, num_keys: first key and number of
    keys of its sequence; shift: query i sees the sequence's keys j <= i + shift.
    """

    length: Any
    num_whole: Any
    batch: Any
    first: Any
    stop: Any
    k_start: Any
    num_keys: Any
    shift: Any


@dataclass(frozen=True)
class UnionConstants:
    """Constants of `tile_union_kernel`; tokens: per tile; rows, slots: tokens and topk as powers of two."""

    topk: int
    block_size: int
    tokens: int
    rows: int
    slots: int


@triton.jit
def load_tile_union(rows_ptr, number):
    """The TileUnion of that number, `group * num_tiles + tile`."""
    row = rows_ptr + number * 8
    length, num_whole, batch, first = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    stop, k_start, num_keys, shift = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    return TileUnion(length, num_whole, batch, first, stop, k_start, num_keys, shift)


@triton.jit
def store_tile_union(rows_ptr, number, union):
    """Write the TileUnion of that number."""
    row = rows_ptr + number * 8
    tl.store(row, union.length)
    tl.store(row + 1, union.num_whole)
    tl.store(row + 2, union.batch)
    tl.store(row + 3, union.first)
    tl.store(row + 4, union.stop)
    tl.store(row + 5, union.k_start)
    tl.store(row + 6, union.num_keys)
    tl.store(row + 7, union.shift)


@triton.jit
def store_no_union(rows_ptr, number):
    """Write a length of 0: a tile without queries."""
    tl.store(rows_ptr + number * 8, 0)


@triton.jit
def join_members(block_a, members_a, block_b, members_b):
    """Segmented or: the members of equal neighbouring blocks together."""
    return block_b, tl.where(block_a == block_b, members_a | members_b, members_b)


@triton.jit
def load_choices(ids, sequence, group, query, live, C: tl.constexpr):
    """[rows * slots] int64: the blocks that the queries [rows * slots] chose and see, NO_BLOCK elsewhere."""
    slot = tl.arange(0, C.rows * C.slots) % C.slots
    row = ids.ptr + sequence.batch * ids.stride_b + group * ids.stride_h + query.to(tl.int64) * ids.stride_s
    mask = live & (slot < C.topk)
    block = tl.load(row + slot.to(tl.int64) * ids.stride_d, mask=mask, other=-1).to(tl.int64)
    # Compared in 64 bits: an id of any size is out of range, never wrapped into it.
    num_seen = sequence.k_end - sequence.q_end + query + 1 - sequence.k_start
    return tl.where((block >= 0) & (block * C.block_size < num_seen), block, NO_BLOCK)


@triton.jit
def tile_union_kernel(ids, sequences_ptr, tiles, unions, skip_ptr, num_tokens, C: tl.constexpr):
    """The union of one tile and group; see `TileUnions`. Grid (tiles, groups).

    A union longer than `limit` has length 0, and the skip of the tile's tokens stays 0 too.
    """
    number = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    tile = find_tile(number, tiles, C.tokens)
    union = group * unions.num_tiles + number
    if tile.sequence >= tiles.num_sequences:
        store_no_union(unions.rows, union)
        return
    sequence = load_sequence(sequences_ptr, tile.sequence)
    first = sequence.q_start + tile.number * C.tokens
    if first >= sequence.q_end:
        store_no_union(unions.rows, union)
        return
    SIZE: tl.constexpr = C.rows * C.slots
    ROWS: tl.constexpr = C.rows
    place = tl.arange(0, SIZE)
    row = place // C.slots
    query = first + row
    chosen = load_choices(ids, sequence, group, query, (row < C.tokens) & (query < sequence.q_end), C)
    ordered = tl.sort(chosen * 64 + row)
    block, member = (ordered // 64).to(tl.int32), tl.full([SIZE], 1, tl.int64) << (ordered % 64)
    before = tl.gather(block, tl.maximum(place - 1, 0), axis=0)
    fresh = (block != NO_BLOCK) & ((block != before) | (place == 0))
    _, members = tl.associative_scan((block, member), axis=0, combine_fn=join_members, reverse=True)
    length = tl.sum(fresh.to(tl.int32), axis=0)
    rank = tl.cumsum(fresh.to(tl.int32), axis=0) - 1
    length = tl.where(length <= unions.limit, length, 0)
    shift = sequence.k_end - sequence.q_end - sequence.k_start
    num_whole = tl.sum((fresh & ((block.to(tl.int64) + 1) * C.block_size <= shift + first + 1)).to(tl.int32), axis=0)
    num_whole = tl.where(length > 0, num_whole, 0)
    tl.store(unions.blocks + union * unions.limit + rank, block, mask=fresh & (rank < length))
    tl.store(unions.members + union * unions.limit + rank, members, mask=fresh & (rank < length))
    batch, stop = sequence.batch.to(tl.int32), tl.minimum(first + C.tokens, sequence.q_end)
    num_keys = sequence.k_end - sequence.k_start
    found = TileUnion(length, num_whole, batch, first, stop, sequence.k_start, num_keys, shift)
    store_tile_union(unions.rows, union, found)
    token = tl.arange(0, ROWS)
    skipped = tl.broadcast_to(tl.where(length > 0, 1, 0).to(tl.int8), [ROWS])
    skip = skip_ptr + group * num_tokens + sequence.batch * tiles.seqlen_q + first + token
    tl.store(skip, skipped, mask=(token < C.tokens) & (first + token < sequence.q_end))


@dataclass(frozen=True)
class Tiles:
    """All query-major tiles, and which tokens they leave to the key-major order; made by `find_tile_unions`.

    tokens: per tile; num_tiles: programs to launch per group. skip [Hkv, B*Sq] int8: 1 for the tokens of query-major
    tiles; None where every visible block is attended to.
    """

    table: TileTable
    num_tiles: int
    tokens: int
    unions: TileUnions
    skip: Tensor | None


@functools.lru_cache
def union_constants(problem: Problem, config: ForwardConfig) -> UnionConstants:
    """Constants of `tile_union_kernel`."""
    assert problem.topk is not None
    tokens, slots = config.tile_tokens(problem), triton.next_power_of_2(problem.topk)
    return UnionConstants(problem.topk, problem.block_size, tokens, triton.next_power_of_2(tokens), slots)


def find_tile_unions(
    block_indices: Tensor | None, sequences: Tensor, batch: int, seqlen_q: int, problem: Problem, config: ForwardConfig
) -> Tiles:
    """The Tiles of block_indices [B, Hkv, Sq, topk]; None: every tile takes every visible block."""
    groups, tokens = problem.num_kv_heads, config.tile_tokens(problem)
    table, num_tiles = tile_table(sequences, batch, seqlen_q, tokens)
    if block_indices is None:
        return Tiles(table, num_tiles, tokens, TileUnions(None, None, None, num_tiles, groups * num_tiles, 0), None)
    constants = union_constants(problem, config)
    limit = min(config.longest_union, tokens * constants.topk)
    # The kernel fills them, if it runs.
    make = sequences.new_empty if limit > 0 else sequences.new_zeros
    unions = TileUnions(
        rows=make((groups, num_tiles, 8)),
        blocks=sequences.new_empty(groups, num_tiles, limit),
        members=sequences.new_empty(groups, num_tiles, limit, dtype=torch.int64),
        num_tiles=num_tiles,
        num_unions=groups * num_tiles,
        limit=limit,
    )
    # Every query is in a sequence, and so in a tile.
    skip = make((groups, batch * seqlen_q), dtype=torch.int8)
    if limit > 0:
        given = {"ids": view(block_indices), "sequences_ptr": sequences, "tiles": table}
        arguments = {**given, "unions": unions, "skip_ptr": skip, "num_tokens": batch * seqlen_q}
        # Four choices to sort per thread, up to 8 warps.
        options = Options(max(1, min(8, constants.rows * constants.slots // 128)))
        Launch(tile_union_kernel, (num_tiles, groups, 1), arguments, {"C": constants}, options).run()
    return Tiles(table, num_tiles, tokens, unions, skip)
