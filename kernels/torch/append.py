"""Append: write new tokens into a cache behind each row's tokens, quantised where the cache holds e4m3 or int8."""

from typing import NamedTuple

import torch
from torch import Tensor

from flexmsa.kernels.sequences import Sequence
from flexmsa.kernels.torch import int8


class _Span(NamedTuple):
    """``length`` tokens of batch row ``row`` from ``token`` on, and their destination in a cache.

    ``place`` is the index of the cache's first dimension (a batch row or a page), ``key`` the first key there.
    """

    row: int
    token: int
    length: int
    place: int
    key: int


def append(
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    lens: Tensor | None,
    cache_k: Tensor,
    cache_v: Tensor,
    cache_index_k: Tensor,
    cache_k_scale: Tensor | None,
    cache_v_scale: Tensor | None,
    cache_index_k_scale: Tensor | None,
    page_table: Tensor | None,
    kv_starts: Tensor,
    kv_lens: Tensor,
    sequences: Tensor,
    status: Tensor,
) -> None:
    """Write the first lens[b] of the n tokens k, v [B,Hkv,n,D], index_k [B,1,n,Di] behind the kv_lens[b] of row b.

    Caches are [B,H,S,D], or with page_table [B,max_pages] pages [num_pages,H,block_size,D]. Their scales have the same
    shape without D, and are None unless the cache is e4m3 or int8. kv_lens grows, and ``sequences`` becomes the table
    of the new tokens: one sequence per row, and with lens a second one, which sees no key, for the tokens from lens[b]
    on. Every row has room, and pages where it needs them (see ``ops.checks``). ``status`` is for kernels that check
    both.
    """
    num_new = k.shape[2]
    counts = [num_new] * len(kv_lens) if lens is None else lens.clamp(0, num_new).tolist()
    spans = []
    for row, (length, count) in enumerate(zip(kv_lens.tolist(), counts, strict=True)):
        if page_table is None:
            spans.append(_Span(row, 0, count, row, length))
        else:
            spans += _paged_spans(row, length, count, page_table[row], cache_k)
    for new, cache, scale in (
        (k, cache_k, cache_k_scale),
        (v, cache_v, cache_v_scale),
        (index_k, cache_index_k, cache_index_k_scale),
    ):
        for span in spans:
            _write(new, cache, scale, span)
    kv_lens += torch.tensor(counts, dtype=kv_lens.dtype)
    _write_table(sequences, counts, num_new, kv_starts, kv_lens, ragged=lens is not None)


def _paged_spans(row: int, length: int, count: int, page_table: Tensor, cache: Tensor) -> list[_Span]:
    """The new tokens of a row, one span per page."""
    block_size = cache.shape[2]
    first, stop = length // block_size, -(-(length + count) // block_size) if count else 0
    spans = []
    for block, page in enumerate(page_table[first:stop].tolist(), first):
        start = max(length, block * block_size)
        end = min(length + count, (block + 1) * block_size)
        spans.append(_Span(row, start - length, end - start, page, start - block * block_size))
    return spans


def _write(new: Tensor, cache: Tensor, scale: Tensor | None, span: _Span) -> None:
    tokens = new[span.row, :, span.token : span.token + span.length]
    keys = slice(span.key, span.key + span.length)
    if scale is None:
        cache[span.place, :, keys] = tokens
    else:
        cache[span.place, :, keys], scale[span.place, :, keys] = int8.quantizer(cache)(tokens)


def _write_table(
    sequences: Tensor, counts: list[int], num_new: int, kv_starts: Tensor, kv_lens: Tensor, ragged: bool
) -> None:
    """Fill the first rows of ``sequences``."""
    table = []
    for row, (count, k_start, k_end) in enumerate(zip(counts, kv_starts.tolist(), kv_lens.tolist(), strict=True)):
        table.append(Sequence(row, 0, count, k_start, k_end))
        if ragged:
            table.append(Sequence(row, count, num_new, 0, 0))
    sequences[: len(table)] = torch.tensor(table, dtype=sequences.dtype)
