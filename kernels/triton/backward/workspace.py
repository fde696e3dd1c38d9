"""What the backward's kernels hand to each other: rows in the order of the lists, partial results, and their layout.

An entry has G query rows. They lie in *tiles*: a tile has the rows of `entries` neighbouring entries, and further rows
that belong to none, up to the number of rows that the main kernel takes at a time, or a multiple of it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ..common.sizes import Sizes, cdiv, sizes_of
from ..loss.teacher import new_teacher


class GatheredRows(NamedTuple):
    """What a pass keeps of each entry and of its rows.

    limits: [entries] int32, how many keys of its block an entry's query sees; queries, delta, lse2: [tiles, tile_rows],
    int32 and fp32; lse2 is +inf in the rows that belong to no entry.
    """

    limits: Any
    queries: Any
    delta: Any
    lse2: Any


class PartialResults(NamedTuple):
    """Gradients that are still to be summed, and what the index loss takes from the main kernel.

    q: [tiles, tile_rows, D] in q's dtype, each row's own share of dQ, with rows innermost in some layouts (see
    `partial_place`); k, v: [slots, block_size, D] fp32, the shares of the work items that have a slot; teacher:
    see `loss.teacher`, None if no loss is computed.
    """

    q: Any
    k: Any
    v: Any
    teacher: Any


class KeyGradients(NamedTuple):
    """The sums of dK and dV, [B, Hkv, Sk, D] fp32 and contiguous."""

    k: Any
    v: Any
    num_kv_heads: Any
    seqlen_k: Any


class Work(NamedTuple):
    """A pass for the kernels of dK and dV: its work items, its first token range, and what they read and write.

    group_ranges: token ranges per group.
    """

    items: Any
    rows: Any
    partial: Any
    sums: Any
    first_range: Any
    group_ranges: Any


@dataclass(frozen=True)
class TileSizes(Sizes):
    """Constants of every kernel that knows the layout of tiles.

    entries, tile_rows: of a tile; teacher_rows: see `loss.teacher`; rows_inside: see `partial_place`.
    """

    entries: int
    tile_rows: int
    teacher_rows: int
    rows_inside: bool


def tile_sizes(problem: Problem, step_rows: int, rows_inside: bool) -> dict[str, Any]:
    """The fields of TileSizes for a main kernel that takes step_rows rows at a time."""
    entries = max(1, step_rows // problem.group_size)
    return {
        **sizes_of(problem),
        "entries": entries,
        "tile_rows": step_rows * cdiv(problem.group_size, step_rows),
        # Eight rows at least: so many the bulk copy engine stores.
        "teacher_rows": max(8, triton.next_power_of_2(entries)),
        "rows_inside": rows_inside,
    }


@dataclass(frozen=True)
class Workspace:
    """Memory that is used again by each pass.

    places: [tokens, topk] int32, the first row of the entry of a top-k slot; undefined if it belongs to no list.
    """

    rows: GatheredRows
    places: Tensor
    partial: PartialResults
    sizes: TileSizes


def entry_bytes(problem: Problem, sizes: TileSizes, with_loss: bool) -> int:
    """Bytes of partial results for each entry: its rows' shares of dQ, and its teacher."""
    shares = sizes.tile_rows * problem.head_dim * problem.element_size
    teacher = sizes.teacher_rows * problem.block_size * problem.element_size if with_loss else 0
    return cdiv(shares + teacher, sizes.entries)


def make_workspace(
    q: Tensor, lse: Tensor, sequences: Tensor, sizes: TileSizes, num_entries: int, num_slots: int, with_loss: bool
) -> Workspace:
    """An uninitialised workspace for passes of `num_entries` entries and `num_slots` slots of work items."""
    num_tiles = cdiv(num_entries, sizes.entries)
    keys = num_slots, sizes.block_size, sizes.head_dim
    delta, lse2 = (lse.new_empty(num_tiles, sizes.tile_rows) for _ in range(2))
    if sizes.entries * sizes.group_size < sizes.tile_rows:
        # +inf makes every probability of a row 0.
        delta.zero_()
        lse2.fill_(torch.inf)
    teacher = new_teacher(q, num_tiles, sizes.teacher_rows, sizes.block_size) if with_loss else None
    return Workspace(
        GatheredRows(
            limits=sequences.new_empty(num_entries),
            queries=sequences.new_empty(num_tiles, sizes.tile_rows),
            delta=delta,
            lse2=lse2,
        ),
        sequences.new_empty(num_entries),
        PartialResults(
            q=q.new_empty(num_tiles, sizes.tile_rows, sizes.head_dim),
            k=lse.new_empty(keys),
            v=lse.new_empty(keys),
            teacher=teacher,
        ),
        sizes,
    )


@triton.jit
def first_row(entry, C: tl.constexpr):
    """The row of an entry's first head."""
    return entry // C.entries * C.tile_rows + entry % C.entries * C.group_size


@triton.jit
def partial_place(row, d, C: tl.constexpr):
    """Where element `d` of row `row` is kept in PartialResults.q."""
    if C.rows_inside:
        return row // C.tile_rows * (C.tile_rows * C.head_dim) + row % C.tile_rows + d * C.tile_rows
    else:
        return row * C.head_dim + d
