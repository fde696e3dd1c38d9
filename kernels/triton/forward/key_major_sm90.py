"""Key-major attention for Hopper, in Gluon: one warp gathers, one scatters, and four multiply.

The kernel computes what `key_major.key_major_kernel` does. The copying warp fetches the query rows of a step, one entry
at a time, with the bulk copy engine, in halves of the head dim, which lie side by side as the tensor cores take them;
it runs ahead of the warps that multiply. The storing warp sends an entry's partial output to its place in the same way.
Two programs share a multiprocessor: one multiplies while the other computes its softmax, or waits for its first keys.
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

from ...problem import Problem
from ..common.gluon_sm90 import (
    HALF,
    SIDE_BY_SIDE,
    clear_rows,
    copy_block,
    gather_rows,
    hide_unseen,
    make_barriers,
    shared_box,
)
from ..common.launch import Launch, Options
from ..common.sizes import Sizes, sizes_of
from ..common.softmax import LOG2_E, softmax_rows
from ..common.target import Target
from ..schedule.inverse_index import InverseIndex, count_seen, find_token_range
from ..schedule.work_items import cut_into_items, item_entries, load_item
from .config import ForwardConfig, fits_key_major_sm90
from .records import Inputs, Partial

ROWS = gl.constexpr(64)
STAGES = gl.constexpr(2)
# Per thread, at the launch: two programs share a multiprocessor.
REGISTERS = 128


class Boxes(NamedTuple):
    """Queries, keys, values and partial outputs: descriptors of the bulk copy engine, or buffers in shared memory."""

    q: Any
    k: Any
    v: Any
    out: Any


class Barriers(NamedTuple):
    """keys_full: the block's keys and values; full, empty: the stages of queries; out_full, out_empty: the outputs."""

    keys_full: Any
    full: Any
    empty: Any
    out_full: Any
    out_empty: Any


class Work(NamedTuple):
    """What a launch works on: the index, its work items, a pass's first range, and the rows of all partial results."""

    index: Any
    items: Any
    first_range: Any
    seqlen_q: Any
    num_rows: Any


@dataclass(frozen=True)
class ItemShape(Sizes):
    """Constants of `key_major_sm90_kernel`; entries: per step; halves: of the head dim."""

    entries: int
    halves: int


@gluon.jit
def load_entry(entries_ptr, number, origin, last):
    """Entry `number` of a work item, counted from the pass's first; beyond the last one, the last one."""
    return gl.cast(gl.load(entries_ptr + gl.minimum(number, last)) - origin, gl.int32)


@gluon.jit
def copy_queries(tensors, buffers, barriers, work, shape: gl.constexpr):
    """The copying warp's work: the block's keys and values, then the queries of every step."""
    ENTRIES: gl.constexpr = shape.entries
    HALVES: gl.constexpr = shape.halves
    item = load_item(work.items, work.first_range, gl.program_id(1))
    tokens = find_token_range(work.index, work.first_range + gl.program_id(1), shape.topk)
    group, batch = gl.cast(tokens.group, gl.int32), gl.cast(item.batch, gl.int32)
    origin = find_token_range(work.index, work.first_range, shape.topk).first_entry
    # Entries are counted through the pass.
    before = gl.program_id(1) * work.index.range_tokens
    first_query = gl.cast(tokens.first_token - item.batch * work.seqlen_q, gl.int32) - before
    if item.begin < item.stop:
        at = [batch, group, item.first_key, 0]
        copy_block(tensors.k, tensors.v, at, barriers.keys_full, buffers.k, buffers.v)
        entries_ptr = item_entries(work.index, work.items, work.first_range, gl.program_id(1), item.begin)
        last = item.stop - item.begin - 1
        for step in range((item.stop - item.begin + ENTRIES - 1) // ENTRIES):
            stage = step % STAGES
            # All before any copy is asked for, so that they are under way together.
            queries = ()
            for number in gl.static_range(ENTRIES):
                entry = load_entry(entries_ptr, step * ENTRIES + number, origin, last)
                queries += (first_query + entry // shape.topk,)  # type: ignore[assignment]
            mbarrier.wait(barriers.empty.index(stage), (step // STAGES & 1) ^ 1)
            full = barriers.full.index(stage)
            mbarrier.expect(full, ENTRIES * HALVES * tensors.q.block_type.nbytes)
            gather_rows(tensors.q, buffers.q, queries, batch, group * shape.group_size, stage, full, HALVES)


@gluon.jit
def store_outputs(tensors, buffers, barriers, work, shape: gl.constexpr):
    """The storing warp's work: the partial outputs of every step."""
    ENTRIES: gl.constexpr = shape.entries
    HALVES: gl.constexpr = shape.halves
    item = load_item(work.items, work.first_range, gl.program_id(1))
    origin = find_token_range(work.index, work.first_range, shape.topk).first_entry
    entries_ptr = item_entries(work.index, work.items, work.first_range, gl.program_id(1), item.begin)
    last = item.stop - item.begin - 1
    for step in range((item.stop - item.begin + ENTRIES - 1) // ENTRIES):
        rows = ()
        for number in gl.static_range(ENTRIES):
            entry = load_entry(entries_ptr, step * ENTRIES + number, origin, last)
            # Past all rows nothing is written.
            live = step * ENTRIES + number <= last
            rows += (gl.where(live, entry * shape.group_size, work.num_rows),)  # type: ignore[assignment]
        mbarrier.wait(barriers.out_full, step & 1)
        for number in gl.static_range(ENTRIES):
            for half in gl.static_range(HALVES):
                box = buffers.out.index(half * ENTRIES + number)
                tma.async_copy_shared_to_global(tensors.out, [rows[number], half * HALF], box)
        tma.store_wait(0)
        mbarrier.arrive(barriers.out_empty, count=1)


@gluon.jit
def keys_seen(work, item, token, first_query, seen):
    """How many keys queries `first_query + token` see from a work item's first key on: `seen + token` by its shift."""
    return count_seen(work.index, token + seen, item.batch, first_query + token, item.first_key, work.seqlen_q)


@gluon.jit
def hand_over(out, normal, out_rows, out_full):
    """Leave the rows of out, times normal, to the storing warp."""
    normal = gl.convert_layout(normal, gl.SliceLayout(1, out.type.layout))
    out_rows.store((out * normal[:, None]).to(out_rows.dtype))
    fence_async_shared()
    mbarrier.arrive(out_full, count=1)


@gluon.jit
def attend_rows(buffers, barriers, work, lse_ptr, scale, shape: gl.constexpr):
    """The work of the other four warps: partial outputs, handed over to the storing warp, and partial lse."""
    HEAD_DIM: gl.constexpr = shape.head_dim
    BLOCK: gl.constexpr = shape.block_size
    dtype: gl.constexpr = buffers.k.dtype
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    q_rows = buffers.q._reinterpret(dtype, [STAGES, ROWS, HEAD_DIM], SIDE_BY_SIDE)
    out_rows = buffers.out._reinterpret(dtype, [ROWS, HEAD_DIM], SIDE_BY_SIDE)
    k, v = buffers.k.reshape([BLOCK, HEAD_DIM]), buffers.v.reshape([BLOCK, HEAD_DIM])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, scored))
    item = load_item(work.items, work.first_range, gl.program_id(1))
    if item.begin < item.stop:
        tokens = find_token_range(work.index, work.first_range + gl.program_id(1), shape.topk)
        origin = find_token_range(work.index, work.first_range, shape.topk).first_entry
        num_keys = item.stop_key - item.first_key
        entries_ptr = item_entries(work.index, work.items, work.first_range, gl.program_id(1), item.begin)
        last = item.stop - item.begin - 1
        before = gl.program_id(1) * work.index.range_tokens
        first_query = gl.cast(tokens.first_token - item.batch * work.seqlen_q, gl.int32) - before
        seen = first_query + item.shift - item.first_key + 1
        mbarrier.wait(barriers.keys_full, 0)
        if num_keys < BLOCK:
            clear_rows(k, num_keys)
            clear_rows(v, num_keys)
        for step in range((item.stop - item.begin + shape.entries - 1) // shape.entries):
            stage = step % STAGES
            number = step * shape.entries + row // shape.group_size
            entry = load_entry(entries_ptr, number, origin, last)
            # Queries ascend: the first one sees fewest.
            first = load_entry(entries_ptr, step * shape.entries, origin, last) // shape.topk
            fewest = gl.minimum(keys_seen(work, item, first, first_query, seen), num_keys)
            mbarrier.wait(barriers.full.index(stage), step // STAGES & 1)
            scores = gl.zeros([ROWS, BLOCK], gl.float32, scored)
            scores = warpgroup_mma(q_rows.index(stage), k.permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(barriers.empty.index(stage), count=1)
            if fewest < BLOCK:
                count = keys_seen(work, item, entry // shape.topk, first_query, seen)
                scores = hide_unseen(scores, gl.minimum(count, num_keys) - 1)
            weights, normal, lse = softmax_rows(scores, None, scale, True, False)
            gl.store(lse_ptr + entry * shape.group_size + row % shape.group_size, lse, mask=number <= last)
            weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, summed, 2))
            out = gl.zeros([ROWS, HEAD_DIM], gl.float32, summed)
            out = warpgroup_mma(weights, v, out, use_acc=False, is_async=True)
            out = warpgroup_mma_wait(0, deps=[out])
            mbarrier.wait(barriers.out_empty, (step & 1) ^ 1)
            hand_over(out, normal, out_rows, barriers.out_full)


@gluon.jit
def key_major_sm90_kernel(
    q_boxes, k_boxes, v_boxes, out_boxes, index, items, lse_ptr, first_range, seqlen_q, num_rows, scale,
    shape: gl.constexpr,
):  # fmt: skip
    """Fill the partial results of one work item; see the module's docstring. Grid (work items, ranges of a pass)."""
    dtype: gl.constexpr = k_boxes.dtype
    queries: gl.constexpr = [STAGES * shape.halves * shape.entries, 1, shape.group_size, 1, HALF]
    keys: gl.constexpr = [1, 1, shape.block_size, shape.head_dim]
    outputs: gl.constexpr = [shape.halves * shape.entries, shape.group_size, HALF]
    buffers = Boxes(
        gl.allocate_shared_memory(dtype, queries, q_boxes.layout),
        gl.allocate_shared_memory(dtype, keys, k_boxes.layout),
        gl.allocate_shared_memory(dtype, keys, v_boxes.layout),
        gl.allocate_shared_memory(dtype, outputs, out_boxes.layout),
    )
    keys_full, full, empty = make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    out_full, out_empty = make_barriers(1, 1), make_barriers(1, 1)
    fence_async_shared()
    barriers = Barriers(keys_full.index(0), full, empty, out_full.index(0), out_empty.index(0))
    tensors = Boxes(q_boxes, k_boxes, v_boxes, out_boxes)
    work = Work(index, items, first_range, seqlen_q, num_rows)
    gl.warp_specialize(
        [
            (attend_rows, (buffers, barriers, work, lse_ptr, scale, shape)),
            (copy_queries, (tensors, buffers, barriers, work, shape)),
            (store_outputs, (tensors, buffers, barriers, work, shape)),
        ],
        [1, 1],
        [24, 24],
    )


def supports(problem: Problem, target: Target, config: ForwardConfig) -> bool:
    """Whether the kernel takes this problem: its shape, and the bulk copy engine reads queries and keys."""
    reads = problem.bulk_copies and not problem.paged and problem.positive_scale
    return config.key_major_sm90 and reads and fits_key_major_sm90(problem, target)


def launch(
    inputs: Inputs, index: InverseIndex, partial: Partial, problem: Problem, config: ForwardConfig, target: Target
) -> Launch:
    """The launch that fills the partial results of a pass, but for its ranges; the scale is positive."""
    group_size, head_dim = problem.group_size, problem.head_dim
    keys = [1, 1, problem.block_size, head_dim]
    shape = ItemShape(**sizes_of(problem), entries=ROWS.value // group_size, halves=head_dim // HALF.value)
    items = cut_into_items(index, config.length)
    boxes = {
        "q_boxes": shared_box(inputs.q, [1, group_size, 1, HALF.value]),
        "k_boxes": shared_box(inputs.k, keys),
        "v_boxes": shared_box(inputs.v, keys),
        "out_boxes": shared_box(partial.out.view(-1, head_dim), [group_size, HALF.value]),
    }
    work = {"index": index, "items": items, "lse_ptr": partial.lse, "first_range": 0}
    sizes = {"seqlen_q": inputs.q.shape[2], "num_rows": partial.lse.numel(), "scale": inputs.scale * LOG2_E.value}
    arguments, options = {**boxes, **work, **sizes}, Options(4, max_registers=REGISTERS)
    return Launch(key_major_sm90_kernel, (items.num_items, 1, 1), arguments, {"shape": shape}, options)
