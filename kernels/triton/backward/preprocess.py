"""What the backward needs of each query row beside its vectors: delta and lse, then gathered in the order of the lists.

See `launch` for the formulas, and `workspace` for the layouts.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ..common.launch import Launch, view
from ..common.passes import PassLaunch
from ..common.sizes import Sizes, cdiv, sizes_of
from ..common.softmax import LOG2_E
from ..schedule.inverse_index import InverseIndex, count_seen, find_token_range, load_block
from .workspace import TileSizes, Workspace, first_row


class Statistics(NamedTuple):
    """delta, and the lse in base 2: [B, Hkv, Sq, G] fp32."""

    delta: Any
    lse2: Any


@dataclass(frozen=True)
class StatisticsConstants(Sizes):
    """Constants of `statistics_kernel`; rows: per program."""

    rows: int


@triton.jit
def statistics_kernel(grad_out, grad_lse, out, lse, statistics, seqlen_q, num_kv_heads, C: tl.constexpr):
    """Statistics: a program owns C.rows neighbouring numbers of one group. grad_lse is None for zero."""
    num_rows = tl.cast(seqlen_q, tl.int64) * C.group_size
    tiles = tl.cdiv(num_rows, C.rows)
    pair = tl.program_id(0) // tiles
    batch, group = pair // num_kv_heads, pair % num_kv_heads
    row = tl.program_id(0) % tiles * C.rows + tl.arange(0, C.rows)
    live = row < num_rows
    query, head = row // C.group_size, group * C.group_size + row % C.group_size
    d = tl.arange(0, C.depth)[None, :]
    mask = live[:, None] & (d < C.head_dim)
    d = d.to(tl.int64)
    grad_rows = grad_out.ptr + batch * grad_out.stride_b + head * grad_out.stride_h + query * grad_out.stride_s
    out_rows = out.ptr + batch * out.stride_b + head * out.stride_h + query * out.stride_s
    grad = tl.load(grad_rows[:, None] + d * grad_out.stride_d, mask=mask, other=0.0).to(tl.float32)
    outputs = tl.load(out_rows[:, None] + d * out.stride_d, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(grad * outputs, axis=1)
    if grad_lse is not None:
        place = batch * grad_lse.stride_b + head * grad_lse.stride_h + query * grad_lse.stride_s
        delta -= tl.load(grad_lse.ptr + place, mask=live, other=0.0)
    place = batch * lse.stride_b + head * lse.stride_h + query * lse.stride_s
    lse_rows = tl.load(lse.ptr + place, mask=live, other=0.0)
    place = pair * seqlen_q * C.group_size + row
    tl.store(statistics.delta + place, delta, mask=live)
    # +inf makes every probability of a row that sees no key 0.
    lse2 = tl.where(lse_rows == float("-inf"), float("inf"), lse_rows * LOG2_E)
    tl.store(statistics.lse2 + place, lse2, mask=live)


@functools.lru_cache
def statistics_constants(problem: Problem) -> StatisticsConstants:
    """Constants of `statistics_kernel`: a program reads 4096 numbers of each tensor, or 16 rows."""
    sizes = sizes_of(problem)
    return StatisticsConstants(**sizes, rows=max(16, 4096 // sizes["depth"]))


def row_statistics(grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, problem: Problem) -> Statistics:
    """The Statistics of all query rows."""
    batch, _, seqlen_q, _ = out.shape
    num_kv_heads, group_size = problem.num_kv_heads, problem.group_size
    statistics = Statistics(*(lse.new_empty(batch, num_kv_heads, seqlen_q, group_size) for _ in range(2)))
    constants = statistics_constants(problem)
    gradients = {"grad_out": view(grad_out), "grad_lse": None if grad_lse is None else view(grad_lse[..., None])}
    results = {"out": view(out), "lse": view(lse[..., None]), "statistics": statistics}
    arguments = {**gradients, **results, "seqlen_q": seqlen_q, "num_kv_heads": num_kv_heads}
    # Many short rows are more than a grid's second dimension may have.
    grid = cdiv(seqlen_q * group_size, constants.rows) * batch * num_kv_heads, 1, 1
    Launch(statistics_kernel, grid, arguments, {"C": constants}).run()
    return statistics


@dataclass(frozen=True)
class GatherConstants(TileSizes):
    """Constants of `gather_kernel`; count: entries per program; heads: G, padded."""

    count: int
    heads: int


@triton.jit
def gather_kernel(index, statistics, rows, places_ptr, first_range, seqlen_q, num_kv_heads, C: tl.constexpr):
    """Fill the GatheredRows and `Workspace.places` of a pass; program (i, n) owns entries of range n."""
    range_number = tl.cast(first_range + tl.program_id(1), tl.int64)
    offsets = index.offsets + range_number * (index.num_blocks + 1)
    begin = tl.load(offsets)
    count = tl.load(offsets + index.num_blocks) - begin
    place = tl.program_id(0) * C.count + tl.arange(0, C.count)
    live = place < count
    entry = tl.load(index.entries + begin + place, mask=live, other=0)
    number = tl.load(index.numbers + entry, mask=live, other=0).to(tl.int64)
    block = load_block(index.blocks, number - range_number * index.num_blocks, live)
    tokens = find_token_range(index, range_number, index.topk)
    # Tokens, and entries of a token range, fit into 32 bits, which are divided much faster.
    local = tl.where(live, entry - tokens.first_entry, 0).to(tl.int32)
    token = tokens.first_token.to(tl.int32) + local // index.topk
    batch, query = (token // seqlen_q).to(tl.int64), token % seqlen_q
    end = count_seen(index, query + block.shift + 1, batch, query, 0, seqlen_q)
    limit = tl.minimum(block.stop_key, end) - block.first_key
    origin = tl.program_id(1) * index.range_tokens * index.topk
    place += origin
    row = first_row(place, C)
    tl.store(rows.limits + place, limit, mask=live)
    tl.store(places_ptr + origin + local, row, mask=live)

    head = tl.arange(0, C.heads)[None, :]
    mask = live[:, None] & (head < C.group_size)
    source = (((batch * num_kv_heads + tokens.group) * seqlen_q + query) * C.group_size)[:, None] + head
    row = row[:, None] + head
    tl.store(rows.queries + row, tl.broadcast_to(query[:, None], mask.shape), mask=mask)
    tl.store(rows.delta + row, tl.load(statistics.delta + source, mask=mask), mask=mask)
    tl.store(rows.lse2 + row, tl.load(statistics.lse2 + source, mask=mask), mask=mask)


@functools.lru_cache
def gather_constants(sizes: TileSizes) -> GatherConstants:
    """Constants of `gather_kernel`: a program gathers 1024 rows."""
    heads = triton.next_power_of_2(sizes.group_size)
    return GatherConstants(**vars(sizes), count=max(1, 1024 // heads), heads=heads)


def gather_rows(index: InverseIndex, statistics: Statistics, workspace: Workspace, num_kv_heads: int) -> PassLaunch:
    """Fills the rows and places of the workspace for a pass."""
    constants = gather_constants(workspace.sizes)
    read = {"index": index, "statistics": statistics}
    written = {"rows": workspace.rows, "places_ptr": workspace.places}
    sizes = {"seqlen_q": statistics.delta.shape[2], "num_kv_heads": num_kv_heads}
    arguments = {**read, **written, "first_range": 0, **sizes}
    grid = cdiv(index.range_tokens * index.topk, constants.count), 0, 1
    return PassLaunch(Launch(gather_kernel, grid, arguments, {"C": constants}))
