"""What the Hopper kernel of the backward's gradient keeps in shared memory, and how its copying warps fill it.

One warp fetches the rows of q and dO an entry at a time with the bulk copy engine, in halves of the head dim, which lie
side by side as the tensor cores take them. Entries of few rows would be too many copies: there four warps copy the rows
one by one.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..common.gluon_sm90 import HALF, copy_block, gather_rows, load_box, load_each, meet
from ..schedule.work_items import load_item
from .workspace import TileSizes

ROWS = gl.constexpr(64)


@dataclass(frozen=True)
class GradientShape(TileSizes):
    """Constants of `gradient_sm90_kernel`.

    stages: buffers of q and dO; bulk: rows come by the bulk copy engine. kept: how the teacher is summed over the
    heads, "" for not at all. Of at least eight whole entries a tile: "beside" the last products, in registers. Of
    fewer: "before" them, when there are registers. Where entries leave rows over: as a "product".
    """

    stages: int
    bulk: bool
    kept: str


class Boxes(NamedTuple):
    """Descriptors of the bulk copy engine: of q or dO of an entry, half of the head dim; of K or V of a block; of the
    queries, lse2, delta or dQ of a tile's rows, and of its teacher.
    """

    q: Any
    grad: Any
    queries: Any
    k: Any
    v: Any
    lse2: Any
    delta: Any
    grad_q: Any
    teacher: Any


class Buffers(NamedTuple):
    """Shared memory: q, dO, lse2 and delta of a tile for each stage; K and V of the block; dS and dQ of a tile.

    queries: of two tiles; heads: of the rows of any tile; teacher: of a tile; weights: its probabilities, and owned
    [teacher_rows, ROWS]: which rows are an entry's, for the product of the two. What is not needed is None.
    """

    q: Any
    grad: Any
    queries: Any
    heads: Any
    lse2: Any
    delta: Any
    k: Any
    v: Any
    grad_scores: Any
    grad_q: Any
    teacher: Any
    weights: Any
    owned: Any


class Barriers(NamedTuple):
    """keys_full: K and V of the block; known: queries; full, empty: the stages of q, dO, lse2 and delta."""

    keys_full: Any
    known: Any
    full: Any
    empty: Any


class Tiles(NamedTuple):
    """The tiles of a work item: its entries begin .. stop-1, `number` tiles from `first` on.

    last: 1 if the last tile has rows of another work item; it then comes before the others, which may not see the whole
    block either.
    """

    begin: Any
    stop: Any
    first: Any
    number: Any
    last: Any


@gluon.jit
def find_tiles(item, entries: gl.constexpr):
    """The Tiles of a work item."""
    first, stop = item.begin // entries, (item.stop + entries - 1) // entries
    return Tiles(item.begin, item.stop, first, stop - first, gl.cast(item.stop % entries != 0, gl.int32))


@gluon.jit
def tile_of(tiles, step):
    """The tile of a step."""
    return gl.where((step == 0) & (tiles.last > 0), tiles.first + tiles.number - 1, tiles.first + step - tiles.last)


@gluon.jit
def find_present(tiles, tile, row, shape: gl.constexpr):
    """Whether the rows of a tile are the work item's."""
    first = (tiles.begin - tile * shape.entries) * shape.group_size
    stop = gl.minimum(tiles.stop - tile * shape.entries, shape.entries) * shape.group_size
    return (row >= first) & (row < stop)


@gluon.jit
def copy_entries(boxes, buffers, ready, tiles, tile, stage, batch, group, queries_ptr, shape: gl.constexpr):
    """Begin to copy q and dO of a tile to a stage, an entry at a time."""
    HEADS: gl.constexpr = shape.group_size
    ENTRIES: gl.constexpr = shape.entries
    HALVES: gl.constexpr = shape.head_dim // HALF
    # All are loaded before any copy begins, so that the loads overlap. Entries of others are replaced by one of the
    # work item's, so that what is read is finite.
    queries = ()
    for number in gl.static_range(ENTRIES):
        entry = gl.minimum(gl.maximum(tile * ENTRIES + number, tiles.begin), tiles.stop - 1)
        row = entry // ENTRIES * ROWS + entry % ENTRIES * HEADS
        queries += (gl.load(queries_ptr + row),)  # type: ignore[assignment]
    mbarrier.expect(ready, 2 * (ENTRIES * HALVES * boxes.q.block_type.nbytes + boxes.lse2.block_type.nbytes))
    gather_rows(boxes.q, buffers.q, queries, batch, group * HEADS, stage, ready, HALVES)
    gather_rows(boxes.grad, buffers.grad, queries, batch, group * HEADS, stage, ready, HALVES)


@gluon.jit
def copy_vectors(x, batch, first_head, query, head, present, buffer, shape: gl.constexpr):
    """Begin to copy the vectors of rows [N] to a buffer [N, D]; zeros for rows that are not present."""
    layout: gl.constexpr = query.type.layout.parent
    d = gl.arange(0, shape.head_dim, gl.SliceLayout(0, layout))
    base = x.ptr + batch * x.stride_b + first_head * x.stride_h
    rows = base + query.to(gl.int64) * x.stride_s + head.to(gl.int64) * x.stride_h
    # The kernel takes tensors that the bulk copy engine reads: their rows are multiples of 16 bytes apart.
    rows = gl.multiple_of(rows, 16)
    load_each(buffer, rows[:, None] + d[None, :], mask=present[:, None])


@gluon.jit
def copy_rows(q, grad_out, boxes, buffers, barriers, work, shape: gl.constexpr):
    """The copying warps' work: the block's keys and values, then q, dO, lse2 and delta of every tile."""
    STAGES: gl.constexpr = shape.stages
    PART: gl.constexpr = 16
    LANES: gl.constexpr = shape.head_dim // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    item = load_item(work.items, work.first_range, gl.program_id(1))
    group = (work.first_range + gl.program_id(1)) // work.group_ranges
    if item.begin < item.stop:
        batch, first_head = gl.cast(item.batch, gl.int32), gl.cast(group, gl.int64) * shape.group_size
        at = [batch, group, item.first_key, 0]
        copy_block(boxes.k, boxes.v, at, barriers.keys_full, buffers.k, buffers.v)
        tiles = find_tiles(item, shape.entries)
        if not shape.bulk:
            # Loaded in each step: to keep what follows from them takes too many registers.
            buffers.heads.store(gl.arange(0, ROWS, gl.SliceLayout(1, layout)) % shape.group_size)
            meet()
            mbarrier.expect(barriers.known.index(0), boxes.queries.block_type.nbytes)
            place = [tile_of(tiles, 0) * ROWS]
            load_box(boxes.queries, place, barriers.known.index(0), buffers.queries.index(0))
        for step in range(tiles.number):
            tile, stage = tile_of(tiles, step), step % STAGES
            ready = barriers.full.index(stage)
            mbarrier.wait(barriers.empty.index(stage), (step // STAGES & 1) ^ 1)
            if shape.bulk:
                queries_ptr = work.rows.queries
                copy_entries(boxes, buffers, ready, tiles, tile, stage, batch, group, queries_ptr, shape)
            else:
                mbarrier.expect(ready, 2 * boxes.lse2.block_type.nbytes)
                following = (step + 1) % 2
                if step + 1 < tiles.number:
                    mbarrier.expect(barriers.known.index(following), boxes.queries.block_type.nbytes)
                    place, known = [tile_of(tiles, step + 1) * ROWS], barriers.known.index(following)
                    load_box(boxes.queries, place, known, buffers.queries.index(following))
                mbarrier.wait(barriers.known.index(step % 2), step // 2 & 1)
                for part in gl.static_range(ROWS // PART):
                    query = buffers.queries.index(step % 2).slice(part * PART, PART).load(gl.SliceLayout(1, layout))
                    row = part * PART + gl.arange(0, PART, gl.SliceLayout(1, layout))
                    head = row % shape.group_size
                    if ROWS % shape.group_size != 0:
                        head = buffers.heads.slice(part * PART, PART).load(gl.SliceLayout(1, layout))
                    present = find_present(tiles, tile, row, shape)
                    q_part = buffers.q.index(stage).slice(part * PART, PART)
                    copy_vectors(q, item.batch, first_head, query, head, present, q_part, shape)
                    grad_part = buffers.grad.index(stage).slice(part * PART, PART)
                    copy_vectors(grad_out, item.batch, first_head, query, head, present, grad_part, shape)
                async_copy.mbarrier_arrive(ready, increment_count=False)
            load_box(boxes.lse2, [tile * ROWS], ready, buffers.lse2.index(stage))
            load_box(boxes.delta, [tile * ROWS], ready, buffers.delta.index(stage))
