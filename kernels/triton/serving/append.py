"""Append new tokens to a cache, contiguous or paged, in one launch: keys, values, index keys, lengths and table.

Row b brings its first lens[b] of n tokens, or all of them. The kernel writes them behind the kv_lens[b] tokens that the
row holds, then sets kv_lens and `sequences` (see `flexmsa.kernels`) to those of n new queries per row. With lens, a row
has two sequences: its new tokens, and the rest, which sees no key. An e4m3 or int8 cache gets quantized vectors (see
`fp8` and `int8`). A row that does not fit, or whose page table names no page where it needs one, stays as it was; its
queries see no key, and status[1] counts it.

Layouts: k, v [B, Hkv, n, D], index_k [B, 1, n, Di] and caches, any strides; scales [B or num_pages, heads, keys],
page_table, kv_starts, kv_lens, sequences, status contiguous.

Program (b, i) owns tokens i * TOKENS .. of row b, all heads. All programs read the old lengths; the last one to arrive,
by a counter in status[0], writes the new ones and the table. Each token is read and written once.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.fp8 import encode_e4m3, quantize
from ..common.int8 import quantize_int8
from ..common.launch import Launch, Options, view
from ..common.overlap import announce_next, await_previous
from ..common.records import Sequence, capacity_of, locate_block, pages_of, store_sequence
from ..common.target import Target, padded, target_of


class Rows(NamedTuple):
    """The rows of a cache: kv_lens and kv_starts [B], lens [B] of the new tokens (None: each row brings num_tokens)."""

    kv_lens: Any
    kv_starts: Any
    lens: Any
    lens_stride: Any
    batch: Any
    num_tokens: Any
    capacity: Any


class Vectors(NamedTuple):
    """New vectors, the cache that they go to, both as Views, and the cache's scales, None where it has none.

    factor: what numbers are multiplied by that become e4m3 numbers without scales.
    """

    new: Any
    cache: Any
    scale: Any
    factor: Any


class Growth(NamedTuple):
    """Tokens that a row holds, tokens to append (0 if they do not fit), and whether they fit."""

    filled: Any
    count: Any
    fits: Any


@dataclass(frozen=True)
class VectorConstants:
    """Constants of a kernel that copies vectors.

    tokens: per program; heads, depth, index_depth: Hkv, D and Di, padded.
    """

    tokens: int
    heads: int
    head_dim: int
    depth: int
    index_head_dim: int
    index_depth: int
    overlap: bool

    @property
    def options(self) -> Options:
        """The warps that a program's vectors keep busy."""
        return Options(8 if self.tokens * self.heads > 16 else 4, overlap=self.overlap)


def vector_sizes(num_kv_heads: int, head_dim: int, index_head_dim: int, one: bool, target: Target) -> dict[str, Any]:
    """The fields of `VectorConstants`; one: a program has one token."""
    heads = triton.next_power_of_2(num_kv_heads)
    return {
        # Up to 64 vectors per program.
        "tokens": 1 if one else max(1, 64 // heads),
        "heads": heads,
        "head_dim": head_dim,
        "depth": padded(head_dim),
        "index_head_dim": index_head_dim,
        "index_depth": padded(index_head_dim),
        "overlap": target.overlaps,
    }


@dataclass(frozen=True)
class AppendConstants(VectorConstants):
    """Constants of `append_kernel`.

    block_size: keys per page, 1 without pages; pages: page numbers checked at once; rows: rows of the table written at
    once.
    """

    block_size: int
    pages: int
    rows: int


@triton.jit
def grow(row, live, rows, pages, C: tl.constexpr):
    """The Growth of batch rows `row` [R]."""
    filled = tl.load(rows.kv_lens + row, mask=live, other=0)
    if rows.lens is None:
        count = filled * 0 + rows.num_tokens
    else:
        count = tl.load(rows.lens + row.to(tl.int64) * rows.lens_stride, mask=live, other=0)
        count = tl.minimum(tl.maximum(count, 0), rows.num_tokens)
    fits = (filled >= 0) & (count <= rows.capacity - filled)
    if pages.table is not None:
        needs = live & fits & (count > 0)
        stop = tl.cdiv(filled + count, C.block_size)
        table = pages.table + row.to(tl.int64) * pages.row_stride
        for first in range(0, rows.num_tokens // C.block_size + 2, C.pages):
            block = (filled // C.block_size)[:, None] + first + tl.arange(0, C.pages)[None, :]
            needed = needs[:, None] & (block < stop[:, None])
            page = tl.load(table[:, None] + block, mask=needed, other=0)
            missing = needed & ((page < 0) | (page >= pages.num_pages))
            fits &= tl.max(missing.to(tl.int32), axis=1) == 0
    return Growth(filled, tl.where(fits, count, 0), fits)


@triton.jit
def write_table(rows, pages, sequences_ptr, status_ptr, C: tl.constexpr):
    """kv_lens and sequences of all rows, and the count of those that did not fit."""
    refused = rows.batch * 0
    for first in range(0, rows.batch, C.rows):
        row = first + tl.arange(0, C.rows)
        live = row < rows.batch
        growth = grow(row, live, rows, pages, C)
        refused += tl.sum((live & ~growth.fits).to(tl.int32), axis=0)
        # Several threads hold the same row: all have to have read its length before one writes it.
        tl.debug_barrier()
        end = growth.filled + growth.count
        tl.store(rows.kv_lens + row, end, mask=live)
        start = tl.load(rows.kv_starts + row, mask=live, other=0)
        none = row * 0
        stop = none + rows.num_tokens
        if rows.lens is None:
            start, end = tl.where(growth.fits, start, 0), tl.where(growth.fits, end, 0)
            store_sequence(sequences_ptr, row, Sequence(row, none, stop, start, end), live)
        else:
            store_sequence(sequences_ptr, 2 * row, Sequence(row, none, growth.count, start, end), live)
            store_sequence(sequences_ptr, 2 * row + 1, Sequence(row, growth.count, stop, none, none), live)
    tl.atomic_add(status_ptr + 1, refused)


@triton.jit
def copy_vectors(vectors, batch, head, token, place, key, number, live, head_dim: tl.constexpr, depth: tl.constexpr):
    """Copy the new vectors of tokens [N] and heads [N] to keys [N] of rows `place` [N]; number [N]: of their scales."""
    new, cache = vectors.new, vectors.cache
    d = tl.arange(0, depth)
    mask = live[:, None] & (d < head_dim)[None, :]
    d = d.to(tl.int64)[None, :]
    source = new.ptr + (batch * new.stride_b + head * new.stride_h + token * new.stride_s)[:, None]
    x = tl.load(source + d * new.stride_d, mask=mask, other=0.0)
    if vectors.scale is not None:
        if cache.ptr.dtype.element_ty == tl.int8:
            x, scale = quantize_int8(x)
        else:
            x, scale = quantize(x)
        tl.store(vectors.scale + number, scale, mask=live)
    elif cache.ptr.dtype.element_ty == tl.uint8:
        x = x.to(tl.float32) * vectors.factor
        # Comparisons keep NaN.
        x = encode_e4m3(tl.where(x > 448.0, 448.0, tl.where(x < -448.0, -448.0, x)))
    target = cache.ptr + (place * cache.stride_b + head * cache.stride_h + key * cache.stride_s)[:, None]
    tl.store(target + d * cache.stride_d, x, mask=mask)


@triton.jit
def append_kernel(
    keys, values, index_keys, rows, pages, sequences_ptr, status_ptr, seqlen_k, num_kv_heads, C: tl.constexpr
):
    """See the module's docstring. Program number i has tile i // batch of the tokens of row i % batch."""
    announce_next(C.overlap)
    await_previous(C.overlap)
    row = tl.program_id(0) % rows.batch + tl.arange(0, 1)
    growth = grow(row, row < rows.batch, rows, pages, C)
    filled, count = tl.max(growth.filled, axis=0), tl.max(growth.count, axis=0)
    first = tl.program_id(0) // rows.batch * C.tokens
    if first < count:
        b = (tl.program_id(0) % rows.batch).to(tl.int64)
        lane = tl.arange(0, C.tokens * C.heads)
        token, head = first + lane // C.heads, (lane % C.heads).to(tl.int64)
        live = (token < count) & (head < num_kv_heads)
        position = filled + tl.minimum(token, count - 1)
        place = locate_block(pages, b, 0, position // C.block_size, C.block_size)
        key = (place.key + position % C.block_size).to(tl.int64)
        token = token.to(tl.int64)
        number = (place.row * num_kv_heads + head) * seqlen_k + key
        copy_vectors(keys, b, head, token, place.row, key, number, live, C.head_dim, C.depth)
        copy_vectors(values, b, head, token, place.row, key, number, live, C.head_dim, C.depth)
        token = first + tl.arange(0, C.tokens)
        live = token < count
        position = filled + tl.minimum(token, count - 1)
        place = locate_block(pages, b, 0, position // C.block_size, C.block_size)
        key = (place.key + position % C.block_size).to(tl.int64)
        number = place.row * seqlen_k + key
        copy_vectors(
            index_keys, b, 0, token.to(tl.int64), place.row, key, number, live, C.index_head_dim, C.index_depth
        )
    # All threads have read the old length before the counter says so.
    tl.debug_barrier()
    arrived = tl.atomic_add(status_ptr, 1)
    if arrived == tl.num_programs(0) - 1:
        write_table(rows, pages, sequences_ptr, status_ptr, C)
        tl.store(status_ptr, 0)


@functools.lru_cache
def append_constants(
    num_kv_heads: int, head_dim: int, index_head_dim: int, page_size: int | None, one: bool, target: Target
) -> AppendConstants:
    """Constants of `append_kernel`; one: there is a single new token per row, as in decoding."""
    sizes = vector_sizes(num_kv_heads, head_dim, index_head_dim, one, target)
    pages = 1 if page_size is None else 2 if one else 64
    return AppendConstants(**sizes, block_size=page_size or 1, pages=pages, rows=32)


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
    page_size = None if page_table is None else cache_k.shape[2]
    sizes = num_kv_heads, head_dim, index_k.shape[3], page_size
    constants = append_constants(*sizes, num_tokens == 1, target_of(k.device))
    stride = 0 if lens is None else lens.stride(0)
    rows = Rows(kv_lens, kv_starts, lens, stride, batch, num_tokens, capacity_of(page_table, cache_k))
    Launch(
        append_kernel,
        # Long prompts have more tiles than a grid's second dimension may.
        (batch * max(1, -(-num_tokens // constants.tokens)), 1, 1),
        {
            "keys": Vectors(view(k), view(cache_k), cache_k_scale, 1.0),
            "values": Vectors(view(v), view(cache_v), cache_v_scale, 1.0),
            "index_keys": Vectors(view(index_k), view(cache_index_k), cache_index_k_scale, 1.0),
            "rows": rows,
            "pages": pages_of(page_table, cache_k),
            "sequences_ptr": sequences,
            "status_ptr": status,
            "seqlen_k": cache_k.shape[2],
            "num_kv_heads": num_kv_heads,
        },
        {"C": constants},
        constants.options,
    ).run()
