"""The index loss's main kernel for Hopper where the teacher is given, in Gluon: as `given_teacher`, with copying warps.

Lists are short where a pass has few tokens for each block: a program takes one work item after the other, and while it
multiplies, the copying warps fetch the next entries, those of the next work item included. The copies are of 16 bytes,
row by row: an entry's vector, and its teacher.
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..common.gluon_sm90 import (
    SIDE_BY_SIDE,
    clear_rows,
    load_box,
    load_each,
    make_barriers,
    meet,
    shared_box,
    store_sum,
)
from ..common.launch import Launch, Options
from ..common.softmax import LN_2, LOG2_E
from ..common.target import GLUON, Target
from ..common.tiles import tma_ready
from ..schedule.inverse_index import find_token_range
from ..schedule.work_items import WorkItem, item_entries, load_item
from .gradient import TINY
from .loads import LossCall
from .teacher import SCALE

ROWS = gl.constexpr(64)
STAGES = gl.constexpr(3)
COPYING = gl.constexpr(4)
# Rows that the copying warps copy at a time.
PART = gl.constexpr(16)
# Per thread of the copying warps.
REGISTERS = gl.constexpr(56)


class Tensors(NamedTuple):
    """What the kernel reads and writes: index_q, boxes of index_k, and records of `loads`.

    limits: [entry of the pass] int32, how many keys of its block an entry's query sees, in the order of the lists.
    """

    index_q: Any
    k_boxes: Any
    limits: Any
    buffers: Any
    index: Any
    items: Any
    gradients: Any
    sizes: Any
    first_range: Any


class Stages(NamedTuple):
    """Shared memory: the keys of two work items; for each stage rows of index_q and of the teacher, index_lse and
    limits of ROWS entries; the gradient of the scores of a step.
    """

    y: Any
    x: Any
    teacher: Any
    lse: Any
    limits: Any
    grad_scores: Any


class Barriers(NamedTuple):
    """keys_full, keys_empty: the two buffers of keys; full, empty: the stages of entries."""

    keys_full: Any
    keys_empty: Any
    full: Any
    empty: Any


@gluon.jit
def item_of(tensors, number):
    """The work item of that number in range program_id(2) of a pass; past the last one, without entries."""
    last = tensors.items.num_items - 1
    item = load_item(tensors.items, tensors.first_range, gl.program_id(2), gl.minimum(number, last))
    stop = gl.where(number <= last, item.stop, item.begin)
    return WorkItem(item.batch, item.first_key, item.stop_key, item.shift, item.begin, stop, item.slot, item.block)


@gluon.jit
def list_entries(tensors):
    """Where the entries of the program's range are, by their number in the pass, and what they are counted from."""
    entries_ptr = item_entries(tensors.index, tensors.items, tensors.first_range, gl.program_id(2), 0)
    return entries_ptr, find_token_range(tensors.index, tensors.first_range, tensors.index.topk).first_entry


@gluon.jit
def load_entries(entries_ptr, origin, place, stop):
    """The entries at these places of a work item's list, counted from `origin`, int32; past its end, the last again."""
    return (gl.load(entries_ptr + gl.maximum(gl.minimum(place, stop - 1), 0)) - origin).to(gl.int32)


@gluon.jit
def copy_vectors(rows, buffer, live, layout: gl.constexpr):
    """Begin to copy vectors from addresses rows [N] to a buffer [N, depth]; zeros where not live."""
    d = gl.arange(0, buffer.shape[1], gl.SliceLayout(0, layout))
    load_each(buffer, rows[:, None] + d[None, :], mask=live[:, None])


@gluon.constexpr_function
def vector_layout(depth, num_warps):
    """The layout in which each thread copies 16 bytes of vectors [N, depth]."""
    return gl.BlockedLayout([1, 8], [32 * 8 // depth, depth // 8], [num_warps, 1], [1, 0])


@gluon.jit
def load_step(entries_ptr, origin, first, stop, layout: gl.constexpr):
    """The entries from place `first` on that a step needs: in parts, as their vectors are copied, and all."""
    parts = ()
    for part in gl.static_range(ROWS // PART):
        place = first + part * PART + gl.arange(0, PART, gl.SliceLayout(1, layout))
        parts += (load_entries(entries_ptr, origin, place, stop),)  # type: ignore[assignment]
    place = first + gl.arange(0, ROWS, gl.BlockedLayout([1], [32], [COPYING], [0]))
    return parts, load_entries(entries_ptr, origin, place, stop)


@gluon.jit
def copy_step(tensors, stages, stage, x_base, first_query, first, stop, parts, all_entries, C: gl.constexpr):
    """Begin to copy what a step needs of its entries, from place `first` on, to a stage."""
    vectors: gl.constexpr = vector_layout(C.index_head_dim, COPYING)
    teachers: gl.constexpr = vector_layout(C.block_size, COPYING)
    for part in gl.static_range(ROWS // PART):
        place = first + part * PART + gl.arange(0, PART, gl.SliceLayout(1, vectors))
        query = first_query + parts[part] // tensors.index.topk
        rows = x_base + query.to(gl.int64) * tensors.index_q.stride_s
        # The kernel takes tensors that the bulk copy engine reads: their rows are multiples of 16 bytes apart.
        rows = gl.multiple_of(rows, 16)
        copy_vectors(rows, stages.x.index(stage).slice(part * PART, PART), place < stop, vectors)
        place = first + part * PART + gl.arange(0, PART, gl.SliceLayout(1, teachers))
        row = place // C.entries * C.teacher_rows + place % C.entries
        rows = tensors.buffers.teacher + row.to(gl.int64) * C.block_size
        copy_vectors(rows, stages.teacher.index(stage).slice(part * PART, PART), place < stop, teachers)
    place = first + gl.arange(0, ROWS, all_entries.type.layout)
    lse = tensors.buffers.index_lse + all_entries // tensors.index.topk
    load_each(stages.lse.index(stage), lse, mask=place < stop)
    load_each(stages.limits.index(stage), tensors.limits + place, mask=place < stop)


@gluon.jit
def copy_items(tensors, stages, barriers, C: gl.constexpr):
    """The copying warps' work: the keys of each of the program's work items, and the entries of their steps.

    The entries' numbers are loaded a step ahead, so that no copy waits for them.
    """
    vectors: gl.constexpr = vector_layout(C.index_head_dim, COPYING)
    index, index_q, range_number = tensors.index, tensors.index_q, gl.program_id(2)
    entries_ptr, origin = list_entries(tensors)
    tokens = find_token_range(index, tensors.first_range + range_number, index.topk)
    group_base = index_q.ptr + tokens.group * index_q.stride_h
    number, taken, done = gl.program_id(0), 0, 0
    item = item_of(tensors, number)
    parts, all_entries = load_step(entries_ptr, origin, item.begin, item.stop, vectors)
    while item.begin < item.stop:
        number += gl.num_programs(0)
        following = item_of(tensors, number)
        full = barriers.keys_full.index(taken % 2)
        mbarrier.wait(barriers.keys_empty.index(taken % 2), (taken // 2 & 1) ^ 1)
        mbarrier.expect(full, tensors.k_boxes.block_type.nbytes)
        at = [gl.cast(item.batch, gl.int32), 0, item.first_key, 0]
        load_box(tensors.k_boxes, at, full, stages.y.index(taken % 2))
        taken += 1
        x_base = group_base + item.batch * index_q.stride_b
        first_query = gl.cast(tokens.first_token - item.batch * tensors.sizes.seqlen_q, gl.int32)
        first_query -= range_number * index.range_tokens
        for first in range(item.begin, item.stop, ROWS):
            last = first + ROWS >= item.stop
            next_first, next_stop = (
                gl.where(last, following.begin, first + ROWS),
                gl.where(last, following.stop, item.stop),
            )
            next_parts, next_entries = load_step(entries_ptr, origin, next_first, next_stop, vectors)
            stage = done % STAGES
            mbarrier.wait(barriers.empty.index(stage), (done // STAGES & 1) ^ 1)
            copy_step(tensors, stages, stage, x_base, first_query, first, item.stop, parts, all_entries, C)
            async_copy.mbarrier_arrive(barriers.full.index(stage), increment_count=False)
            parts, all_entries = next_parts, next_entries
            done += 1
        item = following


@gluon.jit
def log2(x):
    """log2 of normal x > 0, off by at most 2^-22 of it, or of 1 near 1."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def compare(scores, given, lse, limits, index_scale):
    """The loss of each element in base 2, and the gradient of the scores, [BLOCK, ROWS]; given: the teacher's."""
    key = gl.arange(0, scores.shape[0], gl.SliceLayout(1, scores.type.layout))
    log_student = scores * index_scale - lse[None, :]
    student = gl.where(key[:, None] < limits[None, :], gl.exp2(log_student), 0.0)
    teacher = given.to(gl.float32) * (1.0 / SCALE)
    # P and the student have equal sums but for rounding: with their difference, the loss hardly depends on how P is
    # rounded.
    ratio = log2(gl.maximum(teacher, TINY)) - (log_student + LOG2_E)
    return student * LOG2_E + teacher * ratio, student - teacher


@gluon.jit
def fold_item(tensors, stages, barriers, entries_ptr, origin, item, y, done, C: gl.constexpr):
    """Store the shares of grad_index_q of a work item's entries: (its loss [BLOCK], grad_index_k, steps done)."""
    dtype: gl.constexpr = y.dtype
    BLOCK: gl.constexpr = C.block_size
    DEPTH: gl.constexpr = C.index_head_dim
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, ROWS, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, DEPTH, 16])
    own: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, DEPTH // 2, 16])
    stored: gl.constexpr = vector_layout(DEPTH, 8)
    d = gl.arange(0, DEPTH, gl.SliceLayout(0, stored))
    partial_q = tensors.gradients.partial_q
    grad_k = warpgroup_mma_init(gl.zeros([BLOCK, DEPTH], gl.float32, summed))
    loss = gl.zeros([BLOCK], gl.float32, gl.SliceLayout(1, scored))
    place = item.begin + gl.arange(0, ROWS, gl.SliceLayout(1, stored))
    upcoming = load_entries(entries_ptr, origin, place, item.stop)
    for _ in range(item.begin, item.stop, ROWS):
        stage = done % STAGES
        mbarrier.wait(barriers.full.index(stage), done // STAGES & 1)
        fence_async_shared()
        x = stages.x.index(stage)
        scores = gl.zeros([BLOCK, ROWS], gl.float32, scored)
        scores = warpgroup_mma(y, x.permute((1, 0)), scores, use_acc=False, is_async=True)
        entry = upcoming
        upcoming = load_entries(entries_ptr, origin, place + ROWS, item.stop)
        given = stages.teacher.index(stage).permute((1, 0)).load(scored)
        lse = stages.lse.index(stage).load(gl.SliceLayout(0, scored))
        limits = stages.limits.index(stage).load(gl.SliceLayout(0, scored))
        scores, grad_k = warpgroup_mma_wait(0, deps=[scores, grad_k])
        # The step before this one had a product in flight until now.
        mbarrier.arrive(barriers.empty.index((done + STAGES - 1) % STAGES), count=1, pred=done > 0)
        losses, grad_scores = compare(scores, given, lse, limits, tensors.sizes.index_scale)
        loss += gl.sum(losses, axis=1)
        grad_scores = grad_scores.to(dtype)
        stages.grad_scores.store(grad_scores)
        fence_async_shared()
        grad_q = gl.zeros([ROWS, DEPTH], gl.float32, own)
        grad_q = warpgroup_mma(stages.grad_scores.permute((1, 0)), y, grad_q, use_acc=False, is_async=True)
        operand = gl.convert_layout(grad_scores, gl.DotOperandLayout(0, summed, 2))
        grad_k = warpgroup_mma(operand, x, grad_k, is_async=True)
        grad_q = warpgroup_mma_wait(1, deps=[grad_q])
        rows = gl.convert_layout(grad_q.to(partial_q.dtype.element_ty), stored)
        gl.store(
            partial_q + (entry.to(gl.int64)[:, None] * DEPTH + d[None, :]), rows, mask=(place < item.stop)[:, None]
        )
        place += ROWS
        done += 1
    return loss, warpgroup_mma_wait(0, deps=[grad_k]), done


@gluon.jit
def fold_items(tensors, stages, barriers, C: gl.constexpr):
    """The work of the other eight warps: the loss and the gradients of each of the program's work items."""
    BLOCK: gl.constexpr = C.block_size
    DEPTH: gl.constexpr = C.index_head_dim
    entries_ptr, origin = list_entries(tensors)
    number, taken, done = gl.program_id(0), 0, 0
    item = item_of(tensors, number)
    while item.begin < item.stop:
        following = item_of(tensors, number + gl.num_programs(0))
        y = stages.y.index(taken % 2).reshape([BLOCK, DEPTH])
        mbarrier.wait(barriers.keys_full.index(taken % 2), taken // 2 & 1)
        if item.stop_key - item.first_key < BLOCK:
            clear_rows(y, item.stop_key - item.first_key)
            meet()
        loss, grad_k, done = fold_item(tensors, stages, barriers, entries_ptr, origin, item, y, done, C)
        mbarrier.arrive(barriers.keys_empty.index(taken % 2), count=1)
        gradients, sizes = tensors.gradients, tensors.sizes
        place = (gl.program_id(2) * sizes.batch + item.batch) * sizes.seqlen_k + item.first_key
        count, sums = item.stop_key - item.first_key, gradients.grad_k
        store_sum(sums, gradients.partial_k, grad_k * gl.load(gradients.unit), place, item.slot, count)
        row = gl.cast(tensors.first_range + gl.program_id(2), gl.int64) * tensors.items.num_items + number
        gl.store(tensors.buffers.losses + row, gl.sum(loss, axis=0) * LN_2)
        taken += 1
        number += gl.num_programs(0)
        item = following


@gluon.jit
def given_teacher_sm90_kernel(
    index_q, buffers, index, items, gradients, sizes, first_range, k_boxes, limits, C: gl.constexpr
):
    """See the module's docstring. Program (i, 0, n) owns work items i, i + number of programs, ... of range n."""
    dtype: gl.constexpr = k_boxes.dtype
    BLOCK: gl.constexpr = C.block_size
    DEPTH: gl.constexpr = C.index_head_dim
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    stages = Stages(
        gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, DEPTH], k_boxes.layout),
        gl.allocate_shared_memory(dtype, [STAGES, ROWS, DEPTH], SIDE_BY_SIDE),
        gl.allocate_shared_memory(gl.float16, [STAGES, ROWS, BLOCK], SIDE_BY_SIDE),
        gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], flat),
        gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], flat),
        gl.allocate_shared_memory(dtype, [BLOCK, ROWS], SIDE_BY_SIDE),
    )
    keys_full, keys_empty = make_barriers(2, 1), make_barriers(2, 1)
    # A stage is full when the copies of each copying thread have arrived.
    full, empty = make_barriers(STAGES, 32 * COPYING), make_barriers(STAGES, 1)
    fence_async_shared()
    barriers = Barriers(keys_full, keys_empty, full, empty)
    tensors = Tensors(index_q, k_boxes, limits, buffers, index, items, gradients, sizes, first_range)
    gl.warp_specialize(
        [(fold_items, (tensors, stages, barriers, C)), (copy_items, (tensors, stages, barriers, C))],
        [COPYING],
        [REGISTERS],
    )


def supports(x: LossCall, index_k: torch.Tensor, target: Target) -> bool:
    """Whether the kernel takes a call: Hopper, its tile sizes, and vectors that can be copied 16 bytes at a time."""
    constants, index_q = x.constants, x.index_q.ptr
    sizes = constants.block_size == constants.columns == 128 and constants.index_head_dim in (64, 128)
    ready = index_q.element_size() == 2 and tma_ready(index_q) and tma_ready(index_k)
    return GLUON and target.arch == 90 and x.config.sm90 and sizes and ready


def given_teacher_sm90(x: LossCall, index_k: torch.Tensor, limits: torch.Tensor, target: Target) -> Launch:
    """As `given_teacher`."""
    arguments = x.arguments(given_teacher_sm90_kernel)
    box = shared_box(index_k, [1, 1, x.constants.block_size, x.constants.index_head_dim])
    arguments |= {"k_boxes": box, "limits": limits}
    grid = min(x.items.num_items, target.num_sms), 1, 1
    return Launch(given_teacher_sm90_kernel, grid, arguments, {"C": x.constants}, Options(8))
