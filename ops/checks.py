"""Checks of values. They run on a CPU only: on a GPU, reading a value would wait for the device."""

import itertools

from torch import Tensor

from flexmsa.kernels.rules import MOST_BLOCKS
from flexmsa.kernels.sequences import list_sequences, page_place


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


def check_cu_seqlens(name: str, cu_seqlens: Tensor, seqlen: int, padded: bool = False) -> None:
    """Raise ValueError unless the offsets rise from 0 to `seqlen`, or stay for a document without tokens.

    padded: they may end before `seqlen`.
    """
    if cu_seqlens.device.type != "cpu":
        return
    offsets = cu_seqlens.tolist()
    if padded and (offsets[0] != 0 or offsets[-1] > seqlen):
        raise ValueError(f"{name}: expected offsets from 0 to at most {seqlen}, got {offsets[0]} to {offsets[-1]}")
    if offsets[0] != 0 or (offsets[-1] != seqlen and not padded):
        raise ValueError(
            f"{name}: expected offsets from 0 to the sequence length {seqlen}, "
            f"got {offsets[0]} to {offsets[-1]}; make padding the last document, or remove it"
        )
    for n, (here, after) in enumerate(itertools.pairwise(offsets)):
        if after < here:
            raise ValueError(
                f"{name}: expected rising offsets, got {here} then {after} at {n} and {n + 1}; "
                "a document without tokens repeats an offset"
            )


def check_decodes(cu_seqlens_q: Tensor, num_decodes: int) -> None:
    """Raise ValueError unless the first num_decodes sequences have one token each."""
    if cu_seqlens_q.device.type == "cpu" and cu_seqlens_q[: num_decodes + 1].tolist() != list(range(num_decodes + 1)):
        raise ValueError(
            f"num_decodes: expected one token in each of the first {num_decodes} sequences, got offsets "
            f"{cu_seqlens_q[: num_decodes + 1].tolist()}; order decoding sequences first"
        )


def check_fragments(fragments: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> None:
    """Raise ValueError unless a table of fragments [documents, fragments, 5] is as `flexmsa.kernels` describes it."""
    if fragments.device.type != "cpu":
        return
    next_query, documents_end = 0, [0] * batch
    for document, rows in enumerate(fragments.tolist()):
        row, _, _, k_start, _ = rows[0]
        if not (0 <= row < batch and documents_end[row] <= k_start):
            raise ValueError(
                f"fragments: expected documents that follow one another in the keys 0 to {seqlen_k} of {batch} batch "
                f"rows, got batch row {row} and k_start {k_start} for document {document}"
            )
        seen = k_start
        for other, q_start, q_end, first_key, k_end in rows:
            right = (other, first_key) == (row, k_start) and k_start <= k_end <= seqlen_k
            if q_start < q_end:
                right &= row * seqlen_q + q_start == next_query and q_end <= seqlen_q
                right &= max(k_start, k_end - q_end + q_start) >= seen
                next_query, seen = next_query + q_end - q_start, k_end
            if not right:
                raise ValueError(
                    "fragments: expected rows (batch, q_start, q_end, k_start, k_end) of one batch row and k_start per "
                    "document, whose queries ascend without gaps, and whose queries see ever more keys; got "
                    f"{[other, q_start, q_end, first_key, k_end]} in document {document}"
                )
        documents_end[row] = max(documents_end[row], seen)
    if next_query != batch * seqlen_q:
        raise ValueError(f"fragments: expected each of {batch} x {seqlen_q} queries in one row, got {next_query}")


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


def check_range(name: str, values: Tensor, low: int, high: int) -> None:
    """Raise ValueError unless low <= values[b] <= high for each row b of a cache."""
    if values.device.type != "cpu":
        return
    for row, value in enumerate(values.tolist()):
        if not low <= value <= high:
            raise ValueError(f"{name}: expected {low} to {high}, got {value} in row {row} of {values.tolist()}")


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
    page_table: Tensor | None, sequences: Tensor, block_size: int, num_pages: int, backend: str, first_row: int = 0
) -> None:
    """Raise ValueError unless every block of every sequence has a page, for the plain PyTorch kernels.

    first_row: the user's row that is the first of page_table.
    """
    if page_table is not None and backend == "torch":
        for sequence in list_sequences(sequences):
            num_keys = sequence.k_end - sequence.k_start if sequence.q_end > sequence.q_start else 0
            row, column = page_place(page_table, sequence.batch, sequence.k_start, block_size)
            blocks = range(column, column - (-max(num_keys, 0) // block_size))
            _check_pages(page_table, row, blocks, num_pages, first_row)


def _check_pages(page_table: Tensor, row: int, blocks: range, num_pages: int, first_row: int = 0) -> None:
    pages = page_table[row, blocks.start : blocks.stop].tolist()
    for block, page in zip(blocks, pages, strict=True):
        if not 0 <= page < num_pages:
            raise ValueError(
                f"page_table: expected a page from 0 to {num_pages - 1} for block {block} of row {first_row + row}, "
                f"got {page}; each block with keys needs one, which `reserve` gives to the rows of a cache"
            )


def check_topk(topk: int, backend: str) -> None:
    """Raise NotImplementedError if the backend's kernels keep no lists of topk blocks."""
    if backend == "triton" and topk > MOST_BLOCKS:
        raise NotImplementedError(
            f"topk: expected at most {MOST_BLOCKS} for the Triton kernels, got {topk}; take larger blocks, or "
            "backend='torch', which runs on any device"
        )
