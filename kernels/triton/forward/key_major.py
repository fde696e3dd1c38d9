"""Key-major attention: one program holds a block's keys and values, and takes the query rows that chose the block.

A program owns a work item: a part of the list of (token, top-k slot) entries that chose one block (see
`inverse_index`). It loads the block's keys and values once and takes the entries' query rows in steps: row r is head
r % G of entry r // G, so that tiles are full for any group size. Each (entry, head) gets a partial output, normalised,
and its lse, in a workspace that holds one token range at a time; `combine` then joins the slots of each token.

Cost for E entries (topk per token and group): 4 E G Bk D FLOPs, 8.8 TFLOP at 128K tokens of M3's shape, which is
11.2 ms at 783 TFLOP/s. Bytes: E G D elements of queries read, as many of partial results written, and read again; in
bf16 34 GB each there, 24 ms at 4.25 TB/s, and 16 ms if the queries of a token range stay in the L2 cache. Keys and
values are read once per work item.
"""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from ...problem import Problem
from ..common.fp8 import dequantize, load_scales
from ..common.launch import Launch, Options, view
from ..common.overlap import await_previous
from ..common.records import Scales, keys_per_row, locate_block, pages_of
from ..common.sizes import Sizes, sizes_of
from ..common.softmax import LOG2_E, softmax_rows
from ..common.target import Target, padded
from ..common.tiles import load_tile
from ..schedule.inverse_index import InverseIndex, count_seen, find_token_range
from ..schedule.work_items import cut_into_items, item_entries, load_item
from .config import ForwardConfig
from .records import Inputs, Partial, Vectors


@dataclass(frozen=True)
class KeyMajorConstants(Sizes):
    """Constants of `key_major_kernel`; rows: per step; positive: the scale is; native: the GPU converts e4m3."""

    columns: int
    rows: int
    stages: int
    positive: bool
    native: bool
    overlap: bool


@triton.jit
def split_rows(first_row, rows: tl.constexpr, group_size: tl.constexpr):
    """(entry of the work item, head) of each of the rows of a step, first_row being a multiple of `rows`."""
    lane = tl.arange(0, rows)
    if rows % group_size == 0:
        # Heads are known when this is compiled, which saves much of the work on addresses.
        return first_row // group_size + lane // group_size, lane % group_size
    else:
        row = first_row + lane
        return row // group_size, row % group_size


@triton.jit
def load_entries(entries_ptr, origin, first_row, num_entries, C: tl.constexpr):
    """[rows] int32: each row's entry, counted from the token range's first; beyond the last row, the last one."""
    entry, _ = split_rows(first_row, C.rows, C.group_size)
    return (tl.load(entries_ptr + tl.minimum(entry, num_entries - 1)) - origin).to(tl.int32)


@triton.jit
def load_queries(q, base, entry, first_query, first_row, C: tl.constexpr):
    """[rows, depth]: the query rows of the entries; base: of the group's first head, in the batch row."""
    d = tl.arange(0, C.depth)
    _, head = split_rows(first_row, C.rows, C.group_size)
    query = first_query + (entry.to(tl.uint32) // C.topk).to(tl.int32)
    row = base + head.to(tl.int64)[:, None] * q.stride_h + d.to(tl.int64)[None, :] * q.stride_d
    row += query.to(tl.int64)[:, None] * q.stride_s
    return tl.load(row) if C.head_dim == C.depth else tl.load(row, mask=(d < C.head_dim)[None, :], other=0.0)


@triton.jit
def load_vectors(vectors, place, group, num_kv_heads, num_keys, dtype: tl.constexpr, C: tl.constexpr):
    """The keys or values [columns, depth] of the block at `place`, in dtype, zero from num_keys on."""
    x = vectors.view
    key = place.key.to(tl.int64)
    base = x.ptr + place.row * x.stride_b + group * x.stride_h + key * x.stride_s
    rows = load_tile(base, 0, num_keys, x.stride_s, x.stride_d, C.columns, C.head_dim, C.depth)
    if vectors.scale is not None:
        column = tl.arange(0, C.columns)
        scales = vectors.scale + (place.row * num_kv_heads + group) * vectors.seqlen_k + key
        rows = dequantize(rows, load_scales(scales, column, column < num_keys), dtype, C.native)
    return rows


@triton.jit
def store_rows(out_ptr, slot, out, normal, live, head_dim: tl.constexpr):
    """Write the live rows of out [rows, depth], times normal, to rows `slot` of the partial results."""
    d = tl.arange(0, out.shape[1])
    row = out_ptr + slot[:, None] * head_dim + d[None, :]
    out = (out * normal[:, None]).to(out_ptr.dtype.element_ty)
    # Read once, and by another kernel: the queries are to stay in the L2 cache instead.
    tl.store(row, out, mask=live[:, None] & (d < head_dim)[None, :], eviction_policy="evict_first")


@triton.jit
def key_major_kernel(
    q, keys, values, scales, pages, index, items, partial, first_range, seqlen_q, num_kv_heads, scale, C: tl.constexpr
):
    """Fill the partial results of one work item; see `Partial`. Grid (work items, ranges of a pass)."""
    await_previous(C.overlap)
    ROWS: tl.constexpr = C.rows
    DEPTH: tl.constexpr = C.depth
    dtype: tl.constexpr = q.ptr.dtype.element_ty
    range_number = tl.program_id(1)
    item = load_item(items, first_range, range_number)
    if item.begin >= item.stop:
        return
    keys, values = Vectors(keys, scales.k, scales.seqlen_k), Vectors(values, scales.v, scales.seqlen_k)
    tokens = find_token_range(index, first_range + range_number, C.topk)
    origin = find_token_range(index, first_range, C.topk).first_entry
    num_keys = item.stop_key - item.first_key
    place = locate_block(pages, item.batch, item.first_key, item.first_key * 0, C.block_size)
    k = load_vectors(keys, place, tokens.group, num_kv_heads, num_keys, dtype, C)
    v = load_vectors(values, place, tokens.group, num_kv_heads, num_keys, dtype, C)
    base = q.ptr + item.batch * q.stride_b + tokens.group * C.group_size * q.stride_h
    entries_ptr = item_entries(index, items, first_range, range_number, item.begin)
    num_entries = item.stop - item.begin
    num_rows = num_entries * C.group_size
    first_query = (tokens.first_token - item.batch * seqlen_q).to(tl.int32) - range_number * index.range_tokens
    seen_from = item.shift - item.first_key + 1
    # A step loads the rows of the next, whose entries were loaded a step before that.
    row = tl.cast(0, tl.int32)
    entry = load_entries(entries_ptr, origin, row, num_entries, C)
    upcoming = load_entries(entries_ptr, origin, row + ROWS, num_entries, C)
    q_rows = load_queries(q, base, entry, first_query, row, C)
    # Tokens ascend: those that do not see the whole block come first.
    query = first_query + ((tl.load(entries_ptr) - origin) // C.topk).to(tl.int32)
    sees = count_seen(index, query + seen_from, item.batch, query, item.first_key, seqlen_q)
    precision: tl.constexpr = "ieee" if k.dtype == tl.float32 else "tf32"
    while (row < num_rows) & (tl.minimum(sees, num_keys) < C.columns):
        later = load_entries(entries_ptr, origin, row + 2 * ROWS, num_entries, C)
        following = load_queries(q, base, upcoming, first_query, row + ROWS, C)
        number, head = split_rows(row, ROWS, C.group_size)
        slot = entry * C.group_size + head
        scores = tl.dot(q_rows, tl.trans(k), input_precision=precision)
        query = first_query + entry // C.topk
        count = count_seen(index, query + seen_from, item.batch, query, item.first_key, seqlen_q)
        count = tl.minimum(count, num_keys)
        weights, normal, lse = softmax_rows(scores, count, scale, C.positive, True)
        out = tl.dot(weights.to(v.dtype), v, input_precision=precision)
        tl.store(partial.lse + slot, lse, mask=number < num_entries)
        store_rows(partial.out, slot, out, normal, number < num_entries, C.head_dim)
        entry, upcoming, q_rows = upcoming, later, following
        row += ROWS
        first_entry = tl.load(entries_ptr + tl.minimum(row // C.group_size, num_entries - 1)) - origin
        query = first_query + (first_entry // C.topk).to(tl.int32)
        sees = count_seen(index, query + seen_from, item.batch, query, item.first_key, seqlen_q)
    # A step's last product runs on into the next step, which stores it.
    out, normal, slot = tl.zeros([ROWS, DEPTH], tl.float32), tl.zeros([ROWS], tl.float32), entry
    for clear_row in tl.range(row, num_rows, ROWS, num_stages=C.stages):
        later = load_entries(entries_ptr, origin, clear_row + 2 * ROWS, num_entries, C)
        following = load_queries(q, base, upcoming, first_query, clear_row + ROWS, C)
        scores = tl.dot(q_rows, tl.trans(k), input_precision=precision)
        before, _ = split_rows(clear_row - ROWS, ROWS, C.group_size)
        store_rows(partial.out, slot, out, normal, (before < num_entries) & (clear_row > row), C.head_dim)
        weights, normal, lse = softmax_rows(scores, None, scale, C.positive, False)
        number, head = split_rows(clear_row, ROWS, C.group_size)
        slot = entry * C.group_size + head
        tl.store(partial.lse + slot, lse, mask=number < num_entries)
        out = tl.dot(weights.to(v.dtype), v, input_precision=precision)
        entry, upcoming, q_rows = upcoming, later, following
    # On the loop's own path only: where ptxas sees one to here that leaves the loop out, it waits for each product.
    if row < num_rows:
        number, _ = split_rows(row + (num_rows - row - 1) // ROWS * ROWS, ROWS, C.group_size)
        store_rows(partial.out, slot, out, normal, number < num_entries, C.head_dim)


@functools.lru_cache
def key_major_constants(config: ForwardConfig, problem: Problem, target: Target) -> KeyMajorConstants:
    """Constants of `key_major_kernel`."""
    return KeyMajorConstants(
        **sizes_of(problem),
        columns=padded(problem.block_size),
        rows=config.rows,
        stages=config.num_stages,
        positive=problem.positive_scale,
        native=problem.scaled and target.has_e4m3,
        overlap=target.overlaps,
    )


def supports(problem: Problem, target: Target, config: ForwardConfig) -> bool:
    """Every problem."""
    return True


def launch(
    inputs: Inputs, index: InverseIndex, partial: Partial, problem: Problem, config: ForwardConfig, target: Target
) -> Launch:
    """The launch that fills the partial results of a pass, but for its ranges."""
    constants = key_major_constants(config, problem, target)
    cache, items = inputs.cache, cut_into_items(index, config.length)
    vectors = {"q": view(inputs.q), "keys": view(inputs.k), "values": view(inputs.v)}
    scales = Scales(cache.k_scale, cache.v_scale, keys_per_row(cache.k_scale, inputs.k))
    stored = {"scales": scales, "pages": pages_of(cache.page_table, inputs.k)}
    work = {"index": index, "items": items, "partial": partial, "first_range": 0}
    sizes = {"seqlen_q": inputs.q.shape[2], "num_kv_heads": problem.num_kv_heads, "scale": inputs.scale * LOG2_E.value}
    arguments = {**vectors, **stored, **work, **sizes}
    options = Options(config.num_warps, config.num_stages, config.max_registers, constants.overlap)
    return Launch(key_major_kernel, (items.num_items, 1, 1), arguments, {"C": constants}, options)
