"""The backward's main kernel for Hopper, in Gluon: one warp gathers, and runs ahead of the warps that multiply.

It computes the same as `gradient`. There Triton's own pipeline waits for each product before it goes on; here the
products of a step are in flight beside the arithmetic between them, and the last one beside the next step. The copying
warp fetches q and dO one entry at a time with the bulk copy engine, in halves of the head dim, which lie side by side
as the tensor cores take them. The same engine writes the rows' own dQ, [entries, G, D].

The interpreter cannot run Gluon kernels: the checks of `benchmarks/gpu.py` compare this kernel with the oracle.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from ..common.gluon_sm90 import HALF, SIDE_BY_SIDE, clear_rows, copy_block, gather_rows, make_barriers, meet, shared_box
from ..common.launch import Launch, Options
from ..common.softmax import LOG2_E
from ..common.target import Target, gathers_on_hopper
from ..schedule.work_items import WorkItems, load_item
from .config import BackwardConfig
from .workspace import KeyGradients, Launcher, Workspace

ROWS = gl.constexpr(64)


class Boxes(NamedTuple):
    """Descriptors of the bulk copy engine. One copy takes q or dO of an entry, half of the head dim; K or V of a block;
    lse2, delta or dQ of a step."""

    q: Any
    grad: Any
    k: Any
    v: Any
    lse2: Any
    delta: Any
    grad_q: Any


class Buffers(NamedTuple):
    """Shared memory: the stages of q, dO, lse2 and delta; K and V of the block; dS and dQ of a step."""

    q: Any
    grad: Any
    k: Any
    v: Any
    lse2: Any
    delta: Any
    grad_scores: Any
    grad_q: Any


class Barriers(NamedTuple):
    """keys_full: K and V of the block; full, empty: the stages of q, dO, lse2 and delta."""

    keys_full: Any
    full: Any
    empty: Any


class StepRows(NamedTuple):
    """The rows of a step in shared memory: q, grad [ROWS, D], lse2, delta [ROWS]."""

    q: Any
    grad: Any
    lse2: Any
    delta: Any


class Keys(NamedTuple):
    """A block's keys and values in shared memory, [block_size, D]."""

    k: Any
    v: Any


@dataclass(frozen=True)
class GradientShape:
    """Constants of `gradient_sm90_kernel`; stages: buffers of q and dO."""

    group_size: int
    head_dim: int
    block_size: int
    stages: int


def puts_heads_inside(problem: Problem) -> bool:
    """Rows are stored whole, by the bulk copy engine."""
    return False


def supports(problem: Problem, target: Target, config: BackwardConfig) -> bool:
    """Whether the kernel takes a problem: Hopper, its tile sizes, and tensors that the bulk copy engine reads."""
    shape = problem.group_size, problem.head_dim, problem.block_size, problem.element_size
    return config.sm90 and problem.bulk_copies and gathers_on_hopper(target, *shape)


@gluon.jit
def first_step(first, last, entries: gl.constexpr):
    """The entry that a work item's first step begins with: only that step may lack entries, the first ones."""
    return last - (last - first + entries - 1) // entries * entries


@gluon.jit
def copy_rows(boxes, buffers, barriers, items, rows, range_number, group, shape: gl.constexpr):
    """The copying warp's work: the block's keys and values, then q, dO, lse2 and delta of every step's rows."""
    HEADS: gl.constexpr = shape.group_size
    STAGES: gl.constexpr = shape.stages
    ENTRIES: gl.constexpr = ROWS // HEADS
    HALVES: gl.constexpr = shape.head_dim // HALF
    item = load_item(items, range_number)
    batch, first, last = gl.cast(item.batch, gl.int32), item.begin, item.stop
    if first < last:
        at = [batch, group, item.first_key, 0]
        copy_block(boxes.k, boxes.v, at, barriers.keys_full, buffers.k, buffers.v)
        begin = first_step(first, last, ENTRIES)
        for step in range((last - begin) // ENTRIES):
            start, stage = begin + step * ENTRIES, step % STAGES
            ready = barriers.full.index(stage)
            # All are loaded before any copy begins, so that the loads overlap. Missing entries repeat a valid one, so
            # that loads stay finite.
            queries = ()
            for entry in gl.static_range(ENTRIES):
                queries += (gl.load(rows.queries + gl.maximum(start + entry, first)),)  # type: ignore[assignment]
            mbarrier.wait(barriers.empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(ready, 2 * (ENTRIES * HALVES * boxes.q.block_type.nbytes + boxes.lse2.block_type.nbytes))
            tma.async_copy_global_to_shared(boxes.lse2, [start * HEADS], ready, buffers.lse2.index(stage))
            tma.async_copy_global_to_shared(boxes.delta, [start * HEADS], ready, buffers.delta.index(stage))
            gather_rows(boxes.q, buffers.q, queries, batch, group * HEADS, stage, ready, HALVES)
            gather_rows(boxes.grad, buffers.grad, queries, batch, group * HEADS, stage, ready, HALVES)


@gluon.jit
def fold_rows(
    rows, keys, grad_scores_buffer, grad_k, grad_v, limits_ptr, missing, scale,
    group_size: gl.constexpr, masked: gl.constexpr,
):  # fmt: skip
    """Fold a step's rows into grad_k (without scale) and grad_v: (grad_k, grad_v, the rows' own grad_q).

    grad_k may be in flight, before and after. masked: some rows do not see the whole block, or the first `missing` rows
    are not there; then nothing is in flight after, because registers would not suffice.
    """
    dtype: gl.constexpr = keys.k.dtype
    BLOCK: gl.constexpr = keys.k.shape[0]
    HEAD_DIM: gl.constexpr = keys.k.shape[1]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
    own: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, HEAD_DIM // 2, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, grad_v.type.layout, 2)
    PENDING: gl.constexpr = 0 if masked else 1
    row = gl.arange(0, ROWS, gl.SliceLayout(0, scored))

    # Scores are [keys, rows]: probabilities leave one product in the layout of the next one's operand.
    scores = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    scores = warpgroup_mma(keys.k, rows.q.permute((1, 0)), scores, use_acc=False, is_async=True)
    grad_probs = gl.zeros([BLOCK, ROWS], gl.float32, scored)
    if not masked:
        grad_probs = warpgroup_mma(keys.v, rows.grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    scores, grad_k = warpgroup_mma_wait(PENDING, deps=[scores, grad_k])
    lse2 = rows.lse2.load(gl.SliceLayout(0, scored))
    probs = gl.exp2(scores * (scale * LOG2_E) - lse2[None, :])
    if masked:
        limit = gl.load(limits_ptr + row // group_size, mask=row >= missing, other=0)
        key = gl.arange(0, BLOCK, gl.SliceLayout(1, scored))
        probs = gl.where(key[:, None] < limit[None, :], probs, 0.0)
        grad_probs = warpgroup_mma(keys.v, rows.grad.permute((1, 0)), grad_probs, use_acc=False, is_async=True)
    weights = gl.convert_layout(probs.to(dtype), operand)
    grad_v = warpgroup_mma(weights, rows.grad, grad_v, is_async=True)
    grad_probs = warpgroup_mma_wait(1, deps=[grad_probs])
    delta = rows.delta.load(gl.SliceLayout(0, scored))
    if masked:
        delta = gl.where(row < missing, 0.0, delta)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(dtype)
    grad_scores_buffer.store(grad_scores)
    fence_async_shared()
    # Wait until the grad_q of the step before has left its buffer: here, because the warps meet here in any case.
    tma.store_wait(0)
    grad_q = gl.zeros([ROWS, HEAD_DIM], gl.float32, own)
    grad_q = warpgroup_mma(grad_scores_buffer.permute((1, 0)), keys.k, grad_q, use_acc=False, is_async=True)
    grad_k = warpgroup_mma(gl.convert_layout(grad_scores, operand), rows.q, grad_k, is_async=True)
    grad_q, grad_v = warpgroup_mma_wait(PENDING, deps=[grad_q, grad_v])
    if masked:
        grad_k = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[grad_k]))
    return grad_k, grad_v, (grad_q * scale).to(dtype)


@gluon.jit
def store_present(partial_q_ptr, grad_q, missing):
    """Write the rows of grad_q but for the first `missing`."""
    row = gl.arange(0, grad_q.shape[0], gl.SliceLayout(1, grad_q.type.layout))
    d = gl.arange(0, grad_q.shape[1], gl.SliceLayout(0, grad_q.type.layout))
    gl.store(partial_q_ptr + row[:, None] * grad_q.shape[1] + d[None, :], grad_q, mask=(row >= missing)[:, None])


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
def multiply_rows(
    boxes, buffers, barriers, items, rows, partial, sums, range_number, group, scale, shape: gl.constexpr
):
    """The work of the other eight warps: dK and dV of the work item, and dQ of each row in it."""
    HEADS: gl.constexpr = shape.group_size
    HEAD_DIM: gl.constexpr = shape.head_dim
    BLOCK: gl.constexpr = shape.block_size
    STAGES: gl.constexpr = shape.stages
    ENTRIES: gl.constexpr = ROWS // HEADS
    dtype: gl.constexpr = buffers.k.dtype
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, HEAD_DIM, 16])
    q_rows = buffers.q._reinterpret(dtype, [STAGES, ROWS, HEAD_DIM], SIDE_BY_SIDE)
    grad_rows = buffers.grad._reinterpret(dtype, [STAGES, ROWS, HEAD_DIM], SIDE_BY_SIDE)
    keys = Keys(buffers.k.reshape([BLOCK, HEAD_DIM]), buffers.v.reshape([BLOCK, HEAD_DIM]))
    item = load_item(items, range_number)
    first, last = item.begin, item.stop
    if first < last:
        mbarrier.wait(barriers.keys_full, 0)
        count = item.stop_key - item.first_key
        if count < BLOCK:
            clear_rows(keys.k, count)
            clear_rows(keys.v, count)
        meet()
        grad_k = warpgroup_mma_init(gl.zeros([BLOCK, HEAD_DIM], gl.float32, summed))
        grad_v = gl.zeros([BLOCK, HEAD_DIM], gl.float32, summed)
        start, step = first_step(first, last, ENTRIES), 0
        # Queries ascend: those that do not see the whole block come first.
        masked = first < last
        while masked:
            stage = step % STAGES
            missing = gl.maximum(first - start, 0) * HEADS
            step_rows = StepRows(
                q_rows.index(stage), grad_rows.index(stage), buffers.lse2.index(stage), buffers.delta.index(stage)
            )
            mbarrier.wait(barriers.full.index(stage), step // STAGES & 1)
            grad_k, grad_v, grad_q = fold_rows(
                step_rows, keys, buffers.grad_scores, grad_k, grad_v, rows.limits + start, missing, scale, HEADS, True
            )
            mbarrier.arrive(barriers.empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
            store_present(partial.q + gl.cast(start, gl.int64) * (HEADS * HEAD_DIM), grad_q, missing)
            start += ENTRIES
            step += 1
            masked = start < last
            if masked:
                masked = gl.load(rows.limits + start) < BLOCK
        meet()
        for entry in range(start, last, ENTRIES):
            stage = step % STAGES
            step_rows = StepRows(
                q_rows.index(stage), grad_rows.index(stage), buffers.lse2.index(stage), buffers.delta.index(stage)
            )
            mbarrier.wait(barriers.full.index(stage), step // STAGES & 1)
            grad_k, grad_v, grad_q = fold_rows(
                step_rows, keys, buffers.grad_scores, grad_k, grad_v, rows.limits, 0, scale, HEADS, False
            )
            buffers.grad_q.store(grad_q)
            fence_async_shared()
            # The step before this one had a product in flight until this one's first was done.
            mbarrier.arrive(barriers.empty.index((step + STAGES - 1) % STAGES), count=1)
            tma.async_copy_shared_to_global(boxes.grad_q, [entry * HEADS, 0], buffers.grad_q)
            step += 1
        grad_k = warpgroup_mma_wait(0, deps=[grad_k])
        tma.store_wait(0)
        # Loaded again: the loops leave no register to keep it in.
        item = load_item(items, range_number)
        place = (item.batch * sums.num_kv_heads + group) * sums.seqlen_k + item.first_key
        store_sum(sums.k, partial.k, grad_k * scale, place, item.slot, item.stop_key - item.first_key)
        store_sum(sums.v, partial.v, grad_v, place, item.slot, item.stop_key - item.first_key)


@gluon.jit
def gradient_sm90_kernel(
    q_boxes,
    grad_boxes,
    k_boxes,
    v_boxes,
    lse2_boxes,
    delta_boxes,
    grad_q_boxes,
    items,
    rows,
    partial,
    sums,
    range_number,
    group,
    scale,
    shape: gl.constexpr,
):
    """See the module's docstring. Program i owns work item i of a token range."""
    dtype: gl.constexpr = partial.q.dtype.element_ty
    STAGES: gl.constexpr = shape.stages
    HEADS: gl.constexpr = shape.group_size
    HEAD_DIM: gl.constexpr = shape.head_dim
    BLOCK: gl.constexpr = shape.block_size
    entries: gl.constexpr = [STAGES * (HEAD_DIM // HALF) * (ROWS // HEADS), 1, HEADS, 1, HALF]
    buffers = Buffers(
        gl.allocate_shared_memory(dtype, entries, q_boxes.layout),
        gl.allocate_shared_memory(dtype, entries, grad_boxes.layout),
        gl.allocate_shared_memory(dtype, [1, 1, BLOCK, HEAD_DIM], k_boxes.layout),
        gl.allocate_shared_memory(dtype, [1, 1, BLOCK, HEAD_DIM], v_boxes.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], lse2_boxes.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], delta_boxes.layout),
        gl.allocate_shared_memory(dtype, [BLOCK, ROWS], SIDE_BY_SIDE),
        gl.allocate_shared_memory(dtype, [ROWS, HEAD_DIM], grad_q_boxes.layout),
    )
    keys_full, full, empty = make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    fence_async_shared()
    barriers = Barriers(keys_full.index(0), full, empty)
    boxes = Boxes(q_boxes, grad_boxes, k_boxes, v_boxes, lse2_boxes, delta_boxes, grad_q_boxes)
    gl.warp_specialize(
        [
            (
                multiply_rows,
                (boxes, buffers, barriers, items, rows, partial, sums, range_number, group, scale, shape),
            ),
            (copy_rows, (boxes, buffers, barriers, items, rows, range_number, group, shape)),
        ],
        [1],
        [24],
    )


@functools.lru_cache
def gradient_shape(problem: Problem, config: BackwardConfig) -> GradientShape:
    """Constants of `gradient_sm90_kernel`."""
    return GradientShape(problem.group_size, problem.head_dim, problem.block_size, config.num_stages)


def gradient_launcher(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    workspace: Workspace,
    sums: KeyGradients,
    scale: float,
    problem: Problem,
    config: BackwardConfig,
) -> Launcher:
    """As `gradient.gradient_launcher`, for a workspace without `heads_inside`."""
    head_dim = problem.head_dim
    entry, keys = [1, problem.group_size, 1, HALF.value], [1, 1, problem.block_size, head_dim]
    # Made once: a descriptor costs the host as much as a launch.
    boxes = {
        "q_boxes": shared_box(q, entry),
        "grad_boxes": shared_box(grad_out, entry),
        "k_boxes": shared_box(k, keys),
        "v_boxes": shared_box(v, keys),
        "lse2_boxes": shared_box(workspace.rows.lse2.view(-1), [ROWS.value]),
        "delta_boxes": shared_box(workspace.rows.delta.view(-1), [ROWS.value]),
        "grad_q_boxes": shared_box(workspace.partial.q.view(-1, head_dim), [ROWS.value, head_dim]),
    }
    constants = {"shape": gradient_shape(problem, config)}

    def launch(items: WorkItems, range_number: int, group: int) -> None:
        arguments = boxes | {
            "items": items,
            "rows": workspace.rows,
            "partial": workspace.partial,
            "sums": sums,
            "range_number": range_number,
            "group": group,
            "scale": scale,
        }
        Launch(gradient_sm90_kernel, (items.num_items, 1, 1), arguments, constants, Options(8)).run()

    return launch
