"""Appending new tokens to a cache, contiguous or paged, in one launch: keys, values, index keys, lengths and table.

Row b brings its first lens[b] of n tokens, or all; they are written behind the kv_lens[b] tokens that it holds, and
kv_lens and `sequences` (see `flexmsa.kernels`) become those of n new queries a row. With lens, a row has two
sequences, its new tokens and the rest, which sees no key. Where the cache is e4m3, vectors are quantized (see `fp8`).
A row that does not fit, or whose page table names no page where it needs one, is left as it was, its queries see no
key, and status[1] counts it.

Layouts: k, v [B, Hkv, n, D], index_k [B, 1, n, Di] and caches, any strides; scales [B or num_pages, heads, keys],
page_table, kv_starts, kv_lens, sequences, status contiguous.

Program (b, i) owns tokens i*TOKENS .. of row b, all heads. All programs read the old lengths; the last one to arrive,
by a ticket in status[0], writes the new ones and the table. Each token is read and written once.
"""

import torch
import triton
import triton.language as tl

from ..common.fp8 import as_bits, quantize
from ..common.primitives import announce_next, await_previous, key_limit, locate_block, page_arguments
from ..common.target import padded, target_of


@triton.jit
def new_tokens(
    row, live, lens_ptr, lens_stride, kv_lens_ptr, page_table_ptr, num_tokens, capacity, max_pages, num_pages,
    BLOCK: tl.constexpr, PAGES: tl.constexpr, RAGGED: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """(tokens that are there, tokens to append, whether they fit) of batch rows `row` [R]; none where they do not."""
    filled = tl.load(kv_lens_ptr + row, mask=live, other=0)
    if RAGGED:
        count = tl.load(lens_ptr + row.to(tl.int64) * lens_stride, mask=live, other=0)
        count = tl.minimum(tl.maximum(count, 0), num_tokens)
    else:
        count = filled * 0 + num_tokens
    fits = (filled >= 0) & (count <= capacity - filled)
    if PAGED:
        needs = live & fits & (count > 0)
        stop = tl.cdiv(filled + count, BLOCK)
        pages = page_table_ptr + row.to(tl.int64) * max_pages
        for first in range(0, num_tokens // BLOCK + 2, PAGES):
            block = (filled // BLOCK)[:, None] + first + tl.arange(0, PAGES)[None, :]
            needed = needs[:, None] & (block < stop[:, None])
            page = tl.load(pages[:, None] + block, mask=needed, other=0)
            missing = needed & ((page < 0) | (page >= num_pages))
            fits &= tl.max(missing.to(tl.int32), axis=1) == 0
    return filled, tl.where(fits, count, 0), fits


@triton.jit
def store_sequence(place, row, q_start, q_end, k_start, k_end, live):
    """Rows of the table of sequences."""
    tl.store(place, row, mask=live)
    tl.store(place + 1, q_start, mask=live)
    tl.store(place + 2, q_end, mask=live)
    tl.store(place + 3, k_start, mask=live)
    tl.store(place + 4, k_end, mask=live)


@triton.jit
def write_table(
    lens_ptr, lens_stride, kv_starts_ptr, kv_lens_ptr, page_table_ptr, sequences_ptr, status_ptr, batch, num_tokens,
    capacity, max_pages, num_pages,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PAGES: tl.constexpr, RAGGED: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """kv_lens and sequences of all rows, and the count of those that did not fit."""
    refused = batch * 0
    for first in range(0, batch, ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < batch
        filled, count, fits = new_tokens(
            row, live, lens_ptr, lens_stride, kv_lens_ptr, page_table_ptr, num_tokens, capacity, max_pages, num_pages,
            BLOCK, PAGES, RAGGED, PAGED,
        )  # fmt: skip
        refused += tl.sum((live & ~fits).to(tl.int32), axis=0)
        # Several threads hold the same row: all have to have read its length before one writes it.
        tl.debug_barrier()
        end = filled + count
        tl.store(kv_lens_ptr + row, end, mask=live)
        start = tl.load(kv_starts_ptr + row, mask=live, other=0)
        none = row * 0
        if RAGGED:
            place = sequences_ptr + row.to(tl.int64) * 10
            store_sequence(place, row, none, count, start, end, live)
            store_sequence(place + 5, row, count, none + num_tokens, none, none, live)
        else:
            start, end = tl.where(fits, start, 0), tl.where(fits, end, 0)
            store_sequence(sequences_ptr + row.to(tl.int64) * 5, row, none, none + num_tokens, start, end, live)
    tl.atomic_add(status_ptr + 1, refused)


@triton.jit
def copy_vectors(
    x_ptr, x_place, stride_xd, cache_ptr, cache_place, stride_cd, scale_ptr, scale_place, live,
    HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Vectors [N, HEAD_DIM] from x_ptr + x_place [N] to cache_ptr + cache_place [N], quantized with SCALED."""
    d = tl.arange(0, DEPTH)
    mask = live[:, None] & (d < HEAD_DIM)[None, :]
    d = d.to(tl.int64)[None, :]
    x = tl.load(x_ptr + x_place[:, None] + d * stride_xd, mask=mask, other=0.0)
    if SCALED:
        x, scale = quantize(x)
        tl.store(scale_ptr + scale_place, scale, mask=live)
    tl.store(cache_ptr + cache_place[:, None] + d * stride_cd, x, mask=mask)


LENGTHS = ["lens_stride", "batch", "num_tokens", "capacity", "seqlen_k", "max_pages", "num_pages", "num_kv_heads"]


@triton.jit(do_not_specialize=LENGTHS)
def append_kernel(
    k_ptr,
    v_ptr,
    index_k_ptr,
    lens_ptr,
    cache_k_ptr,
    cache_v_ptr,
    cache_index_k_ptr,
    k_scale_ptr,
    v_scale_ptr,
    index_k_scale_ptr,
    page_table_ptr,
    kv_starts_ptr,
    kv_lens_ptr,
    sequences_ptr,
    status_ptr,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    stride_ib,
    stride_is,
    stride_id,
    stride_ckb,
    stride_ckh,
    stride_cks,
    stride_ckd,
    stride_cvb,
    stride_cvh,
    stride_cvs,
    stride_cvd,
    stride_cib,
    stride_cis,
    stride_cid,
    lens_stride,
    batch,
    num_tokens,
    capacity,
    seqlen_k,
    max_pages,
    num_pages,
    num_kv_heads,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_DEPTH: tl.constexpr,
    PAGES: tl.constexpr,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    INDEX_SCALED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """See the module's docstring. Grid (batch, tiles of tokens); HEADS pads num_kv_heads, BLOCK is 1 without pages."""
    announce_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0) + tl.arange(0, 1)
    filled, count, _ = new_tokens(
        row, row < batch, lens_ptr, lens_stride, kv_lens_ptr, page_table_ptr, num_tokens, capacity, max_pages,
        num_pages, BLOCK, PAGES, RAGGED, PAGED,
    )  # fmt: skip
    filled, count = tl.max(filled, axis=0), tl.max(count, axis=0)
    first = tl.program_id(1) * TOKENS
    if first < count:
        b = tl.program_id(0).to(tl.int64)
        lane = tl.arange(0, TOKENS * HEADS)
        token, head = first + lane // HEADS, (lane % HEADS).to(tl.int64)
        live = (token < count) & (head < num_kv_heads)
        position = filled + tl.minimum(token, count - 1)
        place, key = locate_block(page_table_ptr, max_pages, b, 0, position // BLOCK, num_pages, BLOCK, PAGED)
        key = (key + position % BLOCK).to(tl.int64)
        token = token.to(tl.int64)
        vector = (place * num_kv_heads + head) * seqlen_k + key
        copy_vectors(
            k_ptr, b * stride_kb + head * stride_kh + token * stride_ks, stride_kd,
            cache_k_ptr, place * stride_ckb + head * stride_ckh + key * stride_cks, stride_ckd,
            k_scale_ptr, vector, live, HEAD_DIM, DEPTH, SCALED,
        )  # fmt: skip
        copy_vectors(
            v_ptr, b * stride_vb + head * stride_vh + token * stride_vs, stride_vd,
            cache_v_ptr, place * stride_cvb + head * stride_cvh + key * stride_cvs, stride_cvd,
            v_scale_ptr, vector, live, HEAD_DIM, DEPTH, SCALED,
        )  # fmt: skip
        token = first + tl.arange(0, TOKENS)
        position = filled + tl.minimum(token, count - 1)
        place, key = locate_block(page_table_ptr, max_pages, b, 0, position // BLOCK, num_pages, BLOCK, PAGED)
        key = (key + position % BLOCK).to(tl.int64)
        copy_vectors(
            index_k_ptr, b * stride_ib + token.to(tl.int64) * stride_is, stride_id,
            cache_index_k_ptr, place * stride_cib + key * stride_cis, stride_cid,
            index_k_scale_ptr, place * seqlen_k + key, token < count, INDEX_DIM, INDEX_DEPTH, INDEX_SCALED,
        )  # fmt: skip
    # All threads have read the old length before the ticket says so.
    tl.debug_barrier()
    ticket = tl.atomic_add(status_ptr, 1)
    if ticket == tl.num_programs(0) * tl.num_programs(1) - 1:
        write_table(
            lens_ptr, lens_stride, kv_starts_ptr, kv_lens_ptr, page_table_ptr, sequences_ptr, status_ptr, batch,
            num_tokens, capacity, max_pages, num_pages, ROWS, BLOCK, PAGES, RAGGED, PAGED,
        )  # fmt: skip
        tl.store(status_ptr, 0)


def append_constants(
    num_kv_heads: int,
    head_dim: int,
    index_head_dim: int,
    block_size: int,
    num_tokens: int,
    *,
    ragged: bool,
    paged: bool,
    scaled: bool,
    index_scaled: bool,
) -> dict[str, int | bool]:
    """The compile-time arguments of `append_kernel`: up to 64 vectors a program."""
    heads = triton.next_power_of_2(num_kv_heads)
    block = block_size if paged else 1
    return {
        "BLOCK": block,
        "TOKENS": min(triton.next_power_of_2(max(1, num_tokens)), max(1, 64 // heads)),
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "DEPTH": padded(head_dim),
        "INDEX_DIM": index_head_dim,
        "INDEX_DEPTH": padded(index_head_dim),
        "PAGES": min(64, triton.next_power_of_2(num_tokens // block + 2)) if paged else 1,
        "ROWS": 32,
        "RAGGED": ragged,
        "PAGED": paged,
        "SCALED": scaled,
        "INDEX_SCALED": index_scaled,
    }


def append_warps(constants) -> int:
    """Warps of `append_kernel`."""
    return 8 if constants["TOKENS"] * constants["HEADS"] > 16 else 4


def append(
    k: torch.Tensor,
    v: torch.Tensor,
    index_k: torch.Tensor,
    lens: torch.Tensor | None,
    cache_k: torch.Tensor,
    cache_v: torch.Tensor,
    cache_index_k: torch.Tensor,
    cache_k_scale: torch.Tensor | None,
    cache_v_scale: torch.Tensor | None,
    cache_index_k_scale: torch.Tensor | None,
    page_table: torch.Tensor | None,
    kv_starts: torch.Tensor,
    kv_lens: torch.Tensor,
    sequences: torch.Tensor,
    status: torch.Tensor,
) -> None:
    """Write the new tokens into the cache, and kv_lens, sequences and status, as the module's docstring says."""
    batch, num_kv_heads, num_tokens, head_dim = k.shape
    if batch == 0:
        return
    constants = append_constants(
        num_kv_heads,
        head_dim,
        index_k.shape[3],
        cache_k.shape[2],
        num_tokens,
        ragged=lens is not None,
        paged=page_table is not None,
        scaled=cache_k_scale is not None,
        index_scaled=cache_index_k_scale is not None,
    )
    pages, max_pages, num_pages = page_arguments(page_table, sequences, cache_k)
    tiles = max(1, triton.cdiv(num_tokens, constants["TOKENS"]))
    append_kernel[(batch, tiles)](
        k,
        v,
        index_k,
        kv_lens if lens is None else lens,
        as_bits(cache_k),
        as_bits(cache_v),
        as_bits(cache_index_k),
        kv_lens if cache_k_scale is None else cache_k_scale,
        kv_lens if cache_v_scale is None else cache_v_scale,
        kv_lens if cache_index_k_scale is None else cache_index_k_scale,
        pages,
        kv_starts,
        kv_lens,
        sequences,
        status,
        *k.stride(),
        *v.stride(),
        index_k.stride(0),
        index_k.stride(2),
        index_k.stride(3),
        *cache_k.stride(),
        *cache_v.stride(),
        cache_index_k.stride(0),
        cache_index_k.stride(2),
        cache_index_k.stride(3),
        0 if lens is None else lens.stride(0),
        batch,
        num_tokens,
        key_limit(page_table, cache_k),
        cache_k.shape[2],
        max_pages,
        num_pages,
        num_kv_heads,
        **constants,
        **target_of(k.device).overlap(),
        num_warps=append_warps(constants),
    )
