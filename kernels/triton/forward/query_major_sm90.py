"""`walk` for Hopper, in Gluon: one warp copies, and runs ahead of the warps that multiply.

Triton's own pipeline asks for a step's keys and values only when the products of the step before it are done, so that
`walk` waits for each. Here a program keeps a multiprocessor to itself and takes tile after tile. Its copying warp
fetches queries, keys and values, a block a step, as buffers become free. Two groups of four warps have half of the
heads each, and take turns at the tensor cores: one multiplies while the other is at its softmax.

Results are those of `walk` but for the order in which a row's weights are added up. Triton's interpreter knows no
Gluon: the checks of `benchmarks/gpu.py` compare this kernel with the oracle.
"""

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
from ..common.primitives import LN_2, LOG2_E
from ..common.target import target_of
from .config import ForwardConfig
from .tile_unions import Tiles

ROWS = gl.constexpr(64)


@gluon.jit
def copy_tiles(
    tiles, buffers, barriers, pointers, numbers, GROUP_SIZE: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr
):
    """The copying warp's work: every tile's queries, then the blocks of its union."""
    q_tiles, k_tiles, v_tiles = tiles
    q_buffers, k_buffers, v_buffers = buffers
    q_full, q_empty, k_full, v_full, empty, _ = barriers
    walks_ptr, list_ptr, _, _, _ = pointers
    num_tiles, num_walks, limit, _, _, _ = numbers
    step, turn = 0, 0
    for walk in range(gl.program_id(0), num_walks, gl.num_programs(0)):
        row = walks_ptr + walk * 8
        length = gl.load(row)
        if length > 0:
            batch, first, first_key, group = gl.load(row + 2), gl.load(row + 3), gl.load(row + 5), walk // num_tiles
            mbarrier.wait(q_empty, (turn & 1) ^ 1)
            mbarrier.expect(q_full, 2 * q_tiles.block_type.nbytes)
            for half in gl.static_range(2):
                head = group * GROUP_SIZE + half * (GROUP_SIZE // 2)
                tma.async_copy_global_to_shared(q_tiles, [batch, head, first, 0], q_full, q_buffers.index(half))
            places = list_ptr + gl.cast(walk, gl.int64) * limit
            for number in range(length):
                stage, at = step % STAGES, [batch, group, first_key + gl.load(places + number) * BLOCK, 0]
                mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(k_full.index(stage), k_tiles.block_type.nbytes)
                tma.async_copy_global_to_shared(k_tiles, at, k_full.index(stage), k_buffers.index(stage))
                mbarrier.expect(v_full.index(stage), v_tiles.block_type.nbytes)
                tma.async_copy_global_to_shared(v_tiles, at, v_full.index(stage), v_buffers.index(stage))
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
def attend_tiles(
    half, buffers, barriers, pointers, numbers,
    GROUP_SIZE: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The work of four warps: out and lse of every tile, for one half of the heads of its group.

    Row r is head r // TOKENS of the half, token r % TOKENS of the tile.
    """
    q_buffers, k_buffers, v_buffers = buffers
    q_full, q_empty, k_full, v_full, empty, turns = barriers
    walks_ptr, list_ptr, members_ptr, out_ptr, lse_ptr = pointers
    num_tiles, num_walks, limit, num_kv_heads, seqlen_q, scale = numbers
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    per_row: gl.constexpr = gl.SliceLayout(1, scored)
    per_sum: gl.constexpr = gl.SliceLayout(1, summed)
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    TOKENS: gl.constexpr = 2 * ROWS // GROUP_SIZE
    row = gl.arange(0, ROWS, per_row)
    q = q_buffers.index(half).reshape([ROWS, HEAD_DIM])
    step, turn, section = 0, 0, 0
    for walk in range(gl.program_id(0), num_walks, gl.num_programs(0)):
        info = walks_ptr + walk * 8
        length = gl.load(info)
        if length > 0:
            num_whole, batch, first, stop = gl.load(info + 1), gl.load(info + 2), gl.load(info + 3), gl.load(info + 4)
            num_keys, shift = gl.load(info + 6), gl.load(info + 7)
            query = first + row % TOKENS
            union = gl.cast(walk, gl.int64) * limit
            row_max = gl.full([ROWS], float("-inf"), gl.float32, per_row)
            row_sum = gl.zeros([ROWS], gl.float32, per_row)
            acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, summed)
            mbarrier.wait(q_full, turn & 1)
            # A turn is the values' product of one step and the keys' product of the next.
            mbarrier.wait(turns.index(half), section & 1)
            for number in range(length):
                stage, phase = step % STAGES, step // STAGES & 1
                members = gl.load(members_ptr + union + number)
                k = k_buffers.index(stage).reshape([BLOCK, HEAD_DIM])
                v = v_buffers.index(stage).reshape([BLOCK, HEAD_DIM])
                mbarrier.wait(k_full.index(stage), phase)
                scores = gl.zeros([ROWS, BLOCK], gl.float32, scored)
                scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
                mbarrier.arrive(turns.index(1 - half), count=1)
                section += 1
                scores = warpgroup_mma_wait(0, deps=[scores])
                count = BLOCK
                if number >= num_whole:
                    first_key = gl.load(list_ptr + union + number) * BLOCK
                    count = gl.minimum(num_keys - first_key, BLOCK)
                    scores = hide_unseen(scores, gl.minimum(query + shift - first_key, count - 1))
                member = ((members >> gl.cast(row % TOKENS, gl.int64)) & 1) != 0
                weights, decay, row_max, row_sum = fold_scores(scores, row_max, row_sum, member, scale)
                weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, summed, 2))
                acc = acc * gl.convert_layout(decay, per_sum)[:, None]
                mbarrier.wait(v_full.index(stage), phase)
                if count < BLOCK:
                    # Both groups of warps do so, each before its own product: what they write is the same.
                    clear_rows(v, count)
                mbarrier.wait(turns.index(half), section & 1)
                acc = warpgroup_mma(weights, v, acc, is_async=True)
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1
            mbarrier.arrive(turns.index(1 - half), count=1)
            section += 1
            mbarrier.arrive(q_empty, count=1)
            turn += 1
            head = walk // num_tiles * GROUP_SIZE + half * (GROUP_SIZE // 2) + row // TOKENS
            place = (gl.cast(batch, gl.int64) * num_kv_heads * GROUP_SIZE + head) * seqlen_q + query
            store_rows(out_ptr, lse_ptr, place, query < stop, acc, row_max, row_sum)


@gluon.jit(do_not_specialize=["num_tiles", "num_walks", "limit", "num_kv_heads", "seqlen_q"])
def walk_hopper_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    walks_ptr,
    list_ptr,
    members_ptr,
    out_ptr,
    lse_ptr,
    num_tiles,
    num_walks,
    limit,
    num_kv_heads,
    seqlen_q,
    scale,
    GROUP_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """out and lse of the tiles that walk, of 128 rows each."""
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    halves: gl.constexpr = [2, 1, GROUP_SIZE // 2, 2 * ROWS // GROUP_SIZE, HEAD_DIM]
    q_buffers = gl.allocate_shared_memory(dtype, halves, q_tiles.layout)
    k_buffers = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, HEAD_DIM], k_tiles.layout)
    v_buffers = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK, HEAD_DIM], v_tiles.layout)
    buffers = (q_buffers, k_buffers, v_buffers)
    q_full, q_empty = make_barriers(1, 1), make_barriers(1, 2)
    k_full, v_full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 2)
    turns = make_barriers(2, 1)
    fence_async_shared()
    mbarrier.arrive(turns.index(0), count=1)
    barriers = (q_full.index(0), q_empty.index(0), k_full, v_full, empty, turns)
    tiles = (q_tiles, k_tiles, v_tiles)
    pointers = (walks_ptr, list_ptr, members_ptr, out_ptr, lse_ptr)
    numbers = (num_tiles, num_walks, limit, num_kv_heads, seqlen_q, scale)
    gl.warp_specialize(
        [
            (attend_tiles, (0, buffers, barriers, pointers, numbers, GROUP_SIZE, HEAD_DIM, BLOCK, STAGES)),
            (attend_tiles, (1, buffers, barriers, pointers, numbers, GROUP_SIZE, HEAD_DIM, BLOCK, STAGES)),
            (copy_tiles, (tiles, buffers, barriers, pointers, numbers, GROUP_SIZE, BLOCK, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def hopper_boxes(group_size: int, head_dim: int, block_size: int) -> dict[str, list[int]]:
    """The box of each tensor that is copied: of queries, half the heads of a tile's tokens."""
    keys = [1, 1, block_size, head_dim]
    rows = [1, group_size // 2, 2 * ROWS.value // group_size, head_dim]
    return {"q_tiles": rows, "k_tiles": keys, "v_tiles": keys}


def hopper_constants(group_size: int, head_dim: int, block_size: int, config: ForwardConfig) -> dict[str, int]:
    """The compile-time arguments of `walk_hopper_kernel`."""
    return {"GROUP_SIZE": group_size, "HEAD_DIM": head_dim, "BLOCK": block_size, "STAGES": config.walk_stages}


def walk_tiles_hopper(q, k, v, tiles: Tiles, block_size: int, scale: float, config: ForwardConfig, out, lse) -> None:
    """Fill out and lse of the tokens in walking tiles; layouts as in `attention`."""
    num_kv_heads, head_dim = k.shape[1], k.shape[3]
    group_size = q.shape[1] // num_kv_heads
    boxes = hopper_boxes(group_size, head_dim, block_size)
    num_walks = num_kv_heads * tiles.num_tiles
    walk_hopper_kernel[(min(num_walks, target_of(q.device).num_sms),)](
        *(shared_box(x, box) for x, box in zip((q, k, v), boxes.values(), strict=True)),
        tiles.walks,
        tiles.list,
        tiles.members,
        out,
        lse,
        tiles.num_tiles,
        num_walks,
        tiles.limit,
        num_kv_heads,
        q.shape[2],
        scale * LOG2_E.value,
        **hopper_constants(group_size, head_dim, block_size, config),
        num_warps=4,
    )
