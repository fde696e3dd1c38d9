"""The scorer of a decoding step for Hopper, in Gluon: one warp copies keys, the others score blocks and keep the best.

It computes what `kernel` does, for a few query rows. The copying warp has asked for the first keys before the queries
have arrived, and is then as far ahead of the products as shared memory allows. One program per multiprocessor reads
memory as fast as several do, and leaves fewer lists to merge.

The interpreter cannot run Gluon kernels: the checks of `benchmarks/gpu.py` compare this kernel with the oracle.
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.fp8 import decode_scales, join_pairs, split_e4m3
from ..common.gluon_sm90 import lanes, load_box, make_barriers, meet, shared_box
from ..common.int8 import quantize_int8
from ..common.overlap import announce_next, await_previous
from ..common.records import load_sequence, locate_block
from ..common.tiles import find_tile
from .config import SelectionConfig
from .rule import first_kept, is_forced
from .scoring import IndexKeys, QueryTile
from .topk import FLT_MAX, first_blocks, ids_place, insert_block, list_row, store_topk
from .work_counters import work_counters

# One of so many steps takes its block from a counter: programs that memory serves slower take fewer.
SHARED = gl.constexpr(8)


class Buffers(NamedTuple):
    """Shared memory: keys and scales of each stage, the block that each stage holds, and the queries.

    A stage's scales begin at a multiple of 128 bytes.
    """

    keys: Any
    scales: Any
    blocks: Any
    queries: Any


class Barriers(NamedTuple):
    """Of each stage: full, its keys have arrived; empty, they have been read."""

    full: Any
    empty: Any


class Work(NamedTuple):
    """What the programs share between them: the table of sequences and its tiles, the rule, and counters.

    counters_ptr [tiles]: None where the blocks of a tile are not split.
    """

    sequences_ptr: Any
    tiles: Any
    forced: Any
    counters_ptr: Any


class ScorerTile(NamedTuple):
    """A program's QueryTile, how many of its blocks are kept without a score, and how many are scored."""

    queries: Any
    unscored: Any
    scored: Any


@gluon.jit
def load_tile(work, C: gl.constexpr):
    """The program's ScorerTile; one without queries, and so without blocks, where it has none to do."""
    tiles = work.tiles
    number = find_tile(gl.program_id(0), tiles, C.tokens)
    sequence = load_sequence(work.sequences_ptr, gl.minimum(number.sequence, tiles.num_sequences - 1))
    q_end = sequence.q_end
    first = gl.where(number.sequence < tiles.num_sequences, sequence.q_start + number.number * C.tokens, q_end)
    num_keys = sequence.k_end - sequence.k_start
    seen = gl.where(first < q_end, num_keys - q_end + gl.minimum(first + C.tokens, q_end), 0)
    num_blocks = (gl.maximum(seen, 0) + C.block_size - 1) // C.block_size
    unscored = first_kept(work.forced, num_blocks, C.unscored)
    # Nothing here reads the last field, and Triton 3.6 does not return None from a function.
    queries = QueryTile(number.sequence, sequence.batch, sequence.q_start, q_end, first, sequence.k_start, num_keys, 0)
    return ScorerTile(queries, unscored, num_blocks - unscored)


@gluon.jit
def take_number(counter_ptr, wanted):
    """The counter's next number, if it is wanted, in the first of [32]: nobody waits for it before it is used."""
    lane = gl.arange(0, 32, lanes(gl.num_warps()))
    number = lane * 0
    return gl.atomic_add(counter_ptr + number, number + 1, mask=(lane == 0) & wanted, sem="relaxed")


@gluon.jit
def shared_number(taken):
    """The number that `take_number` took."""
    lane = gl.arange(0, 32, taken.type.layout)
    return gl.max(gl.where(lane == 0, taken, 0), axis=0)


@gluon.jit
def scale_buffer(buffers, stage, stages: gl.constexpr):
    """The buffer of a stage's scales."""
    return buffers.scales.index(stage * (buffers.scales.shape[0] // stages))


@gluon.jit
def write_block(block_buffer, block):
    """The block whose keys a stage has, or -1 after the last, for the other warps."""
    block_buffer.store(gl.full([1], block, gl.int32, lanes(gl.num_warps())))


@gluon.jit
def await_block(buffers, barriers, step, stages: gl.constexpr):
    """The block of a step, once its keys are there."""
    mbarrier.wait(barriers.full.index(step % stages), step // stages & 1)
    block = buffers.blocks.index(step % stages).load(lanes(gl.num_warps()))
    return gl.max(block, axis=0)


@gluon.jit
def copy_block(keys, tile, buffers, barriers, step, block, C: gl.constexpr):
    """Ask for the keys of a step's block, and for their scales."""
    stage, turn = step % C.stages, step // C.stages
    place = locate_block(keys.pages, tile.batch, tile.k_start, block, C.block_size)
    ready = barriers.full.index(stage)
    mbarrier.wait(barriers.empty.index(stage), (turn & 1) ^ 1)
    write_block(buffers.blocks.index(stage), block)
    if keys.scale is None:
        mbarrier.expect(ready, keys.tiles.block_type.nbytes)
    else:
        mbarrier.expect(ready, keys.tiles.block_type.nbytes + keys.scale.block_type.nbytes)
        first = (place.row * keys.seqlen_k + place.key).to(gl.int32)
        load_box(keys.scale, [first], ready, scale_buffer(buffers, stage, C.stages))
    at = [place.row.to(gl.int32), place.key, 0]
    load_box(keys.tiles, at, ready, buffers.keys.index(stage))


@gluon.jit
def copy_keys(keys, buffers, barriers, work, num_splits, C: gl.constexpr):
    """The copying warp's work: the program's blocks of keys, and their scales.

    Of the scored blocks, a program takes every num_splits-th, and the last ones by the counter.
    """
    tile = load_tile(work, C)
    step = 0
    number = gl.program_id(1)
    if work.counters_ptr is None:
        while number < tile.scored:
            copy_block(keys, tile.queries, buffers, barriers, step, tile.unscored + number, C)
            step += 1
            number = gl.program_id(1) + step * num_splits
    else:
        counter_ptr = work.counters_ptr + gl.program_id(0)
        steps = tile.scored // num_splits
        steps -= steps // SHARED
        taken = take_number(counter_ptr, steps == 0)
        number = gl.where(step < steps, number, steps * num_splits + shared_number(taken))
        while number < tile.scored:
            taken = take_number(counter_ptr, step + 1 >= steps)
            copy_block(keys, tile.queries, buffers, barriers, step, tile.unscored + number, C)
            step += 1
            own = gl.program_id(1) + step * num_splits
            number = gl.where(step < steps, own, steps * num_splits + shared_number(taken))
        # Each program's last number is of no block, and this one the last of all: see `work_counters`.
        if number == tile.scored + num_splits - 1:
            gl.store(counter_ptr, 0)
    mbarrier.wait(barriers.empty.index(step % C.stages), (step // C.stages & 1) ^ 1)
    write_block(buffers.blocks.index(step % C.stages), -1)
    mbarrier.arrive(barriers.full.index(step % C.stages), count=1)


@gluon.jit
def place_queries(index_q, q_buffer, tile, C: gl.constexpr):
    """The tile's query rows into shared memory: for e4m3 keys as the pairs of `split_e4m3`, for int8 keys as int8."""
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = gl.arange(0, C.rows, gl.SliceLayout(1, loaded))
    depth = gl.arange(0, C.depth, gl.SliceLayout(0, loaded))
    token, group = tile.first + row // C.num_kv_heads, (row % C.num_kv_heads).to(gl.int64)
    place = tile.batch * index_q.stride_b + group * index_q.stride_h + token.to(gl.int64) * index_q.stride_s
    live = (token < tile.q_end) & (row // C.num_kv_heads < C.tokens)
    places = index_q.ptr + place[:, None] + depth.to(gl.int64)[None, :] * index_q.stride_d
    q = gl.load(places, mask=live[:, None], other=0.0)
    if C.int8:
        q, _ = quantize_int8(q)
    elif C.fp8_product:
        q = split_e4m3(q)
    q_buffer.store(q)
    fence_async_shared()
    meet()


@gluon.jit
def scale_scores(products, scales, C: gl.constexpr):
    """Scores [keys, rows] of products with int8 rows, or [keys, 2 rows] with pairs, as in `scoring.score_e4m3`."""
    products = products.to(gl.float32) * decode_scales(scales)[:, None]
    return products if C.int8 else join_pairs(products)


@gluon.jit
def block_maximum(scores, block, visible, forced, C: gl.constexpr):
    """As `scoring.masked_maximum`, of scores [keys, rows]: m [rows] of a block."""
    key = block * C.block_size + gl.arange(0, C.block_size, gl.SliceLayout(1, scores.type.layout))
    seen = key[:, None] < gl.convert_layout(visible, gl.SliceLayout(0, scores.type.layout))[None, :]
    best = gl.convert_layout(gl.max(gl.where(seen, scores, float("-inf")), axis=0), visible.type.layout)
    best = gl.minimum(gl.maximum(best, -FLT_MAX), FLT_MAX)
    best = gl.where(is_forced(forced, block, (visible - 1) // C.block_size), float("inf"), best)
    return gl.where(block * C.block_size < visible, best, float("-inf"))


@gluon.jit
def rank_keys(index_q, buffers, barriers, work, outputs, scaled: gl.constexpr, C: gl.constexpr):
    """The work of the other warps: scores of the copied blocks, and the top-k of each row."""
    q_buffer = buffers.queries
    columns: gl.constexpr = q_buffer.shape[0]
    per_key: gl.constexpr = [C.block_size, C.depth]
    per_score: gl.constexpr = [C.block_size, columns]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, columns, 32 if scaled else 16])
    summed: gl.constexpr = gl.int32 if C.int8 else gl.float32
    tile = load_tile(work, C)
    queries = tile.queries
    place_queries(index_q, q_buffer, queries, C)
    row = gl.arange(0, C.rows, lanes(gl.num_warps()))
    token, group = queries.first + row // C.num_kv_heads, row % C.num_kv_heads
    live = (token < queries.q_end) & (row // C.num_kv_heads < C.tokens)
    visible = gl.where(live, queries.num_keys - queries.q_end + token + 1, 0)
    topk = first_blocks(gl.where(gl.program_id(1) == 0, tile.unscored, 0), visible, C)
    step = 0
    block = await_block(buffers, barriers, step, C.stages)
    while block >= 0:
        stage = step % C.stages
        keys = buffers.keys.index(stage).reshape(per_key)
        scores = gl.zeros(per_score, summed, scored)
        # e4m3 products are added up with about 14 bits, as in `scoring.score_e4m3`.
        scores = warpgroup_mma(keys, q_buffer.permute((1, 0)), scores, use_acc=False, is_async=True)
        if scaled:
            scales = scale_buffer(buffers, stage, C.stages).load(gl.SliceLayout(1, scored))
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(barriers.empty.index(stage), count=1)
        if scaled:
            scores = scale_scores(scores, scales, C)
        topk = insert_block(topk, block_maximum(scores, block, visible, work.forced, C), block)
        step += 1
        block = await_block(buffers, barriers, step, C.stages)
    announce_next(C.overlap)
    seqlen_q = work.tiles.seqlen_q
    lists_row = list_row(queries.sequence, token - queries.q_start, group, seqlen_q, C.num_kv_heads)
    ids_row = ids_place(outputs.ids, queries.batch, group, token)
    store_topk(topk, outputs, ids_row, lists_row, live, C)


@gluon.jit
def selection_sm90_kernel(
    index_q,
    key_boxes,
    scale_boxes,
    counters_ptr,
    pages,
    seqlen_k,
    sequences_ptr,
    tiles,
    forced,
    outputs,
    C: gl.constexpr,
):
    """See the module's docstring. Grid (tiles, splits); key_boxes and scale_boxes: boxes for the bulk copy engine."""
    dtype: gl.constexpr = key_boxes.dtype
    scaled: gl.constexpr = scale_boxes is not None
    columns: gl.constexpr = C.rows * (2 if C.fp8_product else 1)
    scale_dtype: gl.constexpr = gl.float32 if C.int8 else gl.uint8
    # Copies of scales are placed at multiples of 128 bytes.
    padding: gl.constexpr = 1 if C.int8 or C.block_size >= 128 else 128 // C.block_size
    per_key: gl.constexpr = [C.stages, 1, C.block_size, C.depth]
    per_scale: gl.constexpr = [C.stages * padding, C.block_size]
    per_query: gl.constexpr = [columns, C.depth]
    query_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for(per_query, dtype)
    key_buffers = gl.allocate_shared_memory(dtype, per_key, key_boxes.layout)
    scale_layout: gl.constexpr = gl.NVMMASharedLayout(0, 32 if C.int8 else 8, 1)
    scale_buffers = gl.allocate_shared_memory(scale_dtype, per_scale, scale_layout)
    block_buffers = gl.allocate_shared_memory(gl.int32, [C.stages, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_buffer = gl.allocate_shared_memory(dtype, per_query, query_layout)
    buffers = Buffers(key_buffers, scale_buffers, block_buffers, q_buffer)
    barriers = Barriers(make_barriers(C.stages, 1), make_barriers(C.stages, 1))
    fence_async_shared()
    await_previous(C.overlap)
    keys = IndexKeys(key_boxes, scale_boxes, pages, seqlen_k)
    work = Work(sequences_ptr, tiles, forced, counters_ptr)
    gl.warp_specialize(
        [
            (rank_keys, (index_q, buffers, barriers, work, outputs, scaled, C)),
            (copy_keys, (keys, buffers, barriers, work, outputs.num_splits, C)),
        ],
        [1],
        [40],
    )


def supports(config: SelectionConfig) -> bool:
    """Whether the configuration was made for this kernel (see `config.fits_sm90`)."""
    return config.sm90


def key_arguments(
    index_k: torch.Tensor, index_k_scale: torch.Tensor | None, config: SelectionConfig, block_size: int, num_tiles: int
) -> dict[str, Any]:
    """The kernel's arguments for the keys: boxes of keys and of scales, and counters where the keys are split."""
    return {
        "key_boxes": shared_box(index_k[:, 0], [1, block_size, index_k.shape[3]]),
        "scale_boxes": None if index_k_scale is None else shared_box(index_k_scale.view(-1), [block_size]),
        "counters_ptr": None if config.num_splits == 1 else work_counters(num_tiles, index_k.device),
    }


KERNEL = selection_sm90_kernel
