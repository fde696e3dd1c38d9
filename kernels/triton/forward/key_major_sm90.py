"""Key-major attention for Hopper, in Gluon: four warps multiply, and others gather queries and scatter outputs.

The kernel computes what `key_major.key_major_kernel` does. The copying warps, which run ahead of the warps that
multiply, are in `copies`. Two programs share a multiprocessor: one multiplies while the other computes its softmax, or
waits for its first keys.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...problem import Problem
from ..common.gluon_sm90 import HALF, SIDE_BY_SIDE, clear_rows, hide_unseen, make_barriers, reinterpret, shared_box
from ..common.launch import Launch, Options, view
from ..common.records import pages_of
from ..common.sizes import sizes_of
from ..common.softmax import LOG2_E, softmax_rows
from ..common.target import Target
from ..schedule.inverse_index import InverseIndex, count_seen, find_token_range
from ..schedule.work_items import cut_into_items, item_entries, load_item
from .config import ForwardConfig, fits_key_major_sm90
from .copies import (
    ROWS,
    Barriers,
    Boxes,
    ItemShape,
    Work,
    copy_queries,
    exchange_rows,
    load_entry,
    locate_rows,
    store_outputs,
)
from .records import Inputs, Partial

# Per thread, at the launch: two programs share a multiprocessor.
REGISTERS = 128
# The warps that copy rows one by one, and their registers per thread.
COPYING = gl.constexpr(4)
COPYING_REGISTERS = gl.constexpr(72)


@gluon.jit
def keys_seen(work, item, token, first_query, seen):
    """How many keys queries `first_query + token` see from a work item's first key on: `seen + token` by its shift."""
    return count_seen(work.index, token + seen, item.batch, first_query + token, item.first_key, work.seqlen_q)


@gluon.jit
def hand_over(out, normal, out_rows, out_full):
    """Leave the rows of out, times normal, to the warps that store them."""
    normal = gl.convert_layout(normal, gl.SliceLayout(1, out.type.layout))
    out_rows.store((out * normal[:, None]).to(out_rows.dtype))
    fence_async_shared()
    mbarrier.arrive(out_full, count=1)


@gluon.jit
def attend_rows(buffers, barriers, work, lse_ptr, scale, shape: gl.constexpr):
    """The work of the other four warps: partial outputs, handed over to those that store them, and partial lse."""
    HEAD_DIM: gl.constexpr = shape.head_dim
    BLOCK: gl.constexpr = shape.block_size
    STAGES: gl.constexpr = shape.stages
    dtype: gl.constexpr = buffers.k.dtype
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    q_rows = buffers.q
    if shape.bulk:
        q_rows = reinterpret(q_rows, dtype, [STAGES, ROWS, HEAD_DIM], SIDE_BY_SIDE)
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
        for step in range(((last + 1) * shape.group_size + ROWS - 1) // ROWS):
            stage = step % STAGES
            number, head = locate_rows(step, row, shape)
            entry = load_entry(entries_ptr, number, origin, last)
            # Queries ascend: the first one sees fewest.
            first = load_entry(entries_ptr, step * ROWS // shape.group_size, origin, last) // shape.topk
            fewest = gl.minimum(keys_seen(work, item, first, first_query, seen), num_keys)
            mbarrier.wait(barriers.full.index(stage), step // STAGES & 1)
            if not shape.bulk:
                fence_async_shared()
            scores = gl.zeros([ROWS, BLOCK], gl.float32, scored)
            scores = warpgroup_mma(q_rows.index(stage), k.permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            if shape.bulk:
                mbarrier.arrive(barriers.empty.index(stage), count=1)
            if fewest < BLOCK:
                count = keys_seen(work, item, entry // shape.topk, first_query, seen)
                scores = hide_unseen(scores, gl.minimum(count, num_keys) - 1)
            weights, normal, lse = softmax_rows(scores, None, scale, True, False)
            gl.store(lse_ptr + entry * shape.group_size + head, lse, mask=number <= last)
            weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, summed, 2))
            out = gl.zeros([ROWS, HEAD_DIM], gl.float32, summed)
            out = warpgroup_mma(weights, v, out, use_acc=False, is_async=True)
            out = warpgroup_mma_wait(0, deps=[out])
            if shape.bulk:
                mbarrier.wait(barriers.out_empty.index(0), (step & 1) ^ 1)
                out_rows = reinterpret(buffers.out, dtype, [ROWS, HEAD_DIM], SIDE_BY_SIDE)
                hand_over(out, normal, out_rows, barriers.out_full.index(0))
            else:
                hand_over(out, normal, q_rows.index(stage), barriers.out_full.index(stage))


@gluon.jit
def key_major_sm90_kernel(
    q, q_boxes, k_boxes, v_boxes, out_boxes, pages, index, items, partial, first_range, seqlen_q, num_rows, scale,
    shape: gl.constexpr,
):  # fmt: skip
    """Fill the partial results of one work item; see the module's docstring. Grid (work items, ranges of a pass)."""
    dtype: gl.constexpr = k_boxes.dtype
    STAGES: gl.constexpr = shape.stages
    keys: gl.constexpr = [1, 1, shape.block_size, shape.head_dim]
    k = gl.allocate_shared_memory(dtype, keys, k_boxes.layout)
    v = gl.allocate_shared_memory(dtype, keys, v_boxes.layout)
    keys_full = make_barriers(1, 1)
    tensors = Boxes(q_boxes, k_boxes, v_boxes, out_boxes)
    work = Work(index, items, pages, first_range, seqlen_q, num_rows)
    if shape.bulk:
        queries: gl.constexpr = [STAGES * shape.halves * shape.entries, 1, shape.group_size, 1, HALF]
        outputs: gl.constexpr = [shape.halves * shape.entries, shape.group_size, HALF]
        q_buffer = gl.allocate_shared_memory(dtype, queries, q_boxes.layout)
        buffers = Boxes(q_buffer, k, v, gl.allocate_shared_memory(dtype, outputs, out_boxes.layout))
        full, empty = make_barriers(STAGES, 1), make_barriers(STAGES, 1)
        barriers = Barriers(keys_full.index(0), full, empty, make_barriers(1, 1), make_barriers(1, 1))
        fence_async_shared()
        gl.warp_specialize(
            [
                (attend_rows, (buffers, barriers, work, partial.lse, scale, shape)),
                (copy_queries, (tensors, buffers, barriers, work, shape)),
                (store_outputs, (tensors, buffers, barriers, work, shape)),
            ],
            [1, 1],
            [24, 24],
        )
    else:
        buffers = Boxes(gl.allocate_shared_memory(dtype, [STAGES, ROWS, shape.head_dim], SIDE_BY_SIDE), k, v, None)
        # A stage is full when the copies of each copying thread have arrived.
        full, out_full = make_barriers(STAGES, 32 * COPYING), make_barriers(STAGES, 1)
        barriers = Barriers(keys_full.index(0), full, None, out_full, None)
        fence_async_shared()
        gl.warp_specialize(
            [
                (attend_rows, (buffers, barriers, work, partial.lse, scale, shape)),
                (exchange_rows, (q, partial.out, tensors, buffers, barriers, work, shape)),
            ],
            [COPYING],
            [COPYING_REGISTERS],
        )


def is_bulk(problem: Problem) -> bool:
    """Whether the bulk copy engine copies entries: they fill the steps, and are not too many."""
    return problem.group_size in (8, 16, 32, 64)


def supports(problem: Problem, target: Target, config: ForwardConfig) -> bool:
    """Whether the kernel takes this problem: its shape, and the bulk copy engine reads queries and keys."""
    reads = problem.bulk_copies and problem.positive_scale
    return config.key_major_sm90 and reads and fits_key_major_sm90(problem, target)


def launch(
    inputs: Inputs, index: InverseIndex, partial: Partial, problem: Problem, config: ForwardConfig, target: Target
) -> Launch:
    """The launch that fills the partial results of a pass, but for its ranges; the scale is positive."""
    group_size, head_dim, bulk = problem.group_size, problem.head_dim, is_bulk(problem)
    keys, items = [1, 1, problem.block_size, head_dim], cut_into_items(index, config.length)
    halves, stages = head_dim // HALF.value, 2 if bulk else 3
    shape = ItemShape(**sizes_of(problem), bulk=bulk, entries=ROWS.value // group_size, stages=stages, halves=halves)
    boxes = {
        "q": None if bulk else view(inputs.q),
        "q_boxes": shared_box(inputs.q, [1, group_size, 1, HALF.value]) if bulk else None,
        "k_boxes": shared_box(inputs.k, keys),
        "v_boxes": shared_box(inputs.v, keys),
        "out_boxes": shared_box(partial.out.view(-1, head_dim), [group_size, HALF.value]) if bulk else None,
    }
    pages = pages_of(inputs.cache.page_table, inputs.k)
    work = {"pages": pages, "index": index, "items": items, "partial": partial, "first_range": 0}
    sizes = {"seqlen_q": inputs.q.shape[2], "num_rows": partial.lse.numel(), "scale": inputs.scale * LOG2_E.value}
    arguments, options = {**boxes, **work, **sizes}, Options(4, max_registers=REGISTERS)
    return Launch(key_major_sm90_kernel, (items.num_items, 1, 1), arguments, {"shape": shape}, options)
