"""Checks of values. They run on a CPU only: on a GPU, reading a value would wait for the device."""

import itertools

from torch import Tensor


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
