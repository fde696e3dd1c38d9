"""The forward in KV-outer order: one program owns a block's keys and values, and runs over the rows that chose it.

A program owns a piece of the list of (token, slot) entries that chose one block (see `inverse_index`). It loads the
block's keys and values once and runs over the entries' query rows: row r is head r % G of entry r // G, so that tiles
are full for any group size. Each (entry, head) gets a partial output, normalised, and its lse, in a workspace that one
chunk of tokens fills at a time; `combine_slots` then joins the slots of each token.

Cost for E entries (topk a token and group): 4 E G Bk D FLOPs, 8.8 TFLOP at 128K tokens of M3's shape, which is 11.2 ms
at 783 TFLOP/s. Bytes: E G D elements of queries read, as many of partials written, and read again; in bf16 34 GB each
there, 24 ms at 4.25 TB/s, and 16 ms if the queries of a chunk stay in the L2 cache. Keys and values are read once
a chunk for each piece of a list.
"""

from collections.abc import Callable

import triton
import triton.language as tl

from ...workspace import chunk_tokens
from ..common.fp8 import as_bits, load_vectors
from ..common.primitives import LOG2_E, await_previous, key_limit, locate_block, page_arguments
from ..common.target import padded, target_of
from ..schedule.inverse_index import IndexRecord, find_token_range, inverse_index
from ..schedule.work_items import ItemsRecord, WorkItems, cut_into_items, item_entries, load_item
from .combine import combine_constants, combine_slots_kernel
from .config import ForwardConfig


@triton.jit
def split_rows(first_row, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """(entry of the list, head) of each of the rows of a step, first_row being a multiple of ROWS."""
    lane = tl.arange(0, ROWS)
    if ROWS % GROUP_SIZE == 0:
        # Heads are known when this is compiled, which saves much of the work on addresses.
        return first_row // GROUP_SIZE + lane // GROUP_SIZE, lane % GROUP_SIZE
    else:
        row = first_row + lane
        return row // GROUP_SIZE, row % GROUP_SIZE


@triton.jit
def load_entries(entries_ptr, origin, first_row, num_entries, GROUP_SIZE: tl.constexpr, ROWS: tl.constexpr):
    """[ROWS] int32: each row's entry, counted from the chunk's first; beyond the last row, the last one."""
    entry, _ = split_rows(first_row, GROUP_SIZE, ROWS)
    return (tl.load(entries_ptr + tl.minimum(entry, num_entries - 1)) - origin).to(tl.int32)


@triton.jit
def load_queries(
    q_base, entry, first_query, first_row, strides,
    TOPK: tl.constexpr, GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[ROWS, DEPTH]: the query rows of the entries; strides of heads, queries and elements."""
    stride_qh, stride_qs, stride_qd = strides
    d = tl.arange(0, DEPTH)
    _, head = split_rows(first_row, GROUP_SIZE, entry.shape[0])
    query = first_query + (entry.to(tl.uint32) // TOPK).to(tl.int32)
    q_head = q_base + head.to(tl.int64)[:, None] * stride_qh + d[None, :] * stride_qd
    row = q_head + query.to(tl.int64)[:, None] * stride_qs
    return tl.load(row) if HEAD_DIM == DEPTH else tl.load(row, mask=(d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def softmax_rows(scores, count, scale, POSITIVE: tl.constexpr, MASKED: tl.constexpr):
    """(weights, 1 / their sums, lse in base 2) of scores [ROWS, COLUMNS], of which row r sees the first count[r].

    Without MASKED all rows see the whole tile.
    """
    if not POSITIVE:
        scores, scale = scores * scale, 1.0
    if MASKED:
        scores = tl.where(tl.arange(0, scores.shape[1])[None, :] < count[:, None], scores, float("-inf"))
    # A positive scale is multiplied in after the maximum, together with the subtraction of it.
    row_max = tl.max(scores, axis=1) * scale
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(scores * scale - shift[:, None])
    row_sum = tl.sum(weights, axis=1)
    return weights, tl.where(row_sum > 0, 1.0 / row_sum, 0.0), row_max + tl.log2(row_sum)


@triton.jit
def store_rows(partial_ptr, slot, out, normal, live, HEAD_DIM: tl.constexpr):
    """Write the rows of out [ROWS, DEPTH], times normal, to where they belong in the partial results."""
    d = tl.arange(0, out.shape[1])
    row = partial_ptr + slot[:, None] * HEAD_DIM + d[None, :]
    out = (out * normal[:, None]).to(partial_ptr.dtype.element_ty)
    # Read once, and by another kernel: the queries are to stay in the L2 cache instead.
    tl.store(row, out, mask=live[:, None] & (d < HEAD_DIM)[None, :], eviction_policy="evict_first")


@triton.jit(do_not_specialize=["chunk", "seqlen_k", "max_pages", "num_pages", "num_kv_heads"])
def partial_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    page_table_ptr,
    entries_ptr,
    offsets_ptr,
    plan_ptr,
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
    STAGES: tl.constexpr,
    POSITIVE: tl.constexpr,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Fill the partial results of one piece.

    For each slot of each token of the chunk and each head: partial [chunk_tokens, topk, G, D] is the attention to this
    block alone, partial_lse [chunk_tokens, topk, G] its lse, base 2.
    """
    await_previous(OVERLAP)
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    batch, first_key, stop_key, shift, begin, stop = (
        item.batch,
        item.first_key,
        item.stop_key,
        item.shift,
        item.begin,
        item.stop,
    )
    if begin >= stop:
        return
    tokens = find_token_range(IndexRecord(0, 0, 0, 0, first_token, num_tokens, chunk_tokens, 0), chunk, TOPK)
    group, origin, token0 = tokens.group, tokens.first_entry, tokens.first_token
    num_keys = stop_key - first_key
    place, key = batch, first_key
    if PAGED:
        place, key = locate_block(
            page_table_ptr, max_pages, batch, 0, first_key // BLOCK, num_pages, BLOCK, PAGED
        )  # fmt: skip
    key = key.to(tl.int64)
    vector = (place * num_kv_heads + group) * seqlen_k + key
    k = load_vectors(
        k_ptr + place * stride_kb + group * stride_kh + key * stride_ks, k_scale_ptr + vector, num_keys,
        stride_ks, stride_kd, q_ptr.dtype.element_ty, COLUMNS, HEAD_DIM, DEPTH, SCALED, NATIVE,
    )  # fmt: skip
    v = load_vectors(
        v_ptr + place * stride_vb + group * stride_vh + key * stride_vs, v_scale_ptr + vector, num_keys,
        stride_vs, stride_vd, q_ptr.dtype.element_ty, COLUMNS, HEAD_DIM, DEPTH, SCALED, NATIVE,
    )  # fmt: skip
    q_base = q_ptr + batch * stride_qb + group * GROUP_SIZE * stride_qh
    entries_ptr = item_entries(IndexRecord(0, entries_ptr, offsets_ptr, num_blocks, 0, 0, 0, 0), chunk, begin)
    num_entries = stop - begin
    num_rows = num_entries * GROUP_SIZE
    first_query, seen_from = (token0 - batch * seqlen_q).to(tl.int32), shift - first_key + 1
    # A step loads the rows of the next, whose entries were loaded a step before that.
    strides = stride_qh, stride_qs, stride_qd
    row = tl.cast(0, tl.int32)
    entry = load_entries(entries_ptr, origin, row, num_entries, GROUP_SIZE, ROWS)
    upcoming = load_entries(entries_ptr, origin, row + ROWS, num_entries, GROUP_SIZE, ROWS)
    q = load_queries(q_base, entry, first_query, row, strides, TOPK, GROUP_SIZE, HEAD_DIM, DEPTH)
    # Tokens ascend: those that do not see the whole block come first.
    sees = first_query + ((tl.load(entries_ptr) - origin) // TOPK).to(tl.int32) + seen_from
    precision: tl.constexpr = "ieee" if k.dtype == tl.float32 else "tf32"
    while (row < num_rows) & (tl.minimum(sees, num_keys) < COLUMNS):
        later = load_entries(entries_ptr, origin, row + 2 * ROWS, num_entries, GROUP_SIZE, ROWS)
        following = load_queries(
            q_base, upcoming, first_query, row + ROWS, strides, TOPK, GROUP_SIZE, HEAD_DIM, DEPTH
        )  # fmt: skip
        number, head = split_rows(row, GROUP_SIZE, ROWS)
        slot = entry * GROUP_SIZE + head
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        count = tl.minimum(first_query + entry // TOPK + seen_from, num_keys)
        weights, normal, lse = softmax_rows(scores, count, scale, POSITIVE, True)
        out = tl.dot(weights.to(v.dtype), v, input_precision=precision)
        tl.store(partial_lse_ptr + slot, lse, mask=number < num_entries)
        store_rows(partial_ptr, slot, out, normal, number < num_entries, HEAD_DIM)
        entry, upcoming, q = upcoming, later, following
        row += ROWS
        first_entry = tl.load(entries_ptr + tl.minimum(row // GROUP_SIZE, num_entries - 1)) - origin
        sees = first_query + (first_entry // TOPK).to(tl.int32) + seen_from
    # A step's last product runs on into the next step, which stores it.
    out, normal, slot = tl.zeros([ROWS, DEPTH], tl.float32), tl.zeros([ROWS], tl.float32), entry
    for clear_row in tl.range(row, num_rows, ROWS, num_stages=STAGES):
        later = load_entries(entries_ptr, origin, clear_row + 2 * ROWS, num_entries, GROUP_SIZE, ROWS)
        following = load_queries(
            q_base, upcoming, first_query, clear_row + ROWS, strides, TOPK, GROUP_SIZE, HEAD_DIM, DEPTH
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        before, _ = split_rows(clear_row - ROWS, GROUP_SIZE, ROWS)
        store_rows(partial_ptr, slot, out, normal, (before < num_entries) & (clear_row > row), HEAD_DIM)
        weights, normal, lse = softmax_rows(scores, None, scale, POSITIVE, False)
        number, head = split_rows(clear_row, GROUP_SIZE, ROWS)
        slot = entry * GROUP_SIZE + head
        tl.store(partial_lse_ptr + slot, lse, mask=number < num_entries)
        out = tl.dot(weights.to(v.dtype), v, input_precision=precision)
        entry, upcoming, q = upcoming, later, following
    # On the loop's own path only: where ptxas sees one to here that leaves the loop out, it waits for each product.
    if row < num_rows:
        number, _ = split_rows(row + (num_rows - row - 1) // ROWS * ROWS, GROUP_SIZE, ROWS)
        store_rows(partial_ptr, slot, out, normal, number < num_entries, HEAD_DIM)


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
        "DEPTH": padded(head_dim),
        "ROWS": config.rows,
        "STAGES": config.num_stages,
        "POSITIVE": scale > 0,
    }


def partial_launcher(
    q, k, v, cache, sequences, block_size, scale, config, index, partial, partial_lse
) -> Callable[[WorkItems, int], None]:
    """What fills the partial results of a chunk, given its pieces and its number."""
    pages, max_pages, num_pages = page_arguments(cache.page_table, sequences, k)
    target = target_of(q.device)
    constants = {
        **partial_constants(config, q.shape[1] // k.shape[1], q.shape[3], block_size, index.topk, scale),
        **cache.constants(target),
        **config.launch_options(),
        **target.overlap(),
    }

    def launch(pieces: WorkItems, chunk: int) -> None:
        partial_attention_kernel[(pieces.num_items,)](
            q,
            as_bits(k),
            as_bits(v),
            partial_lse if cache.k_scale is None else cache.k_scale,
            partial_lse if cache.v_scale is None else cache.v_scale,
            pages,
            index.entries,
            index.offsets,
            pieces.table,
            partial,
            partial_lse,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            chunk,
            q.shape[2],
            k.shape[2],
            max_pages,
            num_pages,
            index.first_token,
            index.num_tokens,
            index.range_tokens,
            index.num_blocks,
            pieces.num_items,
            k.shape[1],
            scale * LOG2_E.value,
            **constants,
        )

    return launch


def attend_by_block(
    q, k, v, cache, block_indices, sequences, skip, block_size, scale, config, hopper, out, lse
) -> None:
    """Fill out and lse of the tokens whose `skip` [Hkv, B*Sq] is 0, in KV-outer order.

    hopper: by the kernel of `by_block_hopper`.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, topk = k.shape[1], block_indices.shape[3]
    group_size = num_heads // num_kv_heads
    size = chunk_tokens(batch * seqlen_q, topk * group_size * (head_dim * q.element_size() + 4))
    # Elements of a chunk's partial results are numbered in 32 bits.
    size = max(1, min(size, (2**31 - 1) // (topk * group_size * head_dim)))
    index = inverse_index(
        block_indices,
        sequences,
        batch=batch,
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=key_limit(cache.page_table, k),
        block_size=block_size,
        range_tokens=size,
        skip=skip,
    )
    pieces = cut_into_items(index, config.length)
    partial = q.new_empty(index.range_tokens, topk, group_size, head_dim)
    partial_lse = lse.new_empty(index.range_tokens, topk, group_size)
    combine = combine_constants(group_size, head_dim, topk)
    overlap = target_of(q.device).overlap()
    if hopper:
        # Imported where it is launched: another version of Triton may not have what it needs.
        from .key_major_sm90 import partial_launcher_hopper

        attend_chunk = partial_launcher_hopper(q, k, v, block_size, scale, index, partial, partial_lse)
    else:
        results = index, partial, partial_lse
        attend_chunk = partial_launcher(q, k, v, cache, sequences, block_size, scale, config, *results)
    for chunk in range(index.num_ranges):
        attend_chunk(pieces, chunk)
        combine_slots_kernel[(triton.cdiv(index.range_tokens, combine["TOKENS"]),)](
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
            index.range_tokens,
            index.none,
            num_kv_heads,
            topk,
            **combine,
            **overlap,
            num_warps=4,
        )
