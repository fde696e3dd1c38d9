"""Tiles of neighbouring tokens of one sequence: how they are numbered, found and loaded."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...sequences import table_rows
from .launch import Launch


class TileTable(NamedTuple):
    """How tiles are numbered over the sequences, made by `tile_table`.

    ends [num_sequences]: running count of tiles, or None where every sequence has the same number.
    """

    ends: Any
    num_sequences: Any
    seqlen_q: Any


class Tile(NamedTuple):
    """Which sequence a tile is of, and which of its tiles."""

    sequence: Any
    number: Any


@triton.jit
def find_tile(program, tiles, tokens: tl.constexpr):
    """The Tile of a program; tiles with the most keys come first. A sequence past the table's means: no tile.

    With `ends`, the sequence is found by bisection. Without, every sequence has cdiv(seqlen_q, tokens) tiles.
    """
    if tiles.ends is None:
        last = tl.cdiv(tiles.seqlen_q, tokens) - 1
        return Tile(program % tiles.num_sequences, last - program // tiles.num_sequences)
    else:
        total = tl.load(tiles.ends + tiles.num_sequences - 1)
        tile = total - 1 - program
        low = tile * 0
        high = low + tiles.num_sequences
        while low < high:
            middle = (low + high) // 2
            below = tl.load(tiles.ends + middle) <= tile
            low = tl.where(below, middle + 1, low)
            high = tl.where(below, high, middle)
        before = tl.load(tiles.ends + low - 1, mask=(low > 0) & (low < tiles.num_sequences), other=0)
        return Tile(tl.where(tile < 0, tiles.num_sequences, low), tile - before)


@triton.jit
def load_tile(base, first, count, stride_s, stride_d, rows: tl.constexpr, head_dim: tl.constexpr, depth: tl.constexpr):
    """Rows first .. first + count - 1 of a matrix [S, head_dim] as a tile [rows, depth], zero beyond."""
    row, d = tl.arange(0, rows), tl.arange(0, depth)
    place = base + (first + row).to(tl.int64)[:, None] * stride_s + d.to(tl.int64)[None, :] * stride_d
    return tl.load(place, mask=(row < count)[:, None] & (d < head_dim)[None, :], other=0.0)


@triton.jit
def tile_ends_kernel(sequences_ptr, ends_ptr, num_sequences, tokens: tl.constexpr, chunk: tl.constexpr):
    """ends[n] = sum over m <= n of cdiv(queries of sequence m, tokens). One program does all."""
    total = num_sequences * 0
    for start in range(0, num_sequences, chunk):
        n = start + tl.arange(0, chunk)
        row = sequences_ptr + n.to(tl.int64) * 5
        q_start = tl.load(row + 1, mask=n < num_sequences, other=0)
        q_end = tl.load(row + 2, mask=n < num_sequences, other=0)
        tiles = tl.cdiv(tl.maximum(q_end - q_start, 0), tokens)
        tl.store(ends_ptr + n, total + tl.cumsum(tiles, axis=0), mask=n < num_sequences)
        total += tl.sum(tiles, axis=0)


def tile_table(sequences: torch.Tensor, batch: int, seqlen_q: int, tokens: int) -> tuple[TileTable, int]:
    """The TileTable for tiles of `tokens` tokens, and how many programs to launch.

    Only packed documents need `ends`. Where a row has two sequences, new tokens and none, half the programs return at
    once, for less than a launch costs.
    """
    sequences = table_rows(sequences)
    num_sequences = sequences.shape[0]
    per_row = -(-seqlen_q // tokens)
    if num_sequences <= 2 * batch:
        return TileTable(None, num_sequences, seqlen_q), num_sequences * per_row
    ends = sequences.new_empty(num_sequences)
    arguments = {"sequences_ptr": sequences, "ends_ptr": ends, "num_sequences": num_sequences}
    Launch(tile_ends_kernel, (1, 1, 1), arguments, {"tokens": tokens, "chunk": 1024}).run()
    return TileTable(ends, num_sequences, seqlen_q), batch * per_row + num_sequences


def tma_ready(x: torch.Tensor) -> bool:
    """Whether the bulk copy engine can read x [..., D]: 16-byte alignment throughout, dense last dimension."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and aligned


def box_strides(x: torch.Tensor) -> list[int]:
    """The strides of x for the bulk copy engine: multiples of 16 bytes also where there is nothing to step over."""
    strides = [16 if size == 1 else stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)]
    return [*strides, x.stride(-1)]


def length_key(x: torch.Tensor) -> tuple[int, ...]:
    """The sizes of queries [B, H, S, D], of which S counts up to a power of two: the tiles of others differ."""
    return min(x.shape[0], 2), x.shape[1], x.shape[2].bit_length(), x.shape[3]
