"""`walk` for Hopper, in Gluon: one warp copies, and runs ahead of the warps that multiply.

Triton's own pipeline asks for a step's keys and values only when the products of the step before it are done, so that
`walk` waits for each. Here a program keeps a multiprocessor to itself and takes tile after tile. Its copying warp
fetches queries, keys and values, a block a step, as buffers become free. Two groups of four warps have half of the
heads each, and take turns at the tensor cores: one multiplies while the other is at its softmax.

Results are those of `walk` but for the order in which a row's weights are added up. Triton's interpreter knows no
Gluon: the checks of `benchmarks/gpu.py` compare this kernel with the oracle.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.gluon_sm90 import clear_rows, hide_unseen, make_barriers, shared_box
from ..common.launch import Launch, Options
from ..common.primitives import LN_2, LOG2_E
from ..common.target import target_of
from .config import ForwardConfig
from .tile_unions import Tiles, load_walk

ROWS = gl.constexpr(64)


class Boxes(NamedTuple):
    """Queries, keys and values: as descriptors of the bulk copy engine, or as buffers in shared memory."""

    q: Any
    k: Any
    v: Any


class Barriers(NamedTuple):
    """q_full, q_empty: the queries of a tile; k_full, v_full, empty: the stages of keys and values; turns: of each
    group of warps at the tensor cores."""

    q_full: Any
    q_empty: Any
    k_full: Any
    v_full: Any
    empty: Any
    turns: Any


class Unions(NamedTuple):
    """The tile unions and how many of them there are; see `tile_unions.Tiles`."""

    walks: Any
    list: Any
    members: Any
    num_tiles: Any
    num_walks: Any
    limit: Any


class Rows(NamedTuple):
    """Where results go, out and lse, and what of their layout the kernel needs."""

    out: Any
    lse: Any
    num_kv_heads: Any
    seqlen_q: Any
    scale: Any


@gluon.jit
def copy_tiles(tensors, buffers, barriers, unions, shape: gl.constexpr):
    """The copying warp's work: every tile's queries, then the blocks of its union."""
    step, turn = 0, 0
    for walk in range(gl.program_id(0), unions.num_walks, gl.num_programs(0)):
        tile = load_walk(unions.walks, walk)
        if tile.length > 0:
            group = walk // unions.num_tiles
            mbarrier.wait(barriers.q_empty, (turn & 1) ^ 1)
            mbarrier.expect(barriers.q_full, 2 * tensors.q.block_type.nbytes)
            for half in gl.static_range(2):
                at = [tile.batch, group * shape.group_size + half * (shape.group_size // 2), tile.first, 0]
                tma.async_copy_global_to_shared(tensors.q, at, barriers.q_full, buffers.q.index(half))
            places = unions.list + gl.cast(walk, gl.int64) * unions.limit
            for number in range(tile.length):
                stage, phase = step % shape.stages, (step // shape.stages & 1) ^ 1
                at = [tile.batch, group, tile.k_start + gl.load(places + number) * shape.block_size, 0]
                mbarrier.wait(barriers.empty.index(stage), phase)
                ready = barriers.k_full.index(stage)
                mbarrier.expect(ready, tensors.k.block_type.nbytes)
                tma.async_copy_global_to_shared(tensors.k, at, ready, buffers.k.index(stage))
                ready = barriers.v_full.index(stage)
                mbarrier.expect(ready, tensors.v.block_type.nbytes)
                tma.async_copy_global_to_shared(tensors.v, at, ready, buffers.v.index(stage))
                step += 1
            turn += 1


@gluon.jit
def fold_scores(scores, row_max, row_sum, member, scale):
    """(weights, decay, row_max, row_sum) after a block's scores: as `walk.walk_step` has it, for a positive scale."""
    best = gl.max(scores, axis=1) * scale
    new_max = gl.where(member, gl.maximum(row_max, best), row_max)
    shift = gl.where(member & (new_max > float("-inf")), new_max, float("inf"))
    weights = gl.exp2(scores * scale - shift[:, None])
    decay = gl.exp2(row_max - gl.where(new_max == float("-inf"), 0.0, new_max))
    return weights, decay, new_max, row_sum * decay + gl.sum(weights, axis=1)


@gluon.jit
def store_rows(out_ptr, lse_ptr, place, live, acc, row_max, row_sum):
    """Write out, from sums acc [ROWS, D], and lse of the rows that are live to `place` [ROWS]."""
    layout: gl.constexpr = acc.type.layout
    per_sum: gl.constexpr = gl.SliceLayout(1, layout)
    gl.store(lse_ptr + place, (row_max + gl.log2(row_sum)) * LN_2, mask=live)
    normal = gl.convert_layout(gl.where(row_sum > 0, 1.0 / row_sum, 0.0), per_sum)
    place, live = gl.convert_layout(place, per_sum), gl.convert_layout(live, per_sum)
    depth = gl.arange(0, acc.shape[1], gl.SliceLayout(0, layout))
    out = (acc * normal[:, None]).to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + place[:, None] * acc.shape[1] + depth[None, :], out, mask=live[:, None])


@gluon.jit
def attend_tiles(half, buffers, barriers, unions, rows, shape: gl.constexpr):
    """The work of four warps: out and lse of every tile, for one half of the heads of its group.

    Row r is head r // TOKENS of the half, token r % TOKENS of the tile.
    """
    HEAD_DIM: gl.constexpr = shape.head_dim
    BLOCK: gl.constexpr = shape.block_size
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    per_row: gl.constexpr = gl.SliceLayout(1, scored)
    per_sum: gl.constexpr = gl.SliceLayout(1, summed)
    dtype: gl.constexpr = rows.out.dtype.element_ty
    TOKENS: gl.constexpr = 2 * ROWS // shape.group_size
    row = gl.arange(0, ROWS, per_row)
    q = buffers.q.index(half).reshape([ROWS, HEAD_DIM])
    step, turn, section = 0, 0, 0
    for walk in range(gl.program_id(0), unions.num_walks, gl.num_programs(0)):
        tile = load_walk(unions.walks, walk)
        if tile.length > 0:
            query = tile.first + row % TOKENS
            union = gl.cast(walk, gl.int64) * unions.limit
            row_max = gl.full([ROWS], float("-inf"), gl.float32, per_row)
            row_sum = gl.zeros([ROWS], gl.float32, per_row)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, summed)
            mbarrier.wait(barriers.q_full, turn & 1)
            # A turn is the values' product of one step and the keys' product of the next.
            mbarrier.wait(barriers.turns.index(half), section & 1)
            for number in range(tile.length):
                stage, phase = step % shape.stages, step // shape.stages & 1
                members = gl.load(unions.members + union + number)
                k = buffers.k.index(stage).reshape([BLOCK, HEAD_DIM])
                v = buffers.v.index(stage).reshape([BLOCK, HEAD_DIM])
                mbarrier.wait(barriers.k_full.index(stage), phase)
                scores = gl.zeros([ROWS, BLOCK], gl.float32, scored)
                scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
                mbarrier.arrive(barriers.turns.index(1 - half), count=1)
                section += 1
                scores = warpgroup_mma_wait(0, deps=[scores])
                count = BLOCK
                if number >= tile.num_whole:
                    first_key = gl.load(unions.list + union + number) * BLOCK
                    count = gl.minimum(tile.num_keys - first_key, BLOCK)
                    scores = hide_unseen(scores, gl.minimum(query + tile.shift - first_key, count - 1))
                member = ((members >> gl.cast(row % TOKENS, gl.int64)) & 1) != 0
                weights, decay, row_max, row_sum = fold_scores(scores, row_max, row_sum, member, rows.scale)
                weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, summed, 2))
                acc = acc * gl.convert_layout(decay, per_sum)[:, None]
                mbarrier.wait(barriers.v_full.index(stage), phase)
                if count < BLOCK:
                    # Both groups of warps do so, each before its own product: what they write is the same.
                    clear_rows(v, count)
                mbarrier.wait(barriers.turns.index(half), section & 1)
                acc = warpgroup_mma(weights, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(barriers.empty.index(stage), count=1)
                step += 1
            mbarrier.arrive(barriers.turns.index(1 - half), count=1)
            section += 1
            mbarrier.arrive(barriers.q_empty, count=1)
            turn += 1
            head = walk // unions.num_tiles * shape.group_size + half * (shape.group_size // 2) + row // TOKENS
            place = (
                gl.cast(tile.batch, gl.int64) * rows.num_kv_heads * shape.group_size + head
            ) * rows.seqlen_q + query
            store_rows(rows.out, rows.lse, place, query < tile.stop, acc, row_max, row_sum)


@gluon.jit
def query_major_sm90_kernel(q_boxes, k_boxes, v_boxes, unions, rows, shape: gl.constexpr):
    """out and lse of the tiles that walk, of 128 rows each."""
    dtype: gl.constexpr = rows.out.dtype.element_ty
    halves: gl.constexpr = [2, 1, shape.group_size // 2, 2 * ROWS // shape.group_size, shape.head_dim]
    stages: gl.constexpr = [shape.stages, 1, 1, shape.block_size, shape.head_dim]
    buffers = Boxes(
        gl.allocate_shared_memory(dtype, halves, q_boxes.layout),
        gl.allocate_shared_memory(dtype, stages, k_boxes.layout),
        gl.allocate_shared_memory(dtype, stages, v_boxes.layout),
    )
    q_full, q_empty = make_barriers(1, 1), make_barriers(1, 2)
    k_full, v_full, empty = (
        make_barriers(shape.stages, 1),
        make_barriers(shape.stages, 1),
        make_barriers(shape.stages, 2),
    )
    turns = make_barriers(2, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    barriers = Barriers(q_full.index(0), q_empty.index(0), k_full, v_full, empty, turns)
    gl.warp_specialize(
        [
            (attend_tiles, (0, buffers, barriers, unions, rows, shape)),
            (attend_tiles, (1, buffers, barriers, unions, rows, shape)),
            (copy_tiles, (Boxes(q_boxes, k_boxes, v_boxes), buffers, barriers, unions, shape)),
        ],
        [4, 1],
        [240, 24],
    )


@dataclass(frozen=True)
class TileShape:
    """Constants of `query_major_sm90_kernel`; stages: buffers of keys and values."""

    group_size: int
    head_dim: int
    block_size: int
    stages: int


def attend_tiles_sm90(q, k, v, tiles: Tiles, block_size: int, scale: float, config: ForwardConfig, out, lse) -> None:
    """Fill out and lse of the tokens in walking tiles; layouts as in `attention`."""
    num_kv_heads, head_dim = k.shape[1], k.shape[3]
    group_size = q.shape[1] // num_kv_heads
    keys = [1, 1, block_size, head_dim]
    num_walks = num_kv_heads * tiles.num_tiles
    Launch(
        query_major_sm90_kernel,
        (min(num_walks, target_of(q.device).num_sms), 1, 1),
        {
            # A box has half the heads of a tile's tokens.
            "q_boxes": shared_box(q, [1, group_size // 2, 2 * ROWS.value // group_size, head_dim]),
            "k_boxes": shared_box(k, keys),
            "v_boxes": shared_box(v, keys),
            "unions": Unions(tiles.walks, tiles.list, tiles.members, tiles.num_tiles, num_walks, tiles.limit),
            "rows": Rows(out, lse, num_kv_heads, q.shape[2], scale * LOG2_E.value),
        },
        {"shape": TileShape(group_size, head_dim, block_size, config.walk_stages)},
        Options(4),
    ).run()
