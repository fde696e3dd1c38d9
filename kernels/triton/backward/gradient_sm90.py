"""The backward's main kernel for Hopper, in Gluon: one warp gathers, and runs ahead of the warps that multiply.

It does what `backward_gradient` does. There Triton's own pipeline waits for each product before it goes on; here the
products of a step are in flight beside the arithmetic between them, and the last one beside the next step. The copying
warp fetches q and dO an entry at a time with the bulk copy engine, in halves of the head dim, which lie side by side as
the tensor cores take them. The rows' own dQ, [entries, G, D], leaves by the same engine.

Triton's interpreter knows no Gluon: the checks of `benchmarks/gpu.py` compare this kernel with the oracle.
"""

from collections.abc import Callable

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

from ..common.gluon_sm90 import HALF, SIDE_BY_SIDE, clear_rows, copy_block, gather_rows, make_barriers, meet, shared_box
from ..common.primitives import LOG2_E
from ..schedule.work_items import ItemsRecord, WorkItems, load_item
from .config import BackwardConfig
from .preprocess import Workspace

ROWS = gl.constexpr(64)


@gluon.jit
def first_step(first, last, ENTRIES: gl.constexpr):
    """The entry that a piece's first step begins with: only that step may lack entries, the first ones."""
    return last - (last - first + ENTRIES - 1) // ENTRIES * ENTRIES


@gluon.jit
def copy_rows(
    tiles, buffers, barriers, pointers, numbers, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr
):
    """The copying warp's work: the block's keys and values, then q, dO, lse and delta of every step's rows."""
    q_tiles, grad_tiles, k_tiles, v_tiles, lse2_tiles, delta_tiles, _ = tiles
    q_boxes, grad_boxes, k_box, v_box, lse2_buffers, delta_buffers, _, _ = buffers
    keys_full, full, empty = barriers
    plan_ptr, queries_ptr, _, _ = pointers
    chunk, group, num_items, _, _, _ = numbers
    ENTRIES: gl.constexpr = ROWS // HEADS
    HALVES: gl.constexpr = HEAD_DIM // HALF
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    batch, first_key, first, last = item.batch, item.first_key, item.begin, item.stop
    batch = gl.cast(batch, gl.int32)
    if first < last:
        copy_block(k_tiles, v_tiles, [batch, group, first_key, 0], keys_full, k_box, v_box)
        begin = first_step(first, last, ENTRIES)
        for step in range((last - begin) // ENTRIES):
            start, stage = begin + step * ENTRIES, step % STAGES
            ready = full.index(stage)
            # All before any copy is asked for, so that they are under way together. In the place of an entry that
            # lacks, any of the list: numbers that are finite if the others are.
            queries = ()
            for entry in gl.static_range(ENTRIES):
                queries += (gl.load(queries_ptr + gl.maximum(start + entry, first)),)  # type: ignore[assignment]
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, 2 * (ENTRIES * HALVES * q_tiles.block_type.nbytes + lse2_tiles.block_type.nbytes))
            tma.async_copy_global_to_shared(lse2_tiles, [start * HEADS], ready, lse2_buffers.index(stage))
            tma.async_copy_global_to_shared(delta_tiles, [start * HEADS], ready, delta_buffers.index(stage))
            gather_rows(q_tiles, q_boxes, queries, batch, group * HEADS, stage, ready, HALVES)
            gather_rows(grad_tiles, grad_boxes, queries, batch, group * HEADS, stage, ready, HALVES)


@gluon.jit
def fold_rows(
    rows, block, grad_scores_buffer, grad_k, grad_v, limits_ptr, missing, scale,
    HEADS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Fold a step's rows into grad_k (without scale) and grad_v: (grad_k, grad_v, the rows' own grad_q).

    grad_k may be in flight, before and after. MASKED: there are rows that do not see the whole block, or the first
    `missing` rows are not there; then nothing is in flight after, as registers would not suffice.
    """
    q, grad, lse2_buffer, delta_buffer = rows
    k, v = block
    dtype: gl.constexpr = k.dtype
    BLOCK: gl.constexpr = k.shape[0]
    HEAD_DIM: gl.constexpr = k.shape[1]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
    own: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HEAD_DIM // 2, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, grad_v.type.layout, 2)
    PENDING: gl.constexpr = 0 if MASKED else 1
    row = gl.arange(0, ROWS, gl.SliceLayout(0, scored))

    # Scores are [keys, rows]: as they leave one product, probabilities are an operand of the next.
    scores = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    scores = warpgroup_mma(k, q.permute((1, 0)), scores, use_acc=False, is_async=True)
    grad_probs = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    if not MASKED:
        grad_probs = warpgroup_mma(v, grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    scores, grad_k = warpgroup_mma_wait(PENDING, deps=[scores, grad_k])
    lse2 = lse2_buffer.load(gl.SliceLayout(0, scored))
    probs = gl.exp2(scores * (scale * LOG2_E) - lse2[None, :])
    if MASKED:
        limit = gl.load(limits_ptr + row // HEADS, mask=row >= missing, other=0)
        key = gl.arange(0, BLOCK, gl.SliceLayout(1, scored))
        probs = gl.where(key[:, None] < limit[None, :], probs, 0.0)
        grad_probs = warpgroup_mma(v, grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    weights = gl.convert_layout(probs.to(dtype), operand)
    grad_v = warpgroup_mma(weights, grad, grad_v, is_async=True)
    grad_probs = warpgroup_mma_wait(1, deps=[grad_probs])
    delta = delta_buffer.load(gl.SliceLayout(0, scored))
    if MASKED:
        delta = gl.where(row < missing, 0.0, delta)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(dtype)
    grad_scores_buffer.store(grad_scores)
    fence_async_shared()
    # The grad_q of the step before has left its buffer: said here, where the warps meet in any case.
    tma.store_wait(0)
    grad_q = gl.zeros([ROWS, HEAD_DIM], gl.float32, own)
    grad_q = warpgroup_mma(grad_scores_buffer.permute((1, 0)), k, grad_q, use_acc=False, is_async=True)
    grad_k = warpgroup_mma(gl.convert_layout(grad_scores, operand), q, grad_k, is_async=True)
    grad_q, grad_v = warpgroup_mma_wait(PENDING, deps=[grad_q, grad_v])
    if MASKED:
        grad_k = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[grad_k]))
    return grad_k, grad_v, (grad_q * scale).to(dtype)


@gluon.jit
def store_present(partial_q_ptr, grad_q, missing):
    """Write the rows of grad_q but for the first `missing`."""
    row = gl.arange(0, grad_q.shape[0], gl.SliceLayout(1, grad_q.type.layout))
    depth = gl.arange(0, grad_q.shape[1], gl.SliceLayout(0, grad_q.type.layout))
    gl.store(partial_q_ptr + row[:, None] * grad_q.shape[1] + depth[None, :], grad_q, mask=(row >= missing)[:, None])


@gluon.jit
def store_sum(sums_ptr, partial_ptr, grad, place, slot, count):
    """Add a block's gradient [BLOCK, D], of `count` keys, to the sums from key `place` on, or write it to a slot."""
    BLOCK: gl.constexpr = grad.shape[0]
    HEAD_DIM: gl.constexpr = grad.shape[1]
    key = gl.arange(0, BLOCK, gl.SliceLayout(1, grad.type.layout))
    depth = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, grad.type.layout))
    tile = key[:, None] * HEAD_DIM + depth[None, :]
    mask = (key < count)[:, None]
    if slot < 0:
        at = sums_ptr + place * HEAD_DIM + tile
        gl.store(at, grad + gl.load(at, mask=mask, other=0.0), mask=mask)
    else:
        gl.store(partial_ptr + slot * (BLOCK * HEAD_DIM) + tile, grad, mask=mask)


@gluon.jit
def multiply_rows(
    tiles, buffers, barriers, pointers, numbers, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr
):
    """The work of the other eight warps: dK and dV of the piece, and dQ of each row in it."""
    partial_tiles = tiles[6]
    q_boxes, grad_boxes, k_box, v_box, lse2_buffers, delta_buffers, grad_scores_buffer, grad_q_buffer = buffers
    keys_full, full, empty = barriers
    plan_ptr, _, limits_ptr, outputs = pointers
    partial_q_ptr, partial_k_ptr, partial_v_ptr, grad_k_ptr, grad_v_ptr = outputs
    chunk, group, num_items, seqlen_k, num_kv_heads, scale = numbers
    ENTRIES: gl.constexpr = ROWS // HEADS
    BLOCK: gl.constexpr = k_box.shape[2]
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD_DIM, 16])
    q_rows = q_boxes._reinterpret(k_box.dtype, [STAGES, ROWS, HEAD_DIM], SIDE_BY_SIDE)
    grad_rows = grad_boxes._reinterpret(k_box.dtype, [STAGES, ROWS, HEAD_DIM], SIDE_BY_SIDE)
    block = k_box.reshape([BLOCK, HEAD_DIM]), v_box.reshape([BLOCK, HEAD_DIM])
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    first_key, stop_key, first, last = item.first_key, item.stop_key, item.begin, item.stop
    if first < last:
        mbarrier.wait(keys_full, 0)
        count = stop_key - first_key
        if count < BLOCK:
            clear_rows(block[0], count)
            clear_rows(block[1], count)
        meet()
        grad_k = warpgroup_mma_init(gl.zeros([BLOCK, HEAD_DIM], gl.float32, summed))
        grad_v = gl.zeros([BLOCK, HEAD_DIM], gl.float32, summed)
        start, step = first_step(first, last, ENTRIES), 0
        # Queries ascend: those that do not see the whole block come first.
        masked = first < last
        while masked:
            stage = step % STAGES
            missing = gl.maximum(first - start, 0) * HEADS
            rows = q_rows.index(stage), grad_rows.index(stage), lse2_buffers.index(stage), delta_buffers.index(stage)
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            grad_k, grad_v, grad_q = fold_rows(
                rows, block, grad_scores_buffer, grad_k, grad_v, limits_ptr + start, missing, scale, HEADS, True
            )
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            store_present(partial_q_ptr + gl.cast(start, gl.int64) * (HEADS * HEAD_DIM), grad_q, missing)
            start += ENTRIES
            step += 1
            masked = start < last
            if masked:
                masked = gl.load(limits_ptr + start) < BLOCK
        meet()
        for entry in range(start, last, ENTRIES):
            stage = step % STAGES
            rows = q_rows.index(stage), grad_rows.index(stage), lse2_buffers.index(stage), delta_buffers.index(stage)
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            grad_k, grad_v, grad_q = fold_rows(
                rows, block, grad_scores_buffer, grad_k, grad_v, limits_ptr, 0, scale, HEADS, False
            )
            grad_q_buffer.store(grad_q)
            fence_async_shared()
            # The step before this one had a product in flight until this one's first was done.
            mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
            tma.async_copy_shared_to_global(partial_tiles, [entry * HEADS, 0], grad_q_buffer)
            step += 1
        grad_k = warpgroup_mma_wait(0, deps=[grad_k])
        tma.store_wait(0)
        # Loaded again: the loops leave no register to keep them in.
        item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
        batch, first_key, stop_key = item.batch, item.first_key, item.stop_key
        slot = item.slot
        place = (batch * num_kv_heads + group) * seqlen_k + first_key
        store_sum(grad_k_ptr, partial_k_ptr, grad_k * scale, place, slot, stop_key - first_key)
        store_sum(grad_v_ptr, partial_v_ptr, grad_v, place, slot, stop_key - first_key)


@gluon.jit(do_not_specialize=["chunk", "group", "num_items"])
def gradient_hopper_kernel(
    q_tiles,
    grad_tiles,
    k_tiles,
    v_tiles,
    lse2_tiles,
    delta_tiles,
    partial_tiles,
    plan_ptr,
    queries_ptr,
    limits_ptr,
    partial_q_ptr,
    partial_k_ptr,
    partial_v_ptr,
    grad_k_ptr,
    grad_v_ptr,
    chunk,
    group,
    num_items,
    seqlen_k,
    num_kv_heads,
    scale,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
    STAGES: gl.constexpr,
):
    """See the module's docstring. Program i owns item i of a chunk's plan."""
    dtype: gl.constexpr = partial_q_ptr.dtype.element_ty
    boxes: gl.constexpr = [STAGES * (HEAD_DIM // HALF) * (ROWS // HEADS), 1, HEADS, 1, HALF]
    buffers = (
        gl.allocate_shared_memory(dtype, boxes, q_tiles.layout),
        gl.allocate_shared_memory(dtype, boxes, grad_tiles.layout),
        gl.allocate_shared_memory(dtype, [1, 1, BLOCK, HEAD_DIM], k_tiles.layout),
        gl.allocate_shared_memory(dtype, [1, 1, BLOCK, HEAD_DIM], v_tiles.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], lse2_tiles.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], delta_tiles.layout),
        gl.allocate_shared_memory(dtype, [BLOCK, ROWS], SIDE_BY_SIDE),
        gl.allocate_shared_memory(dtype, [ROWS, HEAD_DIM], partial_tiles.layout),
    )
    keys_full, full, empty = make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    fence_async_shared()
    barriers = (keys_full.index(0), full, empty)
    tiles = (q_tiles, grad_tiles, k_tiles, v_tiles, lse2_tiles, delta_tiles, partial_tiles)
    outputs = (partial_q_ptr, partial_k_ptr, partial_v_ptr, grad_k_ptr, grad_v_ptr)
    pointers = (plan_ptr, queries_ptr, limits_ptr, outputs)
    numbers = (chunk, group, num_items, seqlen_k, num_kv_heads, scale)
    gl.warp_specialize(
        [
            (multiply_rows, (tiles, buffers, barriers, pointers, numbers, HEADS, HEAD_DIM, STAGES)),
            (copy_rows, (tiles, buffers, barriers, pointers, numbers, HEADS, HEAD_DIM, STAGES)),
        ],
        [1],
        [24],
    )


def hopper_boxes(group_size: int, head_dim: int, block_size: int) -> dict[str, list[int]]:
    """The box of each tensor that is copied."""
    rows, keys, entry = ROWS.value, [1, 1, block_size, head_dim], [1, group_size, 1, HALF.value]
    boxes = {"q_tiles": entry, "grad_tiles": entry, "k_tiles": keys, "v_tiles": keys}
    return boxes | {"lse2_tiles": [rows], "delta_tiles": [rows], "partial_tiles": [rows, head_dim]}


def hopper_constants(config: BackwardConfig, group_size: int, head_dim: int, block_size: int) -> dict[str, int]:
    """The compile-time arguments of `gradient_hopper_kernel`."""
    return {"HEADS": group_size, "HEAD_DIM": head_dim, "BLOCK": block_size, "STAGES": config.num_stages}


def gradient_launcher(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    workspace: Workspace,
    scale: float,
    config: BackwardConfig,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Callable[[WorkItems, int, int], None]:
    """As `backward_gradient.gradient_launcher`, but that a partial dQ is [entries, G, D] for every G."""
    num_kv_heads, seqlen_k, head_dim = k.shape[1:]
    group_size, block_size = q.shape[1] // num_kv_heads, workspace.partial_k.shape[1]
    stats, partial = (workspace.row_lse2.view(-1), workspace.row_delta.view(-1)), workspace.partial_q.view(-1, head_dim)
    boxes = hopper_boxes(group_size, head_dim, block_size).values()
    # Made once: a descriptor costs the host as much as a launch.
    tiles = [shared_box(x, box) for x, box in zip((q, grad_out, k, v, *stats, partial), boxes, strict=True)]
    constants = hopper_constants(config, group_size, head_dim, block_size)

    def launch(pieces: WorkItems, chunk: int, group: int) -> None:
        gradient_hopper_kernel[(pieces.num_items,)](
            *tiles,
            pieces.table,
            workspace.queries,
            workspace.limits,
            workspace.partial_q,
            workspace.partial_k,
            workspace.partial_v,
            grad_k,
            grad_v,
            chunk,
            group,
            pieces.num_items,
            seqlen_k,
            num_kv_heads,
            scale,
            **constants,
            num_warps=8,
        )

    return launch
