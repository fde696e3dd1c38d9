"""`by_block`'s main kernel for Hopper, in Gluon: one warp gathers, one scatters, and four multiply.

It does what `by_block.partial_attention_kernel` does. The copying warp fetches the query rows of a step an entry at a
time with the bulk copy engine, in halves of the head dim, which lie side by side as the tensor cores take them, and
runs ahead of the warps that multiply; the storing warp sends an entry's partial output to its place in the same way.
Two programs share a multiprocessor: one multiplies while the other is at its softmax, or waits for its first keys.

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
    warpgroup_mma_wait,
)

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
from ..common.primitives import LOG2_E
from ..schedule.inverse_index import IndexRecord, InverseIndex
from ..schedule.work_items import ItemsRecord, WorkItems, item_entries, load_item
from .key_major import softmax_rows

ROWS = gl.constexpr(64)
STAGES = gl.constexpr(2)
# Of a thread, at the launch: two programs share a multiprocessor.
REGISTERS = 128


@gluon.jit
def load_entry(entries_ptr, number, origin, last):
    """Entry `number` of a piece, counted from the chunk's first; beyond the last one, that."""
    return gl.cast(gl.load(entries_ptr + gl.minimum(number, last)) - origin, gl.int32)


@gluon.jit
def copy_queries(
    tiles, buffers, barriers, pointers, numbers, TOPK: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr
):
    """The copying warp's work: the block's keys and values, then the queries of every step."""
    q_tiles, k_tiles, v_tiles, _ = tiles
    q_boxes, k_box, v_box, _ = buffers
    keys_full, full, empty, _, _ = barriers
    plan_ptr, entries_ptr, offsets_ptr, _ = pointers
    chunk, group, origin, token0, seqlen_q, num_blocks, num_items, _, _ = numbers
    ENTRIES: gl.constexpr = ROWS // HEADS
    HALVES: gl.constexpr = HEAD_DIM // HALF
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    batch, first_key, begin, stop = item.batch, item.first_key, item.begin, item.stop
    first_query = gl.cast(token0 - batch * seqlen_q, gl.int32)
    batch = gl.cast(batch, gl.int32)
    if begin < stop:
        copy_block(k_tiles, v_tiles, [batch, group, first_key, 0], keys_full, k_box, v_box)
        entries_ptr = item_entries(IndexRecord(0, entries_ptr, offsets_ptr, num_blocks, 0, 0, 0, 0), chunk, begin)
        last = stop - begin - 1
        for step in range((stop - begin + ENTRIES - 1) // ENTRIES):
            stage = step % STAGES
            # All before any copy is asked for, so that they are under way together.
            queries = ()
            for number in gl.static_range(ENTRIES):
                entry = load_entry(entries_ptr, step * ENTRIES + number, origin, last)
                queries += (first_query + entry // TOPK,)  # type: ignore[assignment]
            mbarrier.wait(empty.index(stage), (step // STAGES & 1) ^ 1)
            mbarrier.expect(full.index(stage), ENTRIES * HALVES * q_tiles.block_type.nbytes)
            gather_rows(q_tiles, q_boxes, queries, batch, group * HEADS, stage, full.index(stage), HALVES)


@gluon.jit
def store_outputs(tiles, buffers, barriers, pointers, numbers, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """The storing warp's work: the partial outputs of every step."""
    partial_tiles = tiles[3]
    out_boxes = buffers[3]
    _, _, _, out_full, out_empty = barriers
    plan_ptr, entries_ptr, offsets_ptr, _ = pointers
    chunk, _, origin, _, _, num_blocks, num_items, _, num_rows = numbers
    ENTRIES: gl.constexpr = ROWS // HEADS
    HALVES: gl.constexpr = HEAD_DIM // HALF
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    begin, stop = item.begin, item.stop
    entries_ptr = item_entries(IndexRecord(0, entries_ptr, offsets_ptr, num_blocks, 0, 0, 0, 0), chunk, begin)
    last = stop - begin - 1
    for step in range((stop - begin + ENTRIES - 1) // ENTRIES):
        rows = ()
        for number in gl.static_range(ENTRIES):
            entry = load_entry(entries_ptr, step * ENTRIES + number, origin, last)
            # Past all rows nothing is written.
            rows += (gl.where(step * ENTRIES + number <= last, entry * HEADS, num_rows),)  # type: ignore[assignment]
        mbarrier.wait(out_full, step & 1)
        for number in gl.static_range(ENTRIES):
            for half in gl.static_range(HALVES):
                box = out_boxes.index(half * ENTRIES + number)
                tma.async_copy_shared_to_global(partial_tiles, [rows[number], half * HALF], box)
        tma.store_wait(0)
        mbarrier.arrive(out_empty, count=1)


@gluon.jit
def hand_over(out, normal, out_rows, out_full):
    """Leave the rows of out, times normal, to the storing warp."""
    normal = gl.convert_layout(normal, gl.SliceLayout(1, out.type.layout))
    out_rows.store((out * normal[:, None]).to(out_rows.dtype))
    fence_async_shared()
    mbarrier.arrive(out_full, count=1)


@gluon.jit
def attend_rows(
    tiles, buffers, barriers, pointers, numbers,
    TOPK: gl.constexpr, HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
):  # fmt: skip
    """The work of the other four warps."""
    q_boxes, k_box, v_box, out_boxes = buffers
    keys_full, full, empty, out_full, out_empty = barriers
    plan_ptr, entries_ptr, offsets_ptr, partial_lse_ptr = pointers
    chunk, _, origin, token0, seqlen_q, num_blocks, num_items, scale, _ = numbers
    ENTRIES: gl.constexpr = ROWS // HEADS
    BLOCK: gl.constexpr = k_box.shape[2]
    dtype: gl.constexpr = k_box.dtype
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    summed: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    q_rows = q_boxes._reinterpret(dtype, [STAGES, ROWS, HEAD_DIM], SIDE_BY_SIDE)
    out_rows = out_boxes._reinterpret(dtype, [ROWS, HEAD_DIM], SIDE_BY_SIDE)
    k, v = k_box.reshape([BLOCK, HEAD_DIM]), v_box.reshape([BLOCK, HEAD_DIM])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, scored))
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    batch, first_key, stop_key, shift, begin, stop = (
        item.batch,
        item.first_key,
        item.stop_key,
        item.shift,
        item.begin,
        item.stop,
    )
    if begin < stop:
        num_keys = stop_key - first_key
        entries_ptr = item_entries(IndexRecord(0, entries_ptr, offsets_ptr, num_blocks, 0, 0, 0, 0), chunk, begin)
        last = stop - begin - 1
        # A query sees as many keys of the block as its number and this.
        seen = gl.cast(token0 - batch * seqlen_q, gl.int32) + shift - first_key + 1
        mbarrier.wait(keys_full, 0)
        if num_keys < BLOCK:
            clear_rows(k, num_keys)
            clear_rows(v, num_keys)
        for step in range((stop - begin + ENTRIES - 1) // ENTRIES):
            stage = step % STAGES
            number = step * ENTRIES + row // HEADS
            entry = load_entry(entries_ptr, number, origin, last)
            # Queries ascend: the first one sees fewest.
            fewest = gl.minimum(load_entry(entries_ptr, step * ENTRIES, origin, last) // TOPK + seen, num_keys)
            mbarrier.wait(full.index(stage), step // STAGES & 1)
            scores = gl.zeros([ROWS, BLOCK], gl.float32, scored)
            scores = warpgroup_mma(q_rows.index(stage), k.permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=[scores])
            mbarrier.arrive(empty.index(stage), count=1)
            if fewest < BLOCK:
                scores = hide_unseen(scores, gl.minimum(entry // TOPK + seen, num_keys) - 1)
            weights, normal, lse = softmax_rows(scores, None, scale * LOG2_E, True, False)
            gl.store(partial_lse_ptr + entry * HEADS + row % HEADS, lse, mask=number <= last)
            weights = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, summed, 2))
            out = gl.zeros([ROWS, HEAD_DIM], gl.float32, summed)
            out = warpgroup_mma(weights, v, out, use_acc=False, is_async=True)
            out = warpgroup_mma_wait(0, deps=[out])
            mbarrier.wait(out_empty, (step & 1) ^ 1)
            hand_over(out, normal, out_rows, out_full)


@gluon.jit(do_not_specialize=["chunk", "group", "origin", "token0", "num_blocks", "num_items", "num_rows"])
def partial_hopper_kernel(
    q_tiles,
    k_tiles,
    v_tiles,
    partial_tiles,
    plan_ptr,
    entries_ptr,
    offsets_ptr,
    partial_lse_ptr,
    chunk,
    group,
    origin,
    token0,
    seqlen_q,
    num_blocks,
    num_items,
    num_rows,
    scale,
    TOPK: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BLOCK: gl.constexpr,
):
    """See the module's docstring. Program i owns item i of a chunk's plan."""
    dtype: gl.constexpr = k_tiles.dtype
    ENTRIES: gl.constexpr = ROWS // HEADS
    HALVES: gl.constexpr = HEAD_DIM // HALF
    buffers = (
        gl.allocate_shared_memory(dtype, [STAGES * HALVES * ENTRIES, 1, HEADS, 1, HALF], q_tiles.layout),
        gl.allocate_shared_memory(dtype, [1, 1, BLOCK, HEAD_DIM], k_tiles.layout),
        gl.allocate_shared_memory(dtype, [1, 1, BLOCK, HEAD_DIM], v_tiles.layout),
        gl.allocate_shared_memory(dtype, [HALVES * ENTRIES, HEADS, HALF], partial_tiles.layout),
    )
    keys_full, full, empty = make_barriers(1, 1), make_barriers(STAGES, 1), make_barriers(STAGES, 1)
    out_full, out_empty = make_barriers(1, 1), make_barriers(1, 1)
    fence_async_shared()
    barriers = (keys_full.index(0), full, empty, out_full.index(0), out_empty.index(0))
    tiles = (q_tiles, k_tiles, v_tiles, partial_tiles)
    pointers = (plan_ptr, entries_ptr, offsets_ptr, partial_lse_ptr)
    numbers = (chunk, group, origin, token0, seqlen_q, num_blocks, num_items, scale, num_rows)
    gl.warp_specialize(
        [
            (attend_rows, (tiles, buffers, barriers, pointers, numbers, TOPK, HEADS, HEAD_DIM)),
            (copy_queries, (tiles, buffers, barriers, pointers, numbers, TOPK, HEADS, HEAD_DIM)),
            (store_outputs, (tiles, buffers, barriers, pointers, numbers, HEADS, HEAD_DIM)),
        ],
        [1, 1],
        [24, 24],
    )


def hopper_boxes(group_size: int, head_dim: int, block_size: int) -> dict[str, list[int]]:
    """The box of each tensor that is copied."""
    keys = [1, 1, block_size, head_dim]
    return {
        "q_tiles": [1, group_size, 1, HALF.value],
        "k_tiles": keys,
        "v_tiles": keys,
        "partial_tiles": [group_size, HALF.value],
    }


def hopper_constants(topk: int, group_size: int, head_dim: int, block_size: int) -> dict[str, int]:
    """The compile-time arguments of `partial_hopper_kernel`."""
    return {"TOPK": topk, "HEADS": group_size, "HEAD_DIM": head_dim, "BLOCK": block_size}


def partial_launcher_hopper(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    scale: float,
    index: InverseIndex,
    partial: Tensor,
    partial_lse: Tensor,
) -> Callable[[WorkItems, int], None]:
    """As `by_block.partial_launcher`."""
    num_kv_heads, head_dim = k.shape[1], k.shape[3]
    group_size = q.shape[1] // num_kv_heads
    chunks = index.num_ranges // num_kv_heads
    boxes = hopper_boxes(group_size, head_dim, block_size).values()
    # Made once: a descriptor costs the host as much as a launch.
    tiles = [shared_box(x, box) for x, box in zip((q, k, v, partial.view(-1, head_dim)), boxes, strict=True)]
    constants = hopper_constants(index.topk, group_size, head_dim, block_size)

    def launch(pieces: WorkItems, chunk: int) -> None:
        group, first_token = chunk // chunks, chunk % chunks * index.range_tokens
        partial_hopper_kernel[(pieces.num_items,)](
            *tiles,
            pieces.table,
            index.entries,
            index.offsets,
            partial_lse,
            chunk,
            group,
            (group * index.num_tokens + first_token) * index.topk,
            index.first_token + first_token,
            q.shape[2],
            index.num_blocks,
            pieces.num_items,
            partial_lse.numel(),
            scale,
            **constants,
            num_warps=4,
            maxnreg=REGISTERS,
        )

    return launch
