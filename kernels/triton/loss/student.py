"""The student's logsumexp, which `loss_gradient` takes as given: of each entry's block, then of each token."""

import triton
import triton.language as tl

from ..common.primitives import load_tile
from ..common.target import padded
from ..schedule.inverse_index import IndexRecord, find_token_range
from ..schedule.work_items import item_entries
from .config import LossConfig
from .loads import VARYING, load_entries, load_part, load_rows


@triton.jit(do_not_specialize=VARYING)
def block_lse_kernel(
    index_q_ptr,
    index_k_ptr,
    entries_ptr,
    offsets_ptr,
    plan_ptr,
    partial_lse_ptr,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_xd,
    stride_yb,
    stride_ys,
    stride_yd,
    seqlen_q,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    num_blocks,
    num_items,
    topk,
    index_scale,
    INDEX_DIM: tl.constexpr,
    INDEX_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """partial_lse [entry, part] of the student's scores, base 2; index_scale is in base 2 as well."""
    batch, first_key, stop_key, shift, begin, stop = load_part(plan_ptr, chunk, num_items, COLUMNS)
    if begin >= stop:
        return
    tokens = find_token_range(IndexRecord(0, 0, 0, 0, first_token, num_tokens, chunk_tokens, 0), chunk, topk)
    group, origin, token0 = tokens.group, tokens.first_entry, tokens.first_token
    x_base = index_q_ptr + batch * stride_xb + group * stride_xh
    y_base = index_k_ptr + batch * stride_yb
    index_k = load_tile(y_base, first_key, stop_key - first_key, stride_ys, stride_yd, COLUMNS, INDEX_DIM, INDEX_DEPTH)
    precision: tl.constexpr = "ieee" if index_k.dtype == tl.float32 else "tf32"
    query0 = (token0 - batch * seqlen_q).to(tl.int32)
    entries_ptr = item_entries(IndexRecord(0, entries_ptr, offsets_ptr, num_blocks, 0, 0, 0, 0), chunk, begin)
    num_entries = stop - begin
    key = first_key + tl.arange(0, COLUMNS)
    for step in range(0, num_entries, ROWS):
        entry = step + tl.arange(0, ROWS)
        local = load_entries(entries_ptr, entry, num_entries, origin)
        query = query0 + local // topk
        index_q = load_rows(x_base, query, stride_xs, stride_xd, INDEX_DIM, INDEX_DEPTH)
        scores = tl.dot(index_q, tl.trans(index_k), input_precision=precision) * index_scale
        seen = key[None, :] < tl.minimum(query + shift + 1, stop_key)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        largest = tl.max(scores, axis=1)
        offset = tl.where(largest == float("-inf"), 0.0, largest)
        lse = offset + tl.log2(tl.sum(tl.exp2(scores - offset[:, None]), axis=1))
        share = local.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_lse_ptr + share, lse, mask=entry < num_entries)


@triton.jit(do_not_specialize=VARYING)
def index_lse_kernel(
    partial_lse_ptr,
    numbers_ptr,
    index_lse_ptr,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    none,
    topk,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """index_lse [token in chunk], base 2: the logsumexp of partial_lse [token in chunk, slot, part]."""
    tokens = find_token_range(IndexRecord(0, 0, 0, 0, first_token, num_tokens, chunk_tokens, 0), chunk, topk)
    origin, token0 = tokens.first_entry, tokens.first_token
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.minimum(chunk_tokens, first_token + num_tokens - token0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, topk * PARTS, SHARES):
        share = first + tl.arange(0, SHARES)
        inside = live[:, None] & (share < topk * PARTS)[None, :]
        local = row[:, None] * topk + (share // PARTS)[None, :]
        used = tl.load(numbers_ptr + origin + local, mask=inside, other=none) < none
        lse = tl.load(partial_lse_ptr + local * PARTS + (share % PARTS)[None, :], mask=used, other=float("-inf"))
        new_largest = tl.maximum(largest, tl.max(lse, axis=1))
        offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp2(largest - offset) + tl.sum(tl.exp2(lse - offset[:, None]), axis=1)
        largest = new_largest
    tl.store(index_lse_ptr + row, largest + tl.log2(total), mask=live)


def lse_constants(config: LossConfig, index_dim: int) -> dict[str, int]:
    """The compile-time arguments of `block_lse_kernel`."""
    return {
        "INDEX_DIM": index_dim,
        "INDEX_DEPTH": padded(index_dim),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
    }
