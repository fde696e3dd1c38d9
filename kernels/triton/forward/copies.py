"""What the Hopper kernel of the key-major order keeps in shared memory, and how its copying warps fill and empty it.

One warp fetches the query rows of a step, one entry at a time, with the bulk copy engine, in halves of the head dim,
which lie side by side as the tensor cores take them. Another sends an entry's partial output to its place in the same
way. Entries of few rows would be too many copies: there four warps do both, row by row.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..common.gluon_sm90 import HALF, copy_block, gather_rows, load_each, store_box
from ..common.records import locate_block
from ..common.sizes import Sizes
from ..schedule.inverse_index import find_token_range
from ..schedule.work_items import item_entries, load_item

ROWS = gl.constexpr(64)


class Boxes(NamedTuple):
    """Queries, keys, values and partial outputs: descriptors of the bulk copy engine, or buffers in shared memory.

    Where rows are copied one by one, queries and outputs need no descriptors, and share a buffer.
    """

    q: Any
    k: Any
    v: Any
    out: Any


class Barriers(NamedTuple):
    """keys_full: the block's keys and values; full, empty: the stages of queries; out_full, out_empty: the outputs.

    Where rows are copied one by one, each stage of queries is later out_full; empty and out_empty are not used.
    """

    keys_full: Any
    full: Any
    empty: Any
    out_full: Any
    out_empty: Any


class Work(NamedTuple):
    """What a launch works on: the index, its work items, the pages of the keys, a pass's first range, and the rows of
    all partial results.
    """

    index: Any
    items: Any
    pages: Any
    first_range: Any
    seqlen_q: Any
    num_rows: Any


@dataclass(frozen=True)
class ItemShape(Sizes):
    """Constants of `key_major_sm90_kernel`.

    bulk: entries come by the bulk copy engine, `entries` per step; otherwise rows are counted through the work item, 64
    per step. stages: steps whose queries are kept; halves: of the head dim.
    """

    bulk: bool
    entries: int
    stages: int
    halves: int


@gluon.jit
def locate_rows(step, row, shape: gl.constexpr):
    """(entry of the work item, head) of rows of a step."""
    if shape.bulk:
        # Heads are known when this is compiled.
        return step * shape.entries + row // shape.group_size, row % shape.group_size
    else:
        place = step * ROWS + row
        return place // shape.group_size, place % shape.group_size


@gluon.jit
def load_entry(entries_ptr, number, origin, last):
    """Entry `number` of a work item, counted from the pass's first; beyond the last one, the last one."""
    return gl.cast(gl.load(entries_ptr + gl.minimum(number, last)) - origin, gl.int32)


@gluon.jit
def block_place(pages, item, group, shape: gl.constexpr):
    """Where the keys of a work item's block begin, for the bulk copy engine."""
    place = locate_block(pages, item.batch, item.first_key, item.first_key * 0, shape.block_size)
    return gl.cast(place.row, gl.int32), group, place.key, 0


@gluon.jit
def copy_queries(tensors, buffers, barriers, work, shape: gl.constexpr):
    """The copying warp's work: the block's keys and values, then the queries of every step."""
    ENTRIES: gl.constexpr = shape.entries
    HALVES: gl.constexpr = shape.halves
    STAGES: gl.constexpr = shape.stages
    item = load_item(work.items, work.first_range, gl.program_id(1))
    tokens = find_token_range(work.index, work.first_range + gl.program_id(1), shape.topk)
    group, batch = gl.cast(tokens.group, gl.int32), gl.cast(item.batch, gl.int32)
    origin = find_token_range(work.index, work.first_range, shape.topk).first_entry
    # Entries are counted through the pass.
    before = gl.program_id(1) * work.index.range_tokens
    first_query = gl.cast(tokens.first_token - item.batch * work.seqlen_q, gl.int32) - before
    if item.begin < item.stop:
        at = block_place(work.pages, item, group, shape)
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
        mbarrier.wait(barriers.out_full.index(0), step & 1)
        for number in gl.static_range(ENTRIES):
            for half in gl.static_range(HALVES):
                box = buffers.out.index(half * ENTRIES + number)
                store_box(tensors.out, [rows[number], half * HALF], box)
        tma.store_wait(0)
        mbarrier.arrive(barriers.out_empty.index(0), count=1)


@gluon.jit
def find_places(entries_ptr, step, row, origin, last, shape: gl.constexpr):
    """Where the partial results of rows of a step are; a row past the last entry stands for one of that entry."""
    number, head = locate_rows(step, row, shape)
    return load_entry(entries_ptr, number, origin, last) * shape.group_size + head


@gluon.jit
def exchange_rows(q, partial_out, tensors, buffers, barriers, work, shape: gl.constexpr):
    """The work of four copying warps: the block's keys and values, then queries and outputs of every step, row by row.

    A stage is filled with queries, and holds the step's outputs after that, which are written before the next queries
    come.
    """
    STAGES: gl.constexpr = shape.stages
    LANES: gl.constexpr = shape.head_dim // 8
    # A warp copies 16 neighbouring rows, of which two lanes each know the place.
    copied: gl.constexpr = gl.BlockedLayout([LANES // 2, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    placed: gl.constexpr = gl.SliceLayout(1, gl.BlockedLayout([1, 1], [16, 2], [gl.num_warps(), 1], [1, 0]))
    item = load_item(work.items, work.first_range, gl.program_id(1))
    if item.begin < item.stop:
        tokens = find_token_range(work.index, work.first_range + gl.program_id(1), shape.topk)
        origin = find_token_range(work.index, work.first_range, shape.topk).first_entry
        at = block_place(work.pages, item, gl.cast(tokens.group, gl.int32), shape)
        copy_block(tensors.k, tensors.v, at, barriers.keys_full, buffers.k, buffers.v)
        # Entries are counted through the pass.
        before = gl.program_id(1) * work.index.range_tokens
        first_query = tokens.first_token - item.batch * work.seqlen_q - before
        base = q.ptr + item.batch * q.stride_b + tokens.group * shape.group_size * q.stride_h + first_query * q.stride_s
        entries_ptr = item_entries(work.index, work.items, work.first_range, gl.program_id(1), item.begin)
        last = item.stop - item.begin - 1
        num_rows = (last + 1) * shape.group_size
        num_steps = (num_rows + ROWS - 1) // ROWS
        placed_row = gl.arange(0, ROWS, placed)
        row = gl.arange(0, ROWS, gl.SliceLayout(1, copied))
        d = gl.arange(0, shape.head_dim, gl.SliceLayout(0, copied))[None, :]
        following = find_places(entries_ptr, 0, placed_row, origin, last, shape)
        for step in range(num_steps + STAGES):
            stage = step % STAGES
            buffer = buffers.q.index(stage)
            # Loaded a step ahead.
            place, following = following, find_places(entries_ptr, step + 1, placed_row, origin, last, shape)
            if step >= STAGES:
                written = find_places(entries_ptr, step - STAGES, placed_row, origin, last, shape)
                mbarrier.wait(barriers.out_full.index(stage), (step // STAGES & 1) ^ 1)
                to = partial_out + gl.convert_layout(written, row.type.layout)[:, None] * shape.head_dim + d
                live = (step - STAGES) * ROWS + row < num_rows
                # Read once, and by another kernel: the queries are to stay in the L2 cache instead.
                gl.store(to, buffer.load(copied), mask=live[:, None], eviction_policy="evict_first")
            if step < num_steps:
                head, query = place % shape.group_size, place // shape.group_size // shape.topk
                offset = query.to(gl.int64) * q.stride_s + head.to(gl.int64) * q.stride_h
                vectors = base + gl.convert_layout(offset, row.type.layout)
                # The kernel takes tensors that the bulk copy engine reads: their rows are multiples of 16 bytes apart.
                vectors = gl.multiple_of(vectors, 16)
                load_each(buffer, vectors[:, None] + d)
                async_copy.mbarrier_arrive(barriers.full.index(stage), increment_count=False)
