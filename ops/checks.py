"""Checks of values. They run on a CPU only: on a GPU, reading a value would wait for the device."""

import itertools

from torch import Tensor

from flexmsa.kernels.rules import MOST_BLOCKS
from flexmsa.kernels.sequences import list_sequences


def check_block_indices(block_indices: Tensor, num_blocks: int) -> None:
    """Raise ValueError unless every id is -1 or the id of a block of the keys."""
    if block_indices.device.type != "cpu" or block_indices.numel() == 0:
        return
    low, high = (int(x) for x in block_indices.aminmax())
    if low < -1 or high >= num_blocks:
        raise ValueError(
            f"block_indices: expected ids from -1 (no block) to {num_blocks - 1}, the last block of the keys, "
            f"got ids from {low} to {high}"
        )


def check_cu_seqlens(cu_seqlens: Tensor, seqlen: int) -> None:
    """Raise ValueError unless the offsets increase from 0 to `seqlen`."""
    if cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != seqlen:
        raise ValueError(
            f"cu_seqlens: expected offsets from 0 to the sequence length {seqlen}, "
            f"got {offsets[0]} to {offsets[-1]}; make padding the last document, or remove it"
        )
    for n, (here, after) in enumerate(itertools.pairwise(offsets)):
        if after <= here:
            raise ValueError(
                f"cu_seqlens: expected rising offsets, got {here} then {after} at {n} and {n + 1}; "
                "a document has at least 1 token"
            )


def check_kv_ranges(kv_starts: Tensor | None, kv_lens: Tensor | None, seqlen_k: int) -> None:
    """Raise ValueError unless 0 <= kv_starts <= kv_lens <= seqlen_k in each row."""
    given = kv_starts if kv_starts is not None else kv_lens
    if given is None or given.device.type != "cpu":
        return
    starts = [0] * len(given) if kv_starts is None else kv_starts.tolist()
    lens = [seqlen_k] * len(given) if kv_lens is None else kv_lens.tolist()
    for row, (start, end) in enumerate(zip(starts, lens, strict=True)):
        if not 0 <= start <= end <= seqlen_k:
            raise ValueError(
                f"kv_starts, kv_lens: expected 0 <= kv_starts <= kv_lens <= {seqlen_k} (the keys given), "
                f"got kv_starts={start}, kv_lens={end} in batch row {row}"
            )


def check_append(num_new: int, lens: Tensor | None, kv_lens: Tensor, page_table: Tensor | None, cache: Tensor) -> None:
    """Raise ValueError unless every row has room for its new tokens, and pages that they go to.

    For the plain PyTorch kernels, which read these values on any device; a GPU's kernels leave such rows as they were.
    """
    counts = [num_new] * len(kv_lens) if lens is None else lens.clamp(0, num_new).tolist()
    capacity = cache.shape[2] * (1 if page_table is None else page_table.shape[1])
    for row, (length, count) in enumerate(zip(kv_lens.tolist(), counts, strict=True)):
        if length + count > capacity:
            raise ValueError(
                f"cache: expected at most {capacity - length} more tokens in row {row}, got {count}: it holds {length} "
                f"of {capacity}; make it with a larger capacity"
            )
        if page_table is not None and count:
            blocks = range(length // cache.shape[2], -(-(length + count) // cache.shape[2]))
            _check_pages(page_table, row, blocks, cache.shape[0])


def check_page_table(
    page_table: Tensor | None, sequences: Tensor, block_size: int, num_pages: int, backend: str
) -> None:
    """Raise ValueError unless every block of every sequence has a page, for the plain PyTorch kernels."""
    if page_table is not None and backend == "torch":
        for sequence in list_sequences(sequences):
            num_keys = sequence.k_end - sequence.k_start if sequence.q_end > sequence.q_start else 0
            _check_pages(page_table, sequence.batch, range(-(-max(num_keys, 0) // block_size)), num_pages)


def _check_pages(page_table: Tensor, row: int, blocks: range, num_pages: int) -> None:
    pages = page_table[row, blocks.start : blocks.stop].tolist()
    for block, page in zip(blocks, pages, strict=True):
        if not 0 <= page < num_pages:
            raise ValueError(
                f"page_table: expected a page from 0 to {num_pages - 1} for block {block} of row {row}, got {page}; "
                "reserve pages before tokens are appended"
            )


def check_topk(topk: int, backend: str) -> None:
    """Raise NotImplementedError if the backend's kernels keep no lists of topk blocks."""
    if backend == "triton" and topk > MOST_BLOCKS:
        raise NotImplementedError(
            f"topk: expected at most {MOST_BLOCKS} for the Triton kernels, got {topk}; take larger blocks, or "
            "backend='torch', which runs on any device"
        )
