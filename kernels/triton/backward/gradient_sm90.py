"""The backward's main kernel for Hopper, in Gluon: warps that copy run ahead of the warps that multiply.

It computes the same as `gradient`. There Triton's own pipeline waits for each product before it goes on; here the
products of a step are in flight beside the arithmetic between them, and the last one beside the next step. The copying
warps are in `copies`; the bulk copy engine also writes the rows' own dQ and the teacher.
"""

import functools

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ...problem import Problem
from ..common.gluon_sm90 import (
    HALF,
    SIDE_BY_SIDE,
    clear_rows,
    make_barriers,
    meet,
    reinterpret,
    shared_box,
    store_box,
    store_sum,
)
from ..common.launch import Launch, Options, view
from ..common.softmax import LOG2_E
from ..common.target import Target, fits_gather_sm90
from ..loss.teacher import SCALE, store_teacher
from ..schedule.work_items import load_item
from .config import BackwardConfig
from .copies import ROWS, Barriers, Boxes, Buffers, GradientShape, copy_rows, find_present, find_tiles, tile_of
from .workspace import TileSizes, Workspace, tile_sizes


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
def sum_heads(probs, shape: gl.constexpr):
    """The sums of probs [BLOCK, ROWS] over the heads of each entry, which fill the tile: [BLOCK, entries]."""
    BLOCK: gl.constexpr = shape.block_size
    ENTRIES: gl.constexpr = shape.entries
    HEADS: gl.constexpr = shape.group_size
    return gl.sum(probs.reshape([BLOCK, ENTRIES, HEADS]), axis=2)


@gluon.jit
def keep_teacher(teacher_ptr, total, buffer, tiles, tile, shape: gl.constexpr, masked: gl.constexpr):
    """Write the teacher, from its total over the heads, of a tile's entries; if masked, of the work item's alone.

    Where it can, the bulk copy engine stores it from the buffer.
    """
    mean = total * (1.0 / shape.group_size)
    if masked or shape.kept == "before":
        number = gl.arange(0, total.shape[1], gl.SliceLayout(0, total.type.layout))
        key = gl.arange(0, shape.block_size, gl.SliceLayout(1, total.type.layout))
        entry = tile * shape.entries + number
        present = number < shape.entries
        if masked:
            present = present & (entry >= tiles.begin) & (entry < tiles.stop)
        store_teacher(teacher_ptr, tile, number, key, mean, present[None, :] & (key >= 0)[:, None], shape)
    else:
        buffer.permute((1, 0)).store((mean * SCALE).to(gl.float16))


@gluon.jit
def fold_rows(
    buffers, stage, tiles, tile, limits_ptr, teacher_ptr, grad_k, grad_v, scale,
    shape: gl.constexpr, masked: gl.constexpr,
):  # fmt: skip
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
    # Products in flight behind the ones that are waited for.
    PENDING: gl.constexpr = 0 if masked else 1
    row = gl.arange(0, ROWS, gl.SliceLayout(0, scored))
    k, v = buffers.k.reshape([BLOCK, HEAD_DIM]), buffers.v.reshape([BLOCK, HEAD_DIM])
    q_tiles, grad_tiles = buffers.q, buffers.grad
    if shape.bulk:
        q_tiles = reinterpret(q_tiles, dtype, [shape.stages, ROWS, HEAD_DIM], SIDE_BY_SIDE)
        grad_tiles = reinterpret(grad_tiles, dtype, [shape.stages, ROWS, HEAD_DIM], SIDE_BY_SIDE)
    q, grad = q_tiles.index(stage), grad_tiles.index(stage)

    if not masked:  # Before the products, which read shared memory too and would delay it.
        lse2 = buffers.lse2.index(stage).load(gl.SliceLayout(0, scored))
    # Scores are [keys, rows]: probabilities leave one product in the layout of the next one's operand.
    scores = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    scores = warpgroup_mma(k, q.permute((1, 0)), scores, use_acc=False, is_async=True)
    grad_probs = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    if not masked:
        grad_probs = warpgroup_mma(v, grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    scores, grad_k = warpgroup_mma_wait(PENDING, deps=[scores, grad_k])
    if masked:
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
    if shape.kept == "before":
        keep_teacher(teacher_ptr, sum_heads(probs, shape), buffers.teacher, tiles, tile, shape, masked)
    grad_probs = warpgroup_mma_wait(1, deps=[grad_probs])
    delta = buffers.delta.index(stage).load(gl.SliceLayout(0, scored))
    if masked:
        delta = gl.where(present, delta, 0.0)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(dtype)
    buffers.grad_scores.store(grad_scores)
    if shape.kept == "product":
        buffers.weights.store(weights)
    fence_async_shared()
    # Wait until the grad_q of the step before has left its buffer: here, because the warps meet here in any case.
    tma.store_wait(0)
    if shape.kept == "product":
        MEANS: gl.constexpr = shape.teacher_rows
        meant: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, MEANS, 16])
        total = gl.zeros([BLOCK, MEANS], gl.float32, meant)
        total = warpgroup_mma(buffers.weights, buffers.owned.permute((1, 0)), total, use_acc=False, is_async=True)
    grad_q = gl.zeros([ROWS, HEAD_DIM], gl.float32, own)
    grad_q = warpgroup_mma(buffers.grad_scores.permute((1, 0)), k, grad_q, use_acc=False, is_async=True)
    grad_k = warpgroup_mma(gl.convert_layout(grad_scores, operand), q, grad_k, is_async=True)
    if shape.kept == "beside":
        total = weights.to(gl.float32)
        if shape.group_size > 1:
            total = sum_heads(total, shape)
        keep_teacher(teacher_ptr, total, buffers.teacher, tiles, tile, shape, masked)
    if shape.kept == "product":
        grad_q, grad_v, total = warpgroup_mma_wait(PENDING, deps=[grad_q, grad_v, total])
        keep_teacher(teacher_ptr, total, buffers.teacher, tiles, tile, shape, masked)
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
def mark_owned(owned, shape: gl.constexpr):
    """Fill owned [teacher_rows, ROWS]: 1 where a row is an entry's."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    TEACHER_ROWS: gl.constexpr = shape.teacher_rows
    number = gl.arange(0, TEACHER_ROWS, gl.SliceLayout(1, layout))
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
            store_box(boxes.grad_q, [tile * ROWS, 0], buffers.grad_q)
            if buffers.teacher is not None:
                store_box(boxes.teacher, [tile * shape.teacher_rows, 0], buffers.teacher)
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
    q, grad_out, q_boxes, grad_boxes, queries_boxes, k_boxes, v_boxes, lse2_boxes, delta_boxes, grad_q_boxes,
    teacher_boxes, work, scale, shape: gl.constexpr,
):  # fmt: skip
    """See the module's docstring. Program (i, n) owns work item i of range n of a pass."""
    dtype: gl.constexpr = work.partial.q.dtype.element_ty
    HALVES: gl.constexpr = shape.head_dim // HALF
    entries: gl.constexpr = [shape.stages * HALVES * shape.entries, 1, shape.group_size, 1, HALF]
    tile: gl.constexpr = entries if shape.bulk else [shape.stages, ROWS, shape.head_dim]
    gathered: gl.constexpr = q_boxes.layout if shape.bulk else SIDE_BY_SIDE
    keys: gl.constexpr = [1, 1, shape.block_size, shape.head_dim]
    TEACHER_ROWS: gl.constexpr = shape.teacher_rows
    teacher = None
    weights = None
    owned = None
    if shape.kept == "beside" or shape.kept == "product":
        teacher = gl.allocate_shared_memory(gl.float16, [TEACHER_ROWS, shape.block_size], teacher_boxes.layout)
    if shape.kept == "product":
        weights = gl.allocate_shared_memory(dtype, [shape.block_size, ROWS], SIDE_BY_SIDE)
        owned = gl.allocate_shared_memory(dtype, [TEACHER_ROWS, ROWS], SIDE_BY_SIDE)
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
        teacher,
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
    boxes = Boxes(
        q_boxes, grad_boxes, queries_boxes, k_boxes, v_boxes, lse2_boxes, delta_boxes, grad_q_boxes, teacher_boxes
    )
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
    sizes, gathered = tiles(problem, config), workspace.rows
    bulk = problem.group_size in (8, 16, 32, 64)
    entry = [1, problem.group_size if bulk else 1, 1, HALF.value]
    # Made once: a descriptor costs the host as much as a launch.
    arguments = {
        "q": view(q),
        "grad_out": view(grad_out),
        "q_boxes": shared_box(q, entry),
        "grad_boxes": shared_box(grad_out, entry),
        "queries_boxes": shared_box(gathered.queries.view(-1), [ROWS.value]),
        "k_boxes": shared_box(k, keys),
        "v_boxes": shared_box(v, keys),
        "lse2_boxes": shared_box(gathered.lse2.view(-1), [ROWS.value]),
        "delta_boxes": shared_box(gathered.delta.view(-1), [ROWS.value]),
        "grad_q_boxes": shared_box(workspace.partial.q.view(-1, head_dim), [ROWS.value, head_dim]),
        "teacher_boxes": None,
    }
    teacher, kept = workspace.partial.teacher, ""
    if teacher is not None:
        kept = "product"
        if sizes.entries * problem.group_size == ROWS.value:
            kept = "beside" if sizes.entries >= 8 else "before"
        rows = [sizes.teacher_rows, sizes.block_size]
        arguments["teacher_boxes"] = shared_box(teacher.view(-1, sizes.block_size), rows)
    shape = GradientShape(**vars(sizes), stages=config.num_stages, bulk=bulk, kept=kept)
    return [Launch(gradient_sm90_kernel, (0, 0, 0), arguments, {"shape": shape}, Options(8))]
