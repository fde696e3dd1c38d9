"""A decoding step's scorer for Hopper, in Gluon: one warp copies keys, the others score blocks and rank them.

It does what `selection.selection_kernel` does, for a few query rows. The copying warp has asked for the first keys
before the queries have arrived, and is then as far ahead of the products as shared memory allows. One program to a
multiprocessor reads memory as fast as several do, and leaves fewer lists to merge.

Triton's interpreter knows no Gluon: the checks of `benchmarks/gpu.py` compare this kernel with the oracle.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common.fp8 import decode_scales, join_pairs, split_e4m3
from ..common.gluon_sm90 import lanes, make_barriers, meet, shared_box
from ..common.primitives import FLT_MAX, announce_next, await_previous, find_tile, load_sequence, locate_block
from .config import SelectionConfig
from .launch import LENGTHS
from .topk import first_blocks, insert_block, list_row, store_ranking

# Of so many steps, one is for who comes to it first: programs that are served slower by memory do fewer.
SHARED = gl.constexpr(8)


@gluon.jit
def load_tile(tables, numbers, TOPK: gl.constexpr, BLOCK: gl.constexpr, TOKENS: gl.constexpr, TABLE: gl.constexpr):
    """The program's tile: (sequence, batch, first token of the sequence, of the tile, end of tokens, first key, keys,
    forced blocks, scored blocks).
    """
    sequences_ptr, tile_ends_ptr, _, _ = tables
    num_sequences, seqlen_q, _, _, _, _, _, num_init = numbers
    sequence, tile = find_tile(gl.program_id(0), tile_ends_ptr, num_sequences, seqlen_q, TOKENS, TABLE)
    batch, q_start, q_end, k_start, k_end = load_sequence(sequences_ptr, gl.minimum(sequence, num_sequences - 1))
    first = gl.where(sequence < num_sequences, q_start + tile * TOKENS, q_end)
    num_keys = k_end - k_start
    seen = gl.where(first < q_end, num_keys - q_end + gl.minimum(first + TOKENS, q_end), 0)
    num_blocks = (gl.maximum(seen, 0) + BLOCK - 1) // BLOCK
    forced = gl.where(num_blocks <= TOPK, num_blocks, num_init)
    return sequence, batch, q_start, first, q_end, k_start, num_keys, forced, num_blocks - forced


@gluon.jit
def take_ticket(ticket_ptr, wanted, SPLIT: gl.constexpr):
    """The counter's next number, if it is wanted, in the first of [32]: whose numbers nobody waits for before use."""
    lane = gl.arange(0, 32, lanes(gl.num_warps()))
    ticket = lane * 0
    if SPLIT:
        ticket = gl.atomic_add(ticket_ptr + ticket, ticket + 1, mask=(lane == 0) & wanted, sem="relaxed")
    return ticket


@gluon.jit
def block_number(step, steps, ticket, num_splits, SPLIT: gl.constexpr):
    """Which of the scored blocks is the program's step-th: from `steps` on by its ticket."""
    number = gl.program_id(1) + step * num_splits
    if SPLIT:
        lane = gl.arange(0, 32, ticket.type.layout)
        shared = steps * num_splits + gl.max(gl.where(lane == 0, ticket, 0), axis=0)
        number = gl.where(step < steps, number, shared)
    return number


@gluon.jit
def scale_box(scale_boxes, stage, STAGES: gl.constexpr):
    """A stage's box of scales, each of which begins at a multiple of 128 bytes."""
    return scale_boxes.index(stage * (scale_boxes.shape[0] // STAGES))


@gluon.jit
def write_block(block_box, block):
    """The block whose keys a stage has, or -1 after the last, for the other warps."""
    block_box.store(gl.full([1], block, gl.int32, lanes(gl.num_warps())))


@gluon.jit
def await_block(boxes, barriers, step, STAGES: gl.constexpr):
    """The block of a step, once its keys are there."""
    mbarrier.wait(barriers[0].index(step % STAGES), step // STAGES & 1)
    block = boxes[2].index(step % STAGES).load(lanes(gl.num_warps()))
    return gl.max(block, axis=0)


@gluon.jit
def copy_keys(
    tiles, boxes, barriers, tables, numbers,
    TOPK: gl.constexpr, BLOCK: gl.constexpr, TOKENS: gl.constexpr, TABLE: gl.constexpr, PAGED: gl.constexpr,
    SCALED: gl.constexpr, STAGES: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """The copying warp's work: the program's blocks of keys, and their scales."""
    key_tiles, scale_tiles = tiles
    key_boxes, scale_boxes, block_boxes = boxes
    full, empty = barriers
    _, _, seqlen_k, max_pages, num_pages, num_splits, _, _ = numbers
    _, batch, _, _, _, k_start, _, forced, scored = load_tile(tables, numbers, TOPK, BLOCK, TOKENS, TABLE)
    ticket_ptr = tables[3] + gl.program_id(0)
    steps = scored // num_splits
    steps -= steps // SHARED
    step = 0
    ticket = take_ticket(ticket_ptr, steps == 0, SPLIT)
    number = block_number(step, steps, ticket, num_splits, SPLIT)
    while number < scored:
        ticket = take_ticket(ticket_ptr, step + 1 >= steps, SPLIT)
        stage, turn, block = step % STAGES, step // STAGES, forced + number
        row, key = locate_block(tables[2], max_pages, batch, k_start, block, num_pages, BLOCK, PAGED)
        ready = full.index(stage)
        mbarrier.wait(empty.index(stage), (turn & 1) ^ 1)
        write_block(block_boxes.index(stage), block)
        if SCALED:
            mbarrier.expect(ready, key_tiles.block_type.nbytes + scale_tiles.block_type.nbytes)
            place = (row * seqlen_k + key).to(gl.int32)
            tma.async_copy_global_to_shared(scale_tiles, [place], ready, scale_box(scale_boxes, stage, STAGES))
        else:
            mbarrier.expect(ready, key_tiles.block_type.nbytes)
        tma.async_copy_global_to_shared(key_tiles, [row.to(gl.int32), key, 0], ready, key_boxes.index(stage))
        step += 1
        number = block_number(step, steps, ticket, num_splits, SPLIT)
    # Each program's last ticket is for no block, and this one the last of all: see `tickets`.
    if SPLIT and number == scored + num_splits - 1:
        gl.store(ticket_ptr, 0)
    mbarrier.wait(empty.index(step % STAGES), (step // STAGES & 1) ^ 1)
    write_block(block_boxes.index(step % STAGES), -1)
    mbarrier.arrive(full.index(step % STAGES), count=1)


@gluon.jit
def place_queries(queries, q_box, batch, first, q_end, ROWS: gl.constexpr, GROUPS: gl.constexpr, SCALED: gl.constexpr):
    """The tile's query rows into shared memory; to e4m3 keys as the pairs of `split_e4m3`."""
    index_q_ptr, stride_qb, stride_qh, stride_qs, stride_qd = queries
    DEPTH: gl.constexpr = q_box.shape[1]
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row, depth = gl.arange(0, ROWS, gl.SliceLayout(1, loaded)), gl.arange(0, DEPTH, gl.SliceLayout(0, loaded))
    token = first + row // GROUPS
    place = batch * stride_qb + (row % GROUPS).to(gl.int64) * stride_qh + token.to(gl.int64) * stride_qs
    live = (token < q_end) & (row // GROUPS < ROWS // GROUPS)
    q = gl.load(index_q_ptr + place[:, None] + depth.to(gl.int64)[None, :] * stride_qd, mask=live[:, None], other=0.0)
    q_box.store(split_e4m3(q) if SCALED else q)
    fence_async_shared()
    meet()


@gluon.jit
def scale_scores(products, scales):
    """As `scoring.score_e4m3`: scores [keys, rows] of products [keys, 2 rows] with the pairs of `split_e4m3`."""
    return join_pairs(products * decode_scales(scales)[:, None])


@gluon.jit
def block_maximum(scores, block, visible, num_local, BLOCK: gl.constexpr):
    """As `scoring.masked_maximum`, of scores [keys, rows]: m [rows] of a block."""
    key = block * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, scores.type.layout))
    seen = key[:, None] < gl.convert_layout(visible, gl.SliceLayout(0, scores.type.layout))[None, :]
    best = gl.convert_layout(gl.max(gl.where(seen, scores, float("-inf")), axis=0), visible.type.layout)
    best = gl.minimum(gl.maximum(best, -FLT_MAX), FLT_MAX)
    best = gl.where(block > (visible - 1) // BLOCK - num_local, float("inf"), best)
    return gl.where(block * BLOCK < visible, best, float("-inf"))


@gluon.jit
def rank_keys(
    boxes, q_box, barriers, tables, numbers, queries, outputs,
    TOPK: gl.constexpr, BLOCK: gl.constexpr, ROWS: gl.constexpr, GROUPS: gl.constexpr, TABLE: gl.constexpr,
    SCALED: gl.constexpr, STAGES: gl.constexpr, KEPT: gl.constexpr, SPLIT: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """The work of the other warps."""
    key_boxes, scale_boxes, _ = boxes
    _, seqlen_q, _, _, _, num_splits, num_local, _ = numbers
    TOKENS: gl.constexpr = ROWS // GROUPS
    COLUMNS: gl.constexpr = q_box.shape[0]
    DEPTH: gl.constexpr = q_box.shape[1]
    scored: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, COLUMNS, 32 if SCALED else 16])
    ranked: gl.constexpr = lanes(gl.num_warps())
    tile = load_tile(tables, numbers, TOPK, BLOCK, TOKENS, TABLE)
    sequence, batch, q_start, first, q_end, _, num_keys, forced, _ = tile
    place_queries(queries, q_box, batch, first, q_end, ROWS, GROUPS, SCALED)
    row = gl.arange(0, ROWS, ranked)
    token = first + row // GROUPS
    live = (token < q_end) & (row // GROUPS < TOKENS)
    visible = gl.where(live, num_keys - q_end + token + 1, 0)
    lists = first_blocks(KEPT, gl.where(gl.program_id(1) == 0, forced, 0), visible, BLOCK)
    step = 0
    block = await_block(boxes, barriers, step, STAGES)
    while block >= 0:
        stage = step % STAGES
        keys = key_boxes.index(stage).reshape([BLOCK, DEPTH])
        scores = gl.zeros([BLOCK, COLUMNS], gl.float32, scored)
        # e4m3 products are added up with about 14 bits, as in `scoring.score_e4m3`.
        scores = warpgroup_mma(keys, q_box.permute((1, 0)), scores, use_acc=False, is_async=True)
        if SCALED:
            scales = scale_box(scale_boxes, stage, STAGES).load(gl.SliceLayout(1, scored))
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(barriers[1].index(stage), count=1)
        if SCALED:
            scores = scale_scores(scores, scales)
        lists = insert_block(lists, block_maximum(scores, block, visible, num_local, BLOCK), block)
        step += 1
        block = await_block(boxes, barriers, step, STAGES)
    announce_next(OVERLAP)
    lists_row = list_row(sequence, token - q_start, row % GROUPS, seqlen_q, GROUPS)
    ids_row = (batch * GROUPS + row % GROUPS) * seqlen_q + token
    store_ranking(lists, outputs[0], outputs[1], ids_row, lists_row, live, num_splits, TOPK, KEPT, 1, SPLIT)


@gluon.jit(do_not_specialize=LENGTHS)
def selection_hopper_kernel(
    index_q_ptr,
    key_tiles,
    sequences_ptr,
    tile_ends_ptr,
    page_table_ptr,
    scale_tiles,
    ids_ptr,
    lists_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kd,
    num_sequences,
    seqlen_q,
    seqlen_k,
    max_pages,
    num_pages,
    num_splits,
    num_local,
    num_init,
    tickets_ptr,
    GROUPS: gl.constexpr,
    TOPK: gl.constexpr,
    BLOCK: gl.constexpr,
    DEPTH: gl.constexpr,
    ROWS: gl.constexpr,
    KEPT: gl.constexpr,
    STAGES: gl.constexpr,
    TABLE: gl.constexpr,
    SPLIT: gl.constexpr,
    PAGED: gl.constexpr,
    SCALED: gl.constexpr,
    NATIVE: gl.constexpr,
    OVERLAP: gl.constexpr,
):
    """See the module's docstring. Grid and arguments are those of `selection.selection_kernel`, but for the boxes."""
    dtype: gl.constexpr = key_tiles.dtype
    TOKENS: gl.constexpr = ROWS // GROUPS
    key_boxes = gl.allocate_shared_memory(dtype, [STAGES, 1, BLOCK, DEPTH], key_tiles.layout)
    # What is copied lands on multiples of 128 bytes.
    PITCH: gl.constexpr = 128 // BLOCK if BLOCK < 128 else 1
    scale_boxes = gl.allocate_shared_memory(gl.uint8, [STAGES * PITCH, BLOCK], gl.NVMMASharedLayout(0, 8, 1))
    block_boxes = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS * (2 if SCALED else 1), DEPTH], dtype)
    q_box = gl.allocate_shared_memory(dtype, [ROWS * (2 if SCALED else 1), DEPTH], rows)
    barriers = (make_barriers(STAGES, 1), make_barriers(STAGES, 1))
    fence_async_shared()
    await_previous(OVERLAP)
    boxes, tiles = (key_boxes, scale_boxes, block_boxes), (key_tiles, scale_tiles)
    tables = (sequences_ptr, tile_ends_ptr, page_table_ptr, tickets_ptr)
    numbers = (num_sequences, seqlen_q, seqlen_k, max_pages, num_pages, num_splits, num_local, num_init)
    queries = (index_q_ptr, stride_qb, stride_qh, stride_qs, stride_qd)
    outputs = (ids_ptr, lists_ptr)
    gl.warp_specialize(
        [
            (rank_keys, (
                boxes, q_box, barriers, tables, numbers, queries, outputs,
                TOPK, BLOCK, ROWS, GROUPS, TABLE, SCALED, STAGES, KEPT, SPLIT, OVERLAP,
            )),
            (copy_keys, (
                tiles, boxes, barriers, tables, numbers, TOPK, BLOCK, TOKENS, TABLE, PAGED, SCALED, STAGES, SPLIT,
            )),
        ],
        [1],
        [40],
    )  # fmt: skip


def scorer_boxes(index_head_dim: int, block_size: int) -> dict[str, list[int]]:
    """The box of each tensor that is copied."""
    return {"key_tiles": [1, block_size, index_head_dim], "scale_tiles": [block_size]}


def scorer_tiles(
    index_k: torch.Tensor, index_k_scale: torch.Tensor | None, block_size: int
) -> tuple[TensorDescriptor, TensorDescriptor | int]:
    """index_k [B, 1, S, Di] and its scales as boxes for the bulk copy engine."""
    boxes = scorer_boxes(index_k.shape[3], block_size)
    scales = 0 if index_k_scale is None else shared_box(index_k_scale.view(-1), boxes["scale_tiles"])
    return shared_box(index_k[:, 0], boxes["key_tiles"]), scales


def scorer_constants(
    config: SelectionConfig, num_kv_heads: int, index_head_dim: int, block_size: int, topk: int, table: bool
) -> dict[str, int | bool]:
    """The compile-time arguments of `selection_hopper_kernel`, but for how the keys are kept and OVERLAP."""
    return {
        "GROUPS": num_kv_heads,
        "TOPK": topk,
        "BLOCK": block_size,
        "DEPTH": index_head_dim,
        "ROWS": config.rows,
        "KEPT": config.kept,
        "STAGES": config.num_stages,
        "TABLE": table,
        "SPLIT": config.num_splits > 1,
    }
