"""The student's logsumexp, which `gradient` takes as given: of each entry's block, then of each token.

Program (i, part, n) of `block_lse_kernel` owns work item i of range n of a pass, and one part of its block; program
(i, 0, n) of `index_lse_kernel` owns some tokens of the range. See `launch` for the formulas.
"""

import triton
import triton.language as tl

from ..common.launch import Launch, Options
from ..common.sizes import cdiv
from ..schedule.inverse_index import find_token_range
from .loads import LossCall, find_entries, load_entries, load_index_keys, load_part, load_rows


@triton.jit
def block_lse_kernel(index_q, index_k, buffers, index, items, sizes, first_range, C: tl.constexpr):
    """partial_lse [entry, part] of the student's scores, base 2."""
    part = load_part(items, first_range, C.columns)
    if part.begin >= part.stop:
        return
    own = find_entries(part, index_q, index, items, sizes, first_range)
    y = load_index_keys(index_k, part, C)
    precision: tl.constexpr = "ieee" if y.dtype == tl.float32 else "tf32"
    key = part.first_key + tl.arange(0, C.columns)
    for step in range(0, own.number, C.rows):
        row = step + tl.arange(0, C.rows)
        entry = load_entries(own.entries_ptr, row, own.number, own.first_entry)
        query = own.first_query + entry // index.topk
        x = load_rows(own.x_base, query, index_q.stride_s, index_q.stride_d, C.index_head_dim, C.index_depth)
        scores = tl.dot(x, tl.trans(y), input_precision=precision) * sizes.index_scale
        seen = key[None, :] < tl.minimum(query + part.shift + 1, part.stop_key)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        largest = tl.max(scores, axis=1)
        offset = tl.where(largest == float("-inf"), 0.0, largest)
        lse = offset + tl.log2(tl.sum(tl.exp2(scores - offset[:, None]), axis=1))
        share = entry.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(buffers.partial_lse + share, lse, mask=row < own.number)


@triton.jit
def index_lse_kernel(buffers, index, first_range, C: tl.constexpr, rows: tl.constexpr):
    """index_lse [token of the pass], base 2: the logsumexp of partial_lse [token of the pass, slot, part].

    A program owns `rows` tokens.
    """
    tokens = find_token_range(index, first_range + tl.program_id(2), index.topk)
    first_row = tl.program_id(2) * index.range_tokens
    row = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    live = row < tokens.num_tokens
    largest = tl.full([rows], float("-inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    for first in range(0, index.topk * C.parts, C.shares):
        share = first + tl.arange(0, C.shares)
        inside = live[:, None] & (share < index.topk * C.parts)[None, :]
        entry = row[:, None] * index.topk + (share // C.parts)[None, :]
        used = tl.load(index.numbers + tokens.first_entry + entry, mask=inside, other=index.none) < index.none
        place = buffers.partial_lse + (first_row * index.topk + entry) * C.parts + (share % C.parts)[None, :]
        lse = tl.load(place, mask=used, other=float("-inf"))
        new_largest = tl.maximum(largest, tl.max(lse, axis=1))
        offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp2(largest - offset) + tl.sum(tl.exp2(lse - offset[:, None]), axis=1)
        largest = new_largest
    tl.store(buffers.index_lse + first_row + row, largest + tl.log2(total), mask=live)


def block_lse(x: LossCall) -> Launch:
    """Fills partial_lse for a pass."""
    grid = x.items.num_items, x.constants.parts, 1
    arguments = x.arguments(block_lse_kernel)
    return Launch(block_lse_kernel, grid, arguments, {"C": x.constants}, Options(4, x.config.num_stages))


def index_lse(x: LossCall) -> Launch:
    """Fills index_lse for a pass from its partial_lse."""
    rows = max(16, 1024 // x.constants.shares)
    grid = cdiv(x.index.range_tokens, rows), 1, 1
    arguments = x.arguments(index_lse_kernel)
    return Launch(index_lse_kernel, grid, arguments, {"C": x.constants, "rows": rows})
