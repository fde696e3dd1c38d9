"""The backward's main kernel for Hopper, in Gluon: warps that copy run ahead of the warps that multiply.

It computes the same as `gradient`. There Triton's own pipeline waits for each product before it goes on; here the
products of a step are in flight beside the arithmetic between them, and the last one beside the next step. One warp
fetches the rows of q and dO an entry at a time with the bulk copy engine, in halves of the head dim, which lie side by
side as the tensor cores take them. Entries of few rows would be too many copies: there four warps copy the rows one by
one. The engine also fetches the block, lse2 and delta, and writes the rows' own dQ.
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
from ..common.gluon_sm90 import HALF, SIDE_BY_SIDE, clear_rows, copy_block, gather_rows, make_barriers, meet, shared_box
from ..common.launch import Launch, Options, view
from ..common.softmax import LOG2_E
from ..common.target import Target, fits_gather_sm90
from ..loss.teacher import store_teacher
from ..schedule.work_items import load_item
from .config import BackwardConfig
from .workspace import TileSizes, Workspace, tile_sizes

ROWS = gl.constexpr(64)
BULK = (8, 16, 32, 64)


class Boxes(NamedTuple):
    """Descriptors of the bulk copy engine: q or dO of an entry, half of the head dim; K or V of a block; and of a tile's
    rows the queries, lse2, delta or dQ.
    """

    q: Any
    grad: Any
    queries: Any
    k: Any
    v: Any
    lse2: Any
    delta: Any
    grad_q: Any


class Buffers(NamedTuple):
    """Shared memory: q, dO, lse2 and delta of a tile for each stage; K and V of the block; dS and dQ of a tile.

    queries: of two tiles; heads: of the rows of any tile; weights: the probabilities. owned [means, ROWS]: which rows are an entry's, None if no teacher is kept.
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


@dataclass(frozen=True)
class GradientShape(TileSizes):
    """Constants of `gradient_sm90_kernel`.

    stages: buffers of q and dO; means: teacher_rows, as products need them; bulk: rows come by the bulk copy engine.
    """

    stages: int
    means: int
    bulk: bool


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
    async_copy.async_copy_global_to_shared(buffer, rows[:, None] + d[None, :], mask=present[:, None])


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
            tma.async_copy_global_to_shared(boxes.queries, place, barriers.known.index(0), buffers.queries.index(0))
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
                    tma.async_copy_global_to_shared(boxes.queries, place, known, buffers.queries.index(following))
                mbarrier.wait(barriers.known.index(step % 2), step // 2 & 1)
                for part in gl.static_range(ROWS // PART):
                    query = buffers.queries.index(step % 2).slice(part * PART, PART).load(gl.SliceLayout(1, layout))
                    row = part * PART + gl.arange(0, PART, gl.SliceLayout(1, layout))
                    head = row % shape.group_size
                    if shape.entries < shape.teacher_rows:
                        head = buffers.heads.slice(part * PART, PART).load(gl.SliceLayout(1, layout))
                    present = find_present(tiles, tile, row, shape)
                    q_part = buffers.q.index(stage).slice(part * PART, PART)
                    copy_vectors(q, item.batch, first_head, query, head, present, q_part, shape)
                    grad_part = buffers.grad.index(stage).slice(part * PART, PART)
                    copy_vectors(grad_out, item.batch, first_head, query, head, present, grad_part, shape)
                async_copy.mbarrier_arrive(ready, increment_count=False)
            tma.async_copy_global_to_shared(boxes.lse2, [tile * ROWS], ready, buffers.lse2.index(stage))
            tma.async_copy_global_to_shared(boxes.delta, [tile * ROWS], ready, buffers.delta.index(stage))


@gluon.jit
def keep_teacher(teacher_ptr, total, tiles, tile, shape: gl.constexpr, masked: gl.constexpr):
    """Write the teacher, from its total over the heads, of a tile's entries; if masked, of those of the work item."""
    number = gl.arange(0, total.shape[1], gl.SliceLayout(0, total.type.layout))
    key = gl.arange(0, shape.block_size, gl.SliceLayout(1, total.type.layout))
    entry = tile * shape.entries + number
    present = number < shape.entries
    if masked:
        present = present & (entry >= tiles.begin) & (entry < tiles.stop)
    mask = present[None, :] & (key >= 0)[:, None]
    store_teacher(teacher_ptr, tile, number, key, total * (1.0 / shape.group_size), mask, shape)


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
    q_tiles, grad_tiles = buffers.q, buffers.grad
    if shape.bulk:
        q_tiles = q_tiles._reinterpret(dtype, [shape.stages, ROWS, HEAD_DIM], SIDE_BY_SIDE)
        grad_tiles = grad_tiles._reinterpret(dtype, [shape.stages, ROWS, HEAD_DIM], SIDE_BY_SIDE)
    q, grad = q_tiles.index(stage), grad_tiles.index(stage)

    # Scores are [keys, rows]: probabilities leave one product in the layout of the next one's operand.
    scores = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    scores = warpgroup_mma(k, q.permute((1, 0)), scores, use_acc=False, is_async=True)
    grad_probs = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    if not masked:
        grad_probs = warpgroup_mma(v, grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    scores, grad_k = warpgroup_mma_wait(PENDING, deps=[scores, grad_k])
    lse2 = buffers.lse2.index(stage).load(gl.SliceLayout(0, scored))
    probs = gl.exp2(scores * (scale * LOG2_E) - lse2[None, :])
    present = find_present(tiles, tile, row, shape)
    if masked:
        entry = tile * shape.entries + row // shape.group_size
        limit = gl.load(limits_ptr + entry, mask=present, other=0)
        key = gl.arange(0, BLOCK, gl.SliceLayout(1, scored))
        probs = gl.where(key[:, None] < limit[None, :], probs, 0.0)
        grad_probs = warpgroup_mma(v, grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    weights = probs.to(dtype)
    grad_v = warpgroup_mma(gl.convert_layout(weights, operand), grad, grad_v, is_async=True)
    grad_probs = warpgroup_mma_wait(1, deps=[grad_probs])
    delta = buffers.delta.index(stage).load(gl.SliceLayout(0, scored))
    if masked:
        delta = gl.where(present, delta, 0.0)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(dtype)
    buffers.grad_scores.store(grad_scores)
    if KEPT and shape.means > 0:
        buffers.weights.store(weights)
    fence_async_shared()
    # Wait until the grad_q of the step before has left its buffer: here, because the warps meet here in any case.
    tma.store_wait(0)
    if KEPT and shape.means > 0:
        MEANS: gl.constexpr = shape.means
        meant: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, MEANS, 16])
        total = gl.zeros([BLOCK, MEANS], gl.float32, meant)
        total = warpgroup_mma(buffers.weights, buffers.owned.permute((1, 0)), total, use_acc=False, is_async=True)
    grad_q = gl.zeros([ROWS, HEAD_DIM], gl.float32, own)
    grad_q = warpgroup_mma(buffers.grad_scores.permute((1, 0)), k, grad_q, use_acc=False, is_async=True)
    grad_k = warpgroup_mma(gl.convert_layout(grad_scores, operand), q, grad_k, is_async=True)
    if KEPT and shape.means == 0:
        # Beside the products: no entry lies in two tiles' registers.
        ENTRIES: gl.constexpr = shape.entries
        HEADS: gl.constexpr = shape.group_size
        total = weights.to(gl.float32)
        if HEADS > 1:
            total = gl.sum(total.reshape([BLOCK, ENTRIES, HEADS]), axis=2)
        keep_teacher(teacher_ptr, total, tiles, tile, shape, masked)
    if KEPT and shape.means > 0:
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
    present = find_present(tiles, tile, row, shape)
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
        if buffers.owned is not None:
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
            if not shape.bulk:
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
            if not shape.bulk:
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
    q, grad_out, q_boxes, grad_boxes, queries_boxes, k_boxes, v_boxes, lse2_boxes, delta_boxes, grad_q_boxes, work,
    scale, shape: gl.constexpr,
):  # fmt: skip
    """See the module's docstring. Program (i, n) owns work item i of range n of a pass."""
    dtype: gl.constexpr = work.partial.q.dtype.element_ty
    HALVES: gl.constexpr = shape.head_dim // HALF
    entries: gl.constexpr = [shape.stages * HALVES * shape.entries, 1, shape.group_size, 1, HALF]
    tile: gl.constexpr = entries if shape.bulk else [shape.stages, ROWS, shape.head_dim]
    gathered: gl.constexpr = q_boxes.layout if shape.bulk else SIDE_BY_SIDE
    keys: gl.constexpr = [1, 1, shape.block_size, shape.head_dim]
    weights = None
    owned = None
    if work.partial.teacher is not None and shape.means > 0:
        weights = gl.allocate_shared_memory(dtype, [shape.block_size, ROWS], SIDE_BY_SIDE)
        owned = gl.allocate_shared_memory(dtype, [shape.means, ROWS], SIDE_BY_SIDE)
    buffers = Buffers(
        gl.allocate_shared_memory(dtype, tile, gathered),
        gl.allocate_shared_memory(dtype, tile, gathered),
        gl.allocate_shared_memory(gl.int32, [2, ROWS], queries_boxes.layout),
        gl.allocate_shared_memory(gl.int32, [ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0])),
        gl.allocate_shared_memory(gl.float32, [shape.stages, ROWS], lse2_boxes.layout),
        gl.allocate_shared_memory(gl.float32, [shape.stages, ROWS], delta_boxes.layout),
        gl.allocate_shared_memory(dtype, keys, k_boxes.layout),
        gl.allocate_shared_memory(dtype, keys, v_boxes.layout),
        gl.allocate_shared_memory(dtype, [shape.block_size, ROWS], SIDE_BY_SIDE),
        gl.allocate_shared_memory(dtype, [ROWS, shape.head_dim], grad_q_boxes.layout),
        weights,
        owned,
    )
    COPYING: gl.constexpr = 1 if shape.bulk else 4
    REGISTERS: gl.constexpr = 24
    # A stage is full when the copies of the bulk copy engine have arrived, and those of each copying thread.
    keys_full, known = make_barriers(1, 1), make_barriers(2, 1)
    full, empty = make_barriers(shape.stages, 1 if shape.bulk else 1 + 32 * COPYING), make_barriers(shape.stages, 1)
    fence_async_shared()
    barriers = Barriers(keys_full.index(0), known, full, empty)
    boxes = Boxes(q_boxes, grad_boxes, queries_boxes, k_boxes, v_boxes, lse2_boxes, delta_boxes, grad_q_boxes)
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
    sizes, rows = tiles(problem, config), workspace.rows
    bulk = problem.group_size in BULK
    entry = [1, problem.group_size if bulk else 1, 1, HALF.value]
    # Made once: a descriptor costs the host as much as a launch.
    arguments = {
        "q": view(q),
        "grad_out": view(grad_out),
        "q_boxes": shared_box(q, entry),
        "grad_boxes": shared_box(grad_out, entry),
        "queries_boxes": shared_box(rows.queries.view(-1), [ROWS.value]),
        "k_boxes": shared_box(k, keys),
        "v_boxes": shared_box(v, keys),
        "lse2_boxes": shared_box(rows.lse2.view(-1), [ROWS.value]),
        "delta_boxes": shared_box(rows.delta.view(-1), [ROWS.value]),
        "grad_q_boxes": shared_box(workspace.partial.q.view(-1, head_dim), [ROWS.value, head_dim]),
    }
    power = sizes.entries == sizes.teacher_rows
    means = 0 if power else max(8, sizes.teacher_rows)
    shape = GradientShape(**vars(sizes), stages=config.num_stages, means=means, bulk=bulk)
    return [Launch(gradient_sm90_kernel, (0, 0, 0), arguments, {"shape": shape}, Options(8))]
