"""The backward's main kernel for Hopper, in Gluon: warps that copy run ahead of the warps that multiply.

It computes the same as `gradient`. There Triton's own pipeline waits for each product before it goes on; here the
products of a step are in flight beside the arithmetic between them, and the last one beside the next step. The copying
warps fetch the rows of q and dO one by one, so that any number of heads fills a tile; the bulk copy engine fetches the
block, lse2 and delta, and writes the rows' own dQ.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ...problem import Problem
from ..common.gluon_sm90 import SIDE_BY_SIDE, clear_rows, copy_block, make_barriers, meet, shared_box
from ..common.launch import Launch, Options, view
from ..common.softmax import LOG2_E
from ..common.target import Target, fits_gather_sm90
from ..loss.teacher import store_teacher
from ..schedule.work_items import load_item
from .config import BackwardConfig
from .workspace import TileSizes, Workspace, tile_sizes

ROWS = gl.constexpr(64)
# Warps that copy, and their registers per thread.
COPYING = gl.constexpr(4)
REGISTERS = gl.constexpr(40)


class Boxes(NamedTuple):
    """Descriptors of the bulk copy engine, of K or V of a block, and of lse2, delta or dQ of a tile."""

    k: Any
    v: Any
    lse2: Any
    delta: Any
    grad_q: Any


class Buffers(NamedTuple):
    """Shared memory: q, dO, lse2 and delta of a tile for each stage; K and V of the block; dS and dQ of a tile.

    owned [means, ROWS]: which rows are an entry's, None if no teacher is kept.
    """

    q: Any
    grad: Any
    lse2: Any
    delta: Any
    k: Any
    v: Any
    grad_scores: Any
    grad_q: Any
    owned: Any


class Barriers(NamedTuple):
    """keys_full: K and V of the block; full, empty: the stages of q, dO, lse2 and delta."""

    keys_full: Any
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


@dataclass(frozen=True)
class GradientShape(TileSizes):
    """Constants of `gradient_sm90_kernel`; stages: buffers of q and dO; means: teacher_rows, as products need them."""

    stages: int
    means: int


@functools.lru_cache
def tiles(problem: Problem, config: BackwardConfig) -> TileSizes:
    """The layout of rows: they are stored whole, by the bulk copy engine."""
    return TileSizes(**tile_sizes(problem, ROWS.value, False))


def supports(problem: Problem, target: Target, config: BackwardConfig) -> bool:
    """Whether the kernel takes a problem: Hopper, its tile sizes, and tensors that the bulk copy engine reads."""
    return config.sm90 and problem.bulk_copies and fits_gather_sm90(problem, target)


def leaves_teacher(problem: Problem, config: BackwardConfig) -> bool:
    """Whether the kernel can keep the teacher."""
    return True


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
    """The entries of a tile's rows, and whether the rows are the work item's."""
    entry = tile * shape.entries + row // shape.group_size
    inside = row < shape.entries * shape.group_size
    return entry, inside & (entry >= tiles.begin) & (entry < tiles.stop)


@gluon.jit
def copy_row_vectors(x, base, query, head, present, buffer):
    """Begin to copy the vectors of rows [N] to a buffer [N, D]; zeros for rows that are not present."""
    layout: gl.constexpr = query.type.layout.parent
    d = gl.arange(0, buffer.shape[1], gl.SliceLayout(0, layout))
    rows = base + query.to(gl.int64) * x.stride_s + head.to(gl.int64) * x.stride_h
    async_copy.async_copy_global_to_shared(buffer, rows[:, None] + d[None, :], mask=present[:, None])


@gluon.jit
def copy_rows(q, grad_out, boxes, buffers, barriers, work, shape: gl.constexpr):
    """The copying warps' work: the block's keys and values, then q, dO, lse2 and delta of every tile."""
    HEADS: gl.constexpr = shape.group_size
    STAGES: gl.constexpr = shape.stages
    LANES: gl.constexpr = shape.head_dim // 8
    PART: gl.constexpr = ROWS // 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    item = load_item(work.items, work.first_range, gl.program_id(1))
    group = (work.first_range + gl.program_id(1)) // work.group_ranges
    if item.begin < item.stop:
        at = [gl.cast(item.batch, gl.int32), group, item.first_key, 0]
        copy_block(boxes.k, boxes.v, at, barriers.keys_full, buffers.k, buffers.v)
        first_head = gl.cast(group, gl.int64) * HEADS
        q_base = q.ptr + item.batch * q.stride_b + first_head * q.stride_h
        grad_base = grad_out.ptr + item.batch * grad_out.stride_b + first_head * grad_out.stride_h
        tiles = find_tiles(item, shape.entries)
        for step in range(tiles.number):
            tile, stage = tile_of(tiles, step), step % STAGES
            ready = barriers.full.index(stage)
            mbarrier.wait(barriers.empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, 2 * boxes.lse2.block_type.nbytes)
            tma.async_copy_global_to_shared(boxes.lse2, [tile * ROWS], ready, buffers.lse2.index(stage))
            tma.async_copy_global_to_shared(boxes.delta, [tile * ROWS], ready, buffers.delta.index(stage))
            for part in gl.static_range(2):
                row = part * PART + gl.arange(0, PART, gl.SliceLayout(1, layout))
                entry, present = find_present(tiles, tile, row, shape)
                query = gl.load(work.rows.queries + entry, mask=present, other=0)
                q_part = buffers.q.index(stage).slice(part * PART, PART)
                copy_row_vectors(q, q_base, query, row % HEADS, present, q_part)
                grad_part = buffers.grad.index(stage).slice(part * PART, PART)
                copy_row_vectors(grad_out, grad_base, query, row % HEADS, present, grad_part)
            async_copy.mbarrier_arrive(ready, increment_count=False)


@gluon.jit
def keep_teacher(teacher_ptr, total, tiles, tile, shape: gl.constexpr, masked: gl.constexpr):
    """Write the teacher, from its total over the heads, of a tile's entries; if masked, of those of the work item."""
    number = gl.arange(0, shape.means, gl.SliceLayout(0, total.type.layout))
    key = gl.arange(0, shape.block_size, gl.SliceLayout(1, total.type.layout))
    entry = tile * shape.entries + number
    present = number < shape.entries
    if masked:
        present = present & (entry >= tiles.begin) & (entry < tiles.stop)
    store_teacher(
        teacher_ptr, entry, key, total * (1.0 / shape.group_size), present[None, :] & (key >= 0)[:, None], shape
    )


@gluon.jit
def fold_rows(
    buffers,
    stage,
    tiles,
    tile,
    limits_ptr,
    teacher_ptr,
    grad_k,
    grad_v,
    scale,
    shape: gl.constexpr,
    masked: gl.constexpr,
):
    """Fold a tile into grad_k (without scale) and grad_v: (grad_k, grad_v, the rows' own grad_q); keep its teacher.

    grad_k may be in flight, before and after. masked: some rows do not see the whole block, or are not the work item's;
    then nothing is in flight after, because registers would not suffice. teacher_ptr: None to keep none.
    """
    dtype: gl.constexpr = buffers.k.dtype
    BLOCK: gl.constexpr = shape.block_size
    HEAD_DIM: gl.constexpr = shape.head_dim
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
    own: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HEAD_DIM // 2, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, grad_v.type.layout, 2)
    KEPT: gl.constexpr = teacher_ptr is not None
    # Products in flight behind the ones that are waited for.
    PENDING: gl.constexpr = 0 if masked else 1
    row = gl.arange(0, ROWS, gl.SliceLayout(0, scored))
    k, v = buffers.k.reshape([BLOCK, HEAD_DIM]), buffers.v.reshape([BLOCK, HEAD_DIM])
    q, grad = buffers.q.index(stage), buffers.grad.index(stage)

    # Scores are [keys, rows]: probabilities leave one product in the layout of the next one's operand.
    scores = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    scores = warpgroup_mma(k, q.permute((1, 0)), scores, use_acc=False, is_async=True)
    grad_probs = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    if not masked:
        grad_probs = warpgroup_mma(v, grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    scores, grad_k = warpgroup_mma_wait(PENDING, deps=[scores, grad_k])
    lse2 = buffers.lse2.index(stage).load(gl.SliceLayout(0, scored))
    probs = gl.exp2(scores * (scale * LOG2_E) - lse2[None, :])
    entry, present = find_present(tiles, tile, row, shape)
    if masked:
        limit = gl.load(limits_ptr + entry, mask=present, other=0)
        key = gl.arange(0, BLOCK, gl.SliceLayout(1, scored))
        probs = gl.where(key[:, None] < limit[None, :], probs, 0.0)
        grad_probs = warpgroup_mma(v, grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    weights = gl.convert_layout(probs.to(dtype), operand)
    grad_v = warpgroup_mma(weights, grad, grad_v, is_async=True)
    if KEPT:
        MEANS: gl.constexpr = shape.means
        meant: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, MEANS, 16])
        total = gl.zeros([BLOCK, MEANS], gl.float32, meant)
        shares = gl.convert_layout(weights, gl.DotOperandLayout(0, meant, 2))
        total = warpgroup_mma(shares, buffers.owned.permute((1, 0)), total, use_acc=False, is_async=True)
    grad_probs = warpgroup_mma_wait(2 if KEPT else 1, deps=[grad_probs])
    delta = buffers.delta.index(stage).load(gl.SliceLayout(0, scored))
    if masked:
        delta = gl.where(present, delta, 0.0)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(dtype)
    buffers.grad_scores.store(grad_scores)
    fence_async_shared()
    # Wait until the grad_q of the step before has left its buffer: here, because the warps meet here in any case.
    tma.store_wait(0)
    grad_q = gl.zeros([ROWS, HEAD_DIM], gl.float32, own)
    grad_q = warpgroup_mma(buffers.grad_scores.permute((1, 0)), k, grad_q, use_acc=False, is_async=True)
    grad_k = warpgroup_mma(gl.convert_layout(grad_scores, operand), q, grad_k, is_async=True)
    if KEPT:
        grad_q, grad_v, total = warpgroup_mma_wait(PENDING, deps=[grad_q, grad_v, total])
        keep_teacher(teacher_ptr, total, tiles, tile, shape, masked)
    else:
        grad_q, grad_v = warpgroup_mma_wait(PENDING, deps=[grad_q, grad_v])
    if masked:
        grad_k = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[grad_k]))
    return grad_k, grad_v, (grad_q * scale).to(dtype)


@gluon.jit
def store_present(partial_q_ptr, grad_q, tiles, tile, shape: gl.constexpr):
    """Write the rows of grad_q that are the work item's."""
    row = gl.arange(0, grad_q.shape[0], gl.SliceLayout(1, grad_q.type.layout))
    d = gl.arange(0, grad_q.shape[1], gl.SliceLayout(0, grad_q.type.layout))
    _, present = find_present(tiles, tile, row, shape)
    place = (gl.cast(tile, gl.int64) * ROWS + row)[:, None] * grad_q.shape[1] + d[None, :]
    gl.store(partial_q_ptr + place, grad_q, mask=present[:, None])


@gluon.jit
def store_sum(sums_ptr, partial_ptr, grad, place, slot, count):
    """Add a block's gradient [BLOCK, D], of `count` keys, to the sums from key `place` on, or write it to a slot."""
    BLOCK: gl.constexpr = grad.shape[0]
    HEAD_DIM: gl.constexpr = grad.shape[1]
    key = gl.arange(0, BLOCK, gl.SliceLayout(1, grad.type.layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, grad.type.layout))
    tile = key[:, None] * HEAD_DIM + d[None, :]
    mask = (key < count)[:, None]
    if slot < 0:
        at = sums_ptr + place * HEAD_DIM + tile
        gl.store(at, grad + gl.load(at, mask=mask, other=0.0), mask=mask)
    else:
        gl.store(partial_ptr + slot * (BLOCK * HEAD_DIM) + tile, grad, mask=mask)


@gluon.jit
def mark_owned(owned, shape: gl.constexpr):
    """Fill owned [means, ROWS]: 1 where a row is an entry's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    number = gl.arange(0, shape.means, gl.SliceLayout(1, layout))
    row = gl.arange(0, ROWS, gl.SliceLayout(0, layout))
    is_owned = (row // shape.group_size)[None, :] == number[:, None]
    owned.store(gl.where(is_owned & (number < shape.entries)[:, None], 1.0, 0.0).to(owned.dtype))
    fence_async_shared()


@gluon.jit
def multiply_rows(boxes, buffers, barriers, work, scale, shape: gl.constexpr):
    """The work of the other eight warps: dK and dV of the work item, dQ of each row in it, and the teacher."""
    HEAD_DIM: gl.constexpr = shape.head_dim
    BLOCK: gl.constexpr = shape.block_size
    STAGES: gl.constexpr = shape.stages
    ENTRIES: gl.constexpr = shape.entries
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD_DIM, 16])
    rows, partial = work.rows, work.partial
    item = load_item(work.items, work.first_range, gl.program_id(1))
    if item.begin < item.stop:
        if partial.teacher is not None:
            mark_owned(buffers.owned, shape)
        mbarrier.wait(barriers.keys_full, 0)
        count = item.stop_key - item.first_key
        if count < BLOCK:
            clear_rows(buffers.k.reshape([BLOCK, HEAD_DIM]), count)
            clear_rows(buffers.v.reshape([BLOCK, HEAD_DIM]), count)
        meet()
        grad_k = warpgroup_mma_init(gl.zeros([BLOCK, HEAD_DIM], gl.float32, summed))
        grad_v = gl.zeros([BLOCK, HEAD_DIM], gl.float32, summed)
        tiles = find_tiles(item, ENTRIES)
        # Queries ascend: those that do not see the whole block come first.
        step, masked = 0, True
        while masked:
            tile, stage = tile_of(tiles, step), step % STAGES
            mbarrier.wait(barriers.full.index(stage), step // STAGES & 1)
            fence_async_shared()
            grad_k, grad_v, grad_q = fold_rows(
                buffers, stage, tiles, tile, rows.limits, partial.teacher, grad_k, grad_v, scale, shape, True
            )
            mbarrier.arrive(barriers.empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            store_present(partial.q, grad_q, tiles, tile, shape)
            step += 1
            masked = step < tiles.number
            if masked:
                first = tile_of(tiles, step) * ENTRIES
                masked = first < tiles.begin
                if not masked:
                    masked = gl.load(rows.limits + first) < BLOCK
        meet()
        for later in range(step, tiles.number):
            tile, stage = tile_of(tiles, later), later % STAGES
            mbarrier.wait(barriers.full.index(stage), later // STAGES & 1)
            fence_async_shared()
            grad_k, grad_v, grad_q = fold_rows(
                buffers, stage, tiles, tile, rows.limits, partial.teacher, grad_k, grad_v, scale, shape, False
            )
            buffers.grad_q.store(grad_q)
            fence_async_shared()
            # The step before this one had a product in flight until this one's first was done.
            mbarrier.arrive(barriers.empty.index((later + STAGES - 1) % STAGES), count=1)
            tma.async_copy_shared_to_global(boxes.grad_q, [tile * ROWS, 0], buffers.grad_q)
        grad_k = warpgroup_mma_wait(0, deps=[grad_k])
        tma.store_wait(0)
        # Loaded again: the loops leave no register to keep it in.
        item, sums = load_item(work.items, work.first_range, gl.program_id(1)), work.sums
        group = (work.first_range + gl.program_id(1)) // work.group_ranges
        place = (item.batch * sums.num_kv_heads + group) * sums.seqlen_k + item.first_key
        store_sum(sums.k, partial.k, grad_k * scale, place, item.slot, item.stop_key - item.first_key)
        store_sum(sums.v, partial.v, grad_v, place, item.slot, item.stop_key - item.first_key)


@gluon.jit
def gradient_sm90_kernel(
    q, grad_out, k_boxes, v_boxes, lse2_boxes, delta_boxes, grad_q_boxes, work, scale, shape: gl.constexpr
):
    """See the module's docstring. Program (i, n) owns work item i of range n of a pass."""
    dtype: gl.constexpr = work.partial.q.dtype.element_ty
    tile: gl.constexpr = [shape.stages, ROWS, shape.head_dim]
    keys: gl.constexpr = [1, 1, shape.block_size, shape.head_dim]
    owned = None
    if work.partial.teacher is not None:
        owned = gl.allocate_shared_memory(dtype, [shape.means, ROWS], SIDE_BY_SIDE)
    buffers = Buffers(
        gl.allocate_shared_memory(dtype, tile, SIDE_BY_SIDE),
        gl.allocate_shared_memory(dtype, tile, SIDE_BY_SIDE),
        gl.allocate_shared_memory(gl.float32, [shape.stages, ROWS], lse2_boxes.layout),
        gl.allocate_shared_memory(gl.float32, [shape.stages, ROWS], delta_boxes.layout),
        gl.allocate_shared_memory(dtype, keys, k_boxes.layout),
        gl.allocate_shared_memory(dtype, keys, v_boxes.layout),
        gl.allocate_shared_memory(dtype, [shape.block_size, ROWS], SIDE_BY_SIDE),
        gl.allocate_shared_memory(dtype, [ROWS, shape.head_dim], grad_q_boxes.layout),
        owned,
    )
    # A stage is full when each copying thread's copies have arrived, and those of the bulk copy engine.
    keys_full, full = make_barriers(1, 1), make_barriers(shape.stages, 1 + 32 * COPYING)
    empty = make_barriers(shape.stages, 1)
    fence_async_shared()
    barriers = Barriers(keys_full.index(0), full, empty)
    boxes = Boxes(k_boxes, v_boxes, lse2_boxes, delta_boxes, grad_q_boxes)
    gl.warp_specialize(
        [
            (multiply_rows, (boxes, buffers, barriers, work, scale, shape)),
            (copy_rows, (q, grad_out, boxes, buffers, barriers, work, shape)),
        ],
        [COPYING],
        [REGISTERS],
    )


def gradient_launches(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, workspace: Workspace, problem: Problem, config: BackwardConfig
) -> list[Launch]:
    """The one launch, as from `gradient.gradient_launches`."""
    head_dim, keys = problem.head_dim, [1, 1, problem.block_size, problem.head_dim]
    sizes = tiles(problem, config)
    # Made once: a descriptor costs the host as much as a launch.
    arguments = {
        "q": view(q),
        "grad_out": view(grad_out),
        "k_boxes": shared_box(k, keys),
        "v_boxes": shared_box(v, keys),
        "lse2_boxes": shared_box(workspace.rows.lse2.view(-1), [ROWS.value]),
        "delta_boxes": shared_box(workspace.rows.delta.view(-1), [ROWS.value]),
        "grad_q_boxes": shared_box(workspace.partial.q.view(-1, head_dim), [ROWS.value, head_dim]),
    }
    shape = GradientShape(**vars(sizes), stages=config.num_stages, means=max(8, sizes.teacher_rows))
    return [Launch(gradient_sm90_kernel, (0, 0, 0), arguments, {"shape": shape}, Options(8))]
