"""What the backward needs of each query row beside its vectors: delta and lse, then gathered in the order of the lists.

See `attention_backward` for the formulas.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..common.primitives import LOG2_E
from ..common.target import padded
from ..schedule.inverse_index import IndexRecord, find_token_range


@triton.jit
def statistics_kernel(
    grad_out_ptr,
    grad_lse_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    stride_lb,
    stride_lh,
    stride_ls,
    seqlen_q,
    num_kv_heads,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    """delta, and lse in base 2, [B, Hkv, Sq, G]: program (i, b * Hkv + group) owns ROWS neighbouring numbers."""
    pair = tl.program_id(1).to(tl.int64)
    batch, group = pair // num_kv_heads, pair % num_kv_heads
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.cast(seqlen_q, tl.int64) * HEADS
    query, head = row // HEADS, group * HEADS + row % HEADS
    depth = tl.arange(0, DEPTH)[None, :]
    mask = live[:, None] & (depth < HEAD_DIM)
    depth = depth.to(tl.int64)
    grad_rows = grad_out_ptr + batch * stride_gb + head * stride_gh + query * stride_gs
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + query * stride_os
    grad = tl.load(grad_rows[:, None] + depth * stride_gd, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_rows[:, None] + depth * stride_od, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, axis=1)
    if GRAD_LSE:
        grad_lse = grad_lse_ptr + batch * stride_mb + head * stride_mh + query * stride_ms
        delta -= tl.load(grad_lse, mask=live, other=0.0)
    lse = tl.load(lse_ptr + batch * stride_lb + head * stride_lh + query * stride_ls, mask=live, other=0.0)
    place = pair * seqlen_q * HEADS + row
    tl.store(delta_ptr + place, delta, mask=live)
    # +inf makes every probability of a row that sees no key 0.
    tl.store(lse2_ptr + place, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), mask=live)


def row_statistics(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """delta and the lse in base 2, [B, Hkv, Sq, G] fp32."""
    batch, num_heads, seqlen_q, head_dim = out.shape
    group_size = num_heads // num_kv_heads
    delta, lse2 = (lse.new_empty(batch, num_kv_heads, seqlen_q, group_size) for _ in range(2))
    depth = padded(head_dim)
    rows = max(16, 4096 // depth)
    given = lse if grad_lse is None else grad_lse
    statistics_kernel[(triton.cdiv(seqlen_q * group_size, rows), batch * num_kv_heads)](
        grad_out,
        given,
        out,
        lse,
        delta,
        lse2,
        *grad_out.stride(),
        *given.stride(),
        *out.stride(),
        *lse.stride(),
        seqlen_q,
        num_kv_heads,
        HEADS=group_size,
        HEAD_DIM=head_dim,
        ROWS=rows,
        DEPTH=depth,
        GRAD_LSE=grad_lse is not None,
        num_warps=4,
    )
    return delta, lse2


@dataclass(frozen=True)
class Workspace:
    """What is kept of one chunk at a time, in the order of the lists.

    queries, limits: [entries] int32, the query of an entry and how many keys of its block it sees; row_delta, row_lse2:
    [entries, G] fp32; places: [tokens, topk] int32, where an entry went, -1 for a slot of no list; partial_q:
    [entries, G, D] in q's dtype, each row's own share of dQ; partial_k, partial_v: [slots, block_size, D] fp32, the
    shares of the pieces that have a slot.
    """

    queries: Tensor
    limits: Tensor
    places: Tensor
    row_delta: Tensor
    row_lse2: Tensor
    partial_q: Tensor
    partial_k: Tensor
    partial_v: Tensor


@triton.jit(do_not_specialize=["chunk", "first_token", "num_tokens", "chunk_tokens", "lowest"])
def gather_kernel(
    blocks_ptr,
    numbers_ptr,
    entries_ptr,
    offsets_ptr,
    delta_ptr,
    lse2_ptr,
    queries_ptr,
    limits_ptr,
    places_ptr,
    row_delta_ptr,
    row_lse2_ptr,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    num_blocks,
    lowest,
    topk,
    seqlen_q,
    num_kv_heads,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The query of each entry of the chunk, how many keys of its block it sees, and its rows' delta and lse.

    All in the order of the lists; places[token of the chunk, slot] is where in that order an entry went. Program i owns
    ENTRIES of them.
    """
    chunk = tl.cast(chunk, tl.int64)
    begin = tl.load(offsets_ptr + chunk * num_blocks)
    count = tl.load(offsets_ptr + (chunk + 1) * num_blocks) - begin
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    live = place < count
    entry = tl.load(entries_ptr + begin + place, mask=live, other=0)
    block = tl.load(numbers_ptr + entry, mask=live, other=lowest).to(tl.int64) - lowest - chunk * num_blocks
    tokens = find_token_range(IndexRecord(0, 0, 0, 0, first_token, num_tokens, chunk_tokens, 0), chunk, topk)
    group, origin, token0 = tokens.group, tokens.first_entry, tokens.first_token
    # Tokens, and entries of a chunk, are numbered in 32 bits, and divided much faster so.
    local = tl.where(live, entry - origin, 0).to(tl.int32)
    token = token0.to(tl.int32) + local // topk
    batch, query = (token // seqlen_q).to(tl.int64), token % seqlen_q
    first_key = tl.load(blocks_ptr + block * 4 + 1, mask=live, other=0)
    stop_key = tl.load(blocks_ptr + block * 4 + 2, mask=live, other=0)
    shift = tl.load(blocks_ptr + block * 4 + 3, mask=live, other=0)
    limit = tl.minimum(stop_key, query + shift + 1) - first_key
    tl.store(queries_ptr + place, query, mask=live)
    tl.store(limits_ptr + place, limit, mask=live)
    tl.store(places_ptr + local, place.to(tl.int32), mask=live)

    head = tl.arange(0, LANES)[None, :]
    mask = live[:, None] & (head < HEADS)
    source = (((batch * num_kv_heads + group) * seqlen_q + query) * HEADS)[:, None] + head
    row = place[:, None] * HEADS + head
    tl.store(row_delta_ptr + row, tl.load(delta_ptr + source, mask=mask), mask=mask)
    tl.store(row_lse2_ptr + row, tl.load(lse2_ptr + source, mask=mask), mask=mask)
