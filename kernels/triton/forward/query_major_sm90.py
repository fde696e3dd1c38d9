"""Query-major attention for Hopper, in Gluon: one warp copies, and runs ahead of the warps that multiply.

Triton's own pipeline asks for a step's keys and values only when the products of the step before it are done, so that
`query_major` waits for each. Here a program keeps a multiprocessor to itself and takes tile after tile. Its copying
warp fetches queries, keys and values, a block per step, as buffers become free. Two groups of four warps have half of
the heads each, and take turns at the tensor cores: one multiplies while the other computes its softmax.

Results are those of `query_major` but for the order in which a row's weights are added up.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...problem import Problem
from ..common.gluon_sm90 import clear_rows, hide_unseen, load_box, make_barriers, shared_box
from ..common.launch import Launch, Options
from ..common.records import locate_block, pages_of
from ..common.sizes import Sizes, sizes_of
from ..common.softmax import LN_2, LOG2_E
from ..common.target import Target
from .config import ForwardConfig, fits_query_major_sm90
from .records import Inputs, Results, result_place
from .tile_unions import Tiles, load_tile_union

ROWS = gl.constexpr(64)


class Boxes(NamedTuple):
    """Queries, keys and values: as descriptors of the bulk copy engine, or as buffers in shared memory."""

    q: Any
    k: Any
    v: Any


class Barriers(NamedTuple):
    """q_full, q_empty: the queries of a tile; k_full, v_full, empty: the stages of keys and values; turns: the turns of
    each group of warps at the tensor cores; cleared: the values past the last key, once a tile at most.
    """

    q_full: Any
    q_empty: Any
    k_full: Any
    v_full: Any
    empty: Any
    turns: Any
    cleared: Any


class Folded(NamedTuple):
    """Weights of a block's keys, what earlier sums are to be multiplied by, and largest score and sum so far."""

    weights: Any
    decay: Any
    row_max: Any
    row_sum: Any


@gluon.jit
def copy_tiles(tensors, pages, buffers, barriers, unions, shape: gl.constexpr):
    """The copying warp's work: every tile's queries, then the blocks of its union."""
    step, turn = 0, 0
    for number in range(gl.program_id(0), unions.num_unions, gl.num_programs(0)):
        tile = load_tile_union(unions.rows, number)
        if tile.length > 0:
            group = number // unions.num_tiles
            mbarrier.wait(barriers.q_empty, (turn & 1) ^ 1)
            mbarrier.expect(barriers.q_full, 2 * tensors.q.block_type.nbytes)
            for half in gl.static_range(2):
                at = [tile.batch, group * shape.group_size + half * (shape.group_size // 2), tile.first, 0]
                load_box(tensors.q, at, barriers.q_full, buffers.q.index(half))
            blocks = unions.blocks + gl.cast(number, gl.int64) * unions.limit
            for index in range(tile.length):
                stage, phase = step % shape.stages, (step // shape.stages & 1) ^ 1
                place = locate_block(pages, tile.batch, tile.k_start, gl.load(blocks + index), shape.block_size)
                at = [gl.cast(place.row, gl.int32), group, place.key, 0]
                mbarrier.wait(barriers.empty.index(stage), phase)
                ready = barriers.k_full.index(stage)
                mbarrier.expect(ready, tensors.k.block_type.nbytes)
                load_box(tensors.k, at, ready, buffers.k.index(stage))
                ready = barriers.v_full.index(stage)
                mbarrier.expect(ready, tensors.v.block_type.nbytes)
                load_box(tensors.v, at, ready, buffers.v.index(stage))
                step += 1
            turn += 1


@gluon.jit
def fold_scores(scores, row_max, row_sum, chosen, scale):
    """The `Folded` after a block's scores, for the rows whose token chose the block, as in `query_major.fold_step`."""
    best = gl.max(scores, axis=1) * scale
    new_max = gl.where(chosen, gl.maximum(row_max, best), row_max)
    shift = gl.where(chosen & (new_max > float("-inf")), new_max, float("inf"))
    weights = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(row_max - gl.where(new_max == float("-inf"), 0.0, new_max))
    return Folded(weights, decay, new_max, row_sum * decay + gl.sum(weights, axis=1))


@gluon.jit
def store_rows(results, place, live, acc, row_max, row_sum):
    """Write out, from sums acc [ROWS, D], and lse of the live rows to a ResultPlace [ROWS]."""
    layout: gl.constexpr = acc.type.layout
    per_sum: gl.constexpr = gl.SliceLayout(1, layout)
    gl.store(results.lse + place.lse, (row_max + gl.log2(row_sum)) * LN_2, mask=live)
    normal = gl.convert_layout(gl.where(row_sum > 0, 1.0 / row_sum, 0.0), per_sum)
    place, live = gl.convert_layout(place.out, per_sum), gl.convert_layout(live, per_sum)
    depth = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    out_ptr = results.out.ptr
    out = (acc * normal[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + place[:, None] + depth[None, :], out, mask=live[:, None])


@gluon.jit
def attend_tiles(half, buffers, barriers, unions, results, scale, shape: gl.constexpr):
    """The work of four warps: out and lse of every tile, for one half of the heads of its group.

    Row r is head r // TOKENS of the half, token r % TOKENS of the tile.
    """
    HEAD_DIM: gl.constexpr = shape.head_dim
    BLOCK: gl.constexpr = shape.block_size
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    per_row: gl.constexpr = gl.SliceLayout(1, scored)
    per_sum: gl.constexpr = gl.SliceLayout(1, summed)
    dtype: gl.constexpr = results.out.ptr.dtype.element_ty
    TOKENS: gl.constexpr = 2 * ROWS // shape.group_size
    row = gl.arange(0, ROWS, per_row)
    q = buffers.q.index(half).reshape([ROWS, HEAD_DIM])
    step, turn, section, num_cleared = 0, 0, 0, 0
    for number in range(gl.program_id(0), unions.num_unions, gl.num_programs(0)):
        tile = load_tile_union(unions.rows, number)
        if tile.length > 0:
            query = tile.first + row % TOKENS
            places = gl.cast(number, gl.int64) * unions.limit
            row_max = gl.full([ROWS], float("-inf"), gl.float32, per_row)
            row_sum = gl.zeros([ROWS], gl.float32, per_row)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, summed)
            mbarrier.wait(barriers.q_full, turn & 1)
            # A turn is the values' product of one step and the keys' product of the next.
            mbarrier.wait(barriers.turns.index(half), section & 1)
            for index in range(tile.length):
                stage, phase = step % shape.stages, step // shape.stages & 1
                members = gl.load(unions.members + places + index)
                k = buffers.k.index(stage).reshape([BLOCK, HEAD_DIM])
                v = buffers.v.index(stage).reshape([BLOCK, HEAD_DIM])
                mbarrier.wait(barriers.k_full.index(stage), phase)
                scores = gl.zeros([ROWS, BLOCK], gl.float32, scored)
                scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
                mbarrier.arrive(barriers.turns.index(1 - half), count=1)
                section += 1
                scores = warpgroup_mma_wait(0, deps=[scores])
                count = BLOCK
                if index >= tile.num_whole:
                    first_key = gl.load(unions.blocks + places + index) * BLOCK
                    count = gl.minimum(tile.num_keys - first_key, BLOCK)
                    scores = hide_unseen(scores, gl.minimum(query + tile.shift - first_key, count - 1))
                chosen = ((members >> gl.cast(row % TOKENS, gl.int64)) & 1) != 0
                folded = fold_scores(scores, row_max, row_sum, chosen, scale)
                row_max, row_sum = folded.row_max, folded.row_sum
                weights = gl.convert_layout(folded.weights.to(dtype), gl.DotOperandLayout(0, summed, 2))
                acc = acc * gl.convert_layout(folded.decay, per_sum)[:, None]
                mbarrier.wait(barriers.v_full.index(stage), phase)
                if count < BLOCK:
                    # One group of warps clears, for both.
                    if half == 0:
                        clear_rows(v, count)
                        mbarrier.arrive(barriers.cleared, count=1)
                    else:
                        mbarrier.wait(barriers.cleared, num_cleared & 1)
                    num_cleared += 1
                mbarrier.wait(barriers.turns.index(half), section & 1)
                acc = warpgroup_mma(weights, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(barriers.empty.index(stage), count=1)
                step += 1
            mbarrier.arrive(barriers.turns.index(1 - half), count=1)
            section += 1
            mbarrier.arrive(barriers.q_empty, count=1)
            turn += 1
            head = half * (shape.group_size // 2) + row // TOKENS
            group = number // unions.num_tiles
            place = result_place(results, tile.batch, group, head, query, shape.group_size)
            store_rows(results, place, query < tile.stop, acc, row_max, row_sum)


@gluon.jit
def query_major_sm90_kernel(q_boxes, k_boxes, v_boxes, pages, unions, results, scale, shape: gl.constexpr):
    """out and lse of the query-major tiles, of 128 rows each."""
    dtype: gl.constexpr = results.out.ptr.dtype.element_ty
    halves: gl.constexpr = [2, 1, shape.group_size // 2, 2 * ROWS // shape.group_size, shape.head_dim]
    stages: gl.constexpr = [shape.stages, 1, 1, shape.block_size, shape.head_dim]
    buffers = Boxes(
        gl.allocate_shared_memory(dtype, halves, q_boxes.layout),
        gl.allocate_shared_memory(dtype, stages, k_boxes.layout),
        gl.allocate_shared_memory(dtype, stages, v_boxes.layout),
    )
    q_full, q_empty = make_barriers(1, 1), make_barriers(1, 2)
    k_full, v_full = make_barriers(shape.stages, 1), make_barriers(shape.stages, 1)
    empty, turns, cleared = make_barriers(shape.stages, 2), make_barriers(2, 1), make_barriers(1, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    barriers = Barriers(q_full.index(0), q_empty.index(0), k_full, v_full, empty, turns, cleared.index(0))
    gl.warp_specialize(
        [
            (attend_tiles, (0, buffers, barriers, unions, results, scale, shape)),
            (attend_tiles, (1, buffers, barriers, unions, results, scale, shape)),
            (copy_tiles, (Boxes(q_boxes, k_boxes, v_boxes), pages, buffers, barriers, unions, shape)),
        ],
        [4, 1],
        [240, 24],
    )


@dataclass(frozen=True)
class TileShape(Sizes):
    """Constants of `query_major_sm90_kernel`; stages: buffers of keys and values."""

    stages: int


def supports(problem: Problem, target: Target, config: ForwardConfig) -> bool:
    """Whether the kernel takes this problem: tiles of 128 rows, and the bulk copy engine reads queries and keys."""
    reads = problem.bulk_copies and problem.positive_scale
    full = problem.topk is not None and config.tile_tokens(problem) * problem.group_size == 2 * ROWS.value
    return config.query_major_sm90 and reads and full and fits_query_major_sm90(problem, target)


def launch(
    inputs: Inputs, tiles: Tiles, results: Results, problem: Problem, config: ForwardConfig, target: Target
) -> Launch:
    """The launch that fills the results of the tokens in query-major tiles; the scale is positive."""
    heads = problem.group_size // 2
    keys = [1, 1, problem.block_size, problem.head_dim]
    shape = TileShape(**sizes_of(problem), stages=config.query_major_stages)
    # A box has half the heads of a tile's tokens.
    q_boxes = shared_box(inputs.q, [1, heads, ROWS.value // heads, problem.head_dim])
    boxes = {"q_boxes": q_boxes, "k_boxes": shared_box(inputs.k, keys), "v_boxes": shared_box(inputs.v, keys)}
    work = {"pages": pages_of(inputs.cache.page_table, inputs.k), "unions": tiles.unions, "results": results}
    arguments = {**boxes, **work, "scale": inputs.scale * LOG2_E.value}
    grid = min(tiles.unions.num_unions, target.num_sms), 1, 1
    return Launch(query_major_sm90_kernel, grid, arguments, {"shape": shape}, Options(4))
