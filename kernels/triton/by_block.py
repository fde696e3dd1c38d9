"""The forward in KV-outer order: one program owns a block's keys and values, and runs over the rows that chose it.

A program owns a piece of the list of (token, slot) entries that chose one block (see `reverse_index`). It loads the
block's keys and values once and runs over the entries' query rows: row r is head r % G of entry r // G, so that tiles
are full for any group size. Each (entry, head) gets a partial output, normalised, and its lse, in a workspace that one
chunk of tokens fills at a time; `combine_slots` then joins the slots of each token. Keys and values are held as two
halves of the head dim: accumulators and copies then take half the registers and shared memory, and three programs fit
into a multiprocessor instead of two, which is what hides the latency of the gathers.

Cost for E entries (topk a token and group): 4 E G Bk D FLOPs, 8.8 TFLOP at 128K tokens of M3's shape, which is 11.2 ms
at 783 TFLOP/s. Bytes: E G D elements of queries read, as many of partials written, and read again; in bf16 34 GB each
there, 24 ms at 4.25 TB/s, and 16 ms if the queries of a chunk stay in the L2 cache. Keys and values are read once
a chunk for each piece of a list.
"""

import triton
import triton.language as tl

from ..workspace import chunk_tokens
from .combine_slots import combine_constants, combine_slots_kernel
from .configs import ForwardConfig, padded, target_of
from .fp8 import as_bits, load_vectors
from .primitives import LOG2_E, key_limit, locate_block, page_arguments
from .reverse_index import chunk_origin, load_block, load_piece, reverse_index


@triton.jit
def load_halves(
    base, scales, count, stride_s, stride_d, dtype: tl.constexpr,
    COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`load_vectors` of the first HALF columns and of the rest of a matrix [S, HEAD_DIM]."""
    left = load_vectors(
        base, scales, count, stride_s, stride_d, dtype, COLUMNS, HEAD_DIM, HALF, SCALED, NATIVE
    )  # fmt: skip
    right = load_vectors(
        base + HALF * stride_d, scales, count, stride_s, stride_d, dtype, COLUMNS, HEAD_DIM - HALF, HALF, SCALED, NATIVE
    )  # fmt: skip
    return left, right


@triton.jit
def attend_rows(
    q_base,
    k_left,
    k_right,
    v_left,
    v_right,
    entries_ptr,
    partial_ptr,
    partial_lse_ptr,
    origin,
    first_query,
    first_row,
    num_rows,
    seen_from,
    num_keys,
    stride_qh,
    stride_qs,
    stride_qd,
    scale,
    TOPK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    POSITIVE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of `partial_attention_kernel`: ROWS query rows from first_row on against the block's keys.

    Query i sees the first i + seen_from columns. Without MASKED all rows see the whole tile.
    """
    COLUMNS: tl.constexpr = k_left.shape[0]
    HALF: tl.constexpr = k_left.shape[1]
    precision: tl.constexpr = "ieee" if k_left.dtype == tl.float32 else "tf32"
    column, d = tl.arange(0, COLUMNS), tl.arange(0, HALF)
    row = first_row + tl.arange(0, ROWS)
    live = row < num_rows
    entry = (tl.load(entries_ptr + row // GROUP_SIZE, mask=live, other=0) - origin).to(tl.int32)
    head = row % GROUP_SIZE
    query = first_query + entry // TOPK
    q_place = query.to(tl.int64) * stride_qs + head.to(tl.int64) * stride_qh
    left = live[:, None] & (d < HEAD_DIM)[None, :]
    right = live[:, None] & (d < HEAD_DIM - HALF)[None, :]
    q_row = q_base + q_place[:, None] + d[None, :] * stride_qd
    scores = tl.dot(tl.load(q_row, mask=left, other=0.0), tl.trans(k_left), input_precision=precision)
    q_right = tl.load(q_row + HALF * stride_qd, mask=right, other=0.0)
    scores = tl.dot(q_right, tl.trans(k_right), scores, input_precision=precision)
    if not POSITIVE:
        scores, scale = scores * scale, 1.0
    if MASKED:
        count = tl.where(live, tl.minimum(query + seen_from, num_keys), num_keys)
        scores = tl.where(column[None, :] < count[:, None], scores, float("-inf"))
    # A positive scale is multiplied in after the maximum, together with the subtraction of it.
    row_max = tl.max(scores, axis=1) * scale
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(scores * scale - shift[:, None])
    row_sum = tl.sum(weights, axis=1)
    normal = tl.where(row_sum > 0, 1.0 / row_sum, 0.0)[:, None]
    place = entry.to(tl.int64) * GROUP_SIZE + head
    tl.store(partial_lse_ptr + place, row_max + tl.log2(row_sum), mask=live)
    weights = weights.to(v_left.dtype)
    partial_row = partial_ptr + place[:, None] * HEAD_DIM + d[None, :]
    acc = tl.dot(weights, v_left, input_precision=precision) * normal
    tl.store(partial_row, acc.to(partial_ptr.dtype.element_ty), mask=left)
    acc = tl.dot(weights, v_right, input_precision=precision) * normal
    tl.store(partial_row + HALF, acc.to(partial_ptr.dtype.element_ty), mask=right)


@triton.jit(do_not_specialize=["chunk", "seqlen_k", "max_pages", "num_pages", "num_kv_heads"])
def partial_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    page_table_ptr,
    blocks_ptr,
    entries_ptr,
    offsets_ptr,
    ends_ptr,
    items_ptr,
    partial_ptr,
    partial_lse_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    chunk,
    seqlen_q,
    seqlen_k,
    max_pages,
    num_pages,
    first_token,
    num_tokens,
    chunk_tokens,
    num_blocks,
    num_items,
    num_kv_heads,
    scale,
    TOPK: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    LENGTH: tl.constexpr,
    STAGES: tl.constexpr,
    POSITIVE: tl.constexpr,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Fill the partial results of one piece.

    For each slot of each token of the chunk and each head: partial [chunk_tokens, topk, G, D] is the attention to this
    block alone, partial_lse [chunk_tokens, topk, G] its lse, base 2.
    """
    block, begin, stop = load_piece(offsets_ptr, ends_ptr, items_ptr, chunk, num_blocks, num_items, LENGTH)
    if block >= num_blocks:
        return
    batch, first_key, stop_key, shift = load_block(blocks_ptr, block)
    group, origin, token0 = chunk_origin(chunk, first_token, num_tokens, chunk_tokens, TOPK)
    num_keys = stop_key - first_key
    place, key = batch, first_key
    if PAGED:
        place, key = locate_block(
            page_table_ptr, max_pages, batch, 0, first_key // BLOCK, num_pages, BLOCK, PAGED
        )  # fmt: skip
    key = key.to(tl.int64)
    vector = (place * num_kv_heads + group) * seqlen_k + key
    k_left, k_right = load_halves(
        k_ptr + place * stride_kb + group * stride_kh + key * stride_ks, k_scale_ptr + vector, num_keys,
        stride_ks, stride_kd, q_ptr.dtype.element_ty, COLUMNS, HEAD_DIM, DEPTH // 2, SCALED, NATIVE,
    )  # fmt: skip
    v_left, v_right = load_halves(
        v_ptr + place * stride_vb + group * stride_vh + key * stride_vs, v_scale_ptr + vector, num_keys,
        stride_vs, stride_vd, q_ptr.dtype.element_ty, COLUMNS, HEAD_DIM, DEPTH // 2, SCALED, NATIVE,
    )  # fmt: skip
    q_base = q_ptr + batch * stride_qb + group * GROUP_SIZE * stride_qh
    entries_ptr += begin
    num_rows = ((stop - begin) * GROUP_SIZE).to(tl.int32)
    first_query, seen_from = (token0 - batch * seqlen_q).to(tl.int32), shift - first_key + 1
    # Tokens ascend: those that do not see the whole block come first.
    row = tl.cast(0, tl.int32)
    sees = first_query + ((tl.load(entries_ptr) - origin) // TOPK).to(tl.int32) + seen_from
    while (row < num_rows) & (tl.minimum(sees, num_keys) < COLUMNS):
        attend_rows(
            q_base, k_left, k_right, v_left, v_right, entries_ptr, partial_ptr, partial_lse_ptr,
            origin, first_query, row, num_rows, seen_from, num_keys, stride_qh, stride_qs, stride_qd, scale,
            TOPK, GROUP_SIZE, HEAD_DIM, ROWS, POSITIVE, True,
        )  # fmt: skip
        row += ROWS
        entry = tl.load(entries_ptr + tl.minimum(row, num_rows - 1) // GROUP_SIZE) - origin
        sees = first_query + (entry // TOPK).to(tl.int32) + seen_from
    for clear_row in tl.range(row, num_rows, ROWS, num_stages=STAGES):
        attend_rows(
            q_base, k_left, k_right, v_left, v_right, entries_ptr, partial_ptr, partial_lse_ptr,
            origin, first_query, clear_row, num_rows, seen_from, num_keys, stride_qh, stride_qs, stride_qd, scale,
            TOPK, GROUP_SIZE, HEAD_DIM, ROWS, POSITIVE, False,
        )  # fmt: skip


def partial_constants(
    config: ForwardConfig, group_size: int, head_dim: int, block_size: int, topk: int, scale: float
) -> dict[str, int | bool]:
    """The compile-time arguments of `partial_attention_kernel`, beside those of `storage_constants`."""
    return {
        "TOPK": topk,
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "BLOCK": block_size,
        "COLUMNS": padded(block_size),
        "DEPTH": padded(head_dim, least=32),
        "ROWS": config.rows,
        "LENGTH": config.length,
        "STAGES": config.num_stages,
        "POSITIVE": scale > 0,
    }


def attend_by_block(q, k, v, cache, block_indices, sequences, skip, block_size, scale, config, out, lse) -> None:
    """Fill out and lse of the tokens whose `skip` [Hkv, B*Sq] is 0, in KV-outer order."""
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, topk = k.shape[1], block_indices.shape[3]
    group_size = num_heads // num_kv_heads
    size = chunk_tokens(batch * seqlen_q, topk * group_size * (head_dim * q.element_size() + 4))
    index = reverse_index(
        block_indices,
        sequences,
        batch=batch,
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=key_limit(cache.page_table, k),
        block_size=block_size,
        chunk_tokens=size,
        skip=skip,
    )
    pieces = index.pieces(config.length)
    partial = q.new_empty(index.chunk_tokens, topk, group_size, head_dim)
    partial_lse = lse.new_empty(index.chunk_tokens, topk, group_size)
    pages, max_pages, num_pages = page_arguments(cache.page_table, sequences, k)
    for chunk in range(index.num_chunks):
        partial_attention_kernel[(pieces.num_items,)](
            q,
            as_bits(k),
            as_bits(v),
            lse if cache.k_scale is None else cache.k_scale,
            lse if cache.v_scale is None else cache.v_scale,
            pages,
            index.blocks,
            index.entries,
            index.offsets,
            pieces.ends,
            pieces.items,
            partial,
            partial_lse,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            chunk,
            seqlen_q,
            k.shape[2],
            max_pages,
            num_pages,
            index.first_token,
            index.num_tokens,
            index.chunk_tokens,
            index.num_blocks,
            pieces.num_items,
            num_kv_heads,
            scale * LOG2_E.value,
            **partial_constants(config, group_size, head_dim, block_size, topk, scale),
            **cache.constants(target_of(q.device)),
            **config.launch_options(),
        )
        combine_slots_kernel[(index.chunk_tokens,)](
            partial,
            partial_lse,
            index.numbers,
            skip,
            out,
            lse,
            chunk,
            seqlen_q,
            index.first_token,
            index.num_tokens,
            index.chunk_tokens,
            index.num_chunks * index.num_blocks,
            num_kv_heads,
            topk,
            **combine_constants(group_size, head_dim, topk),
            num_warps=4,
        )
