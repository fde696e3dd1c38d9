"""Records that kernels pass by name: sequences, pages, places in a cache. Each has one loader and one storer."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...sequences import Sequence


class Pages(NamedTuple):
    """Where a cache keeps its blocks: table, int32 page numbers in rows that are row_stride numbers apart.

    None for a contiguous cache. Key j of batch row b is in page table[b * row_stride + j // block_size].
    """

    table: Any
    row_stride: Any
    num_pages: Any


class Place(NamedTuple):
    """A block in a cache: the index of the cache's first dimension (int64), and the block's first key in it."""

    row: Any
    key: Any


class Scales(NamedTuple):
    """The scales [.., Hkv, seqlen_k] of a cache's e4m3 keys and values, None without any.

    seqlen_k is 0 for scales [block_size] of every page and head.
    """

    k: Any
    v: Any
    seqlen_k: Any


@triton.jit
def load_sequence(sequences_ptr, number, mask=None):
    """The Sequence of that number, or of a tensor of numbers, with zeros where a mask is given and not set.

    Its batch is int64, as offsets need it.
    """
    row = sequences_ptr + number.to(tl.int64) * 5
    other: tl.constexpr = None if mask is None else 0
    return Sequence(
        tl.load(row, mask=mask, other=other).to(tl.int64),
        tl.load(row + 1, mask=mask, other=other),
        tl.load(row + 2, mask=mask, other=other),
        tl.load(row + 3, mask=mask, other=other),
        tl.load(row + 4, mask=mask, other=other),
    )


@triton.jit
def store_sequence(sequences_ptr, number, sequence, mask):
    """Write the Sequences [N] of these numbers [N] where mask is set."""
    row = sequences_ptr + number.to(tl.int64) * 5
    tl.store(row, sequence.batch, mask=mask)
    tl.store(row + 1, sequence.q_start, mask=mask)
    tl.store(row + 2, sequence.q_end, mask=mask)
    tl.store(row + 3, sequence.k_start, mask=mask)
    tl.store(row + 4, sequence.k_end, mask=mask)


@triton.jit
def locate_block(pages, batch, k_start, block, block_size: tl.constexpr):
    """The Place of block `block`, or of a tensor of blocks, of a sequence that has them.

    A page number outside the cache is pulled into range.
    """
    if pages.table is None:
        return Place(batch, k_start + block * block_size)
    else:
        page = tl.load(pages.table + batch * pages.row_stride + k_start // block_size + block)
        return Place(tl.minimum(tl.maximum(page, 0), pages.num_pages - 1).to(tl.int64), block * 0)


def pages_of(page_table: torch.Tensor | None, cache: torch.Tensor) -> Pages:
    """The Pages of a cache [B or num_pages, .., keys, ..]."""
    if page_table is None:
        return Pages(None, 0, 0)
    return Pages(page_table, page_table.stride(0), cache.shape[0])


def table_on_meta(page_table: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """A meta tensor like the page table of sequences of num_blocks blocks."""
    return torch.empty(page_table.shape[0], num_blocks, dtype=torch.int32, device="meta")


def capacity_of(page_table: torch.Tensor | None, cache: torch.Tensor, batch: int | None = None) -> int:
    """Keys that a row of a cache [.., .., capacity or block_size, D] has room for.

    batch: if given, keys of all sequences of one of so many batch rows, which share a page table's rows.
    """
    if page_table is None:
        return cache.shape[2]
    return cache.shape[2] * (page_table.shape[1] if batch is None else page_table.numel() // batch)


def keys_per_row(scale: torch.Tensor | None, stored: torch.Tensor) -> int:
    """By how many numbers the scales of two rows of stored [.., .., keys, D] lie apart; 0 if all rows have the same."""
    return 0 if scale is not None and scale.dim() == 1 else stored.shape[2]
