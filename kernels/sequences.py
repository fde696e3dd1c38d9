"""The table of sequences (see flexmsa.kernels): made from the user's arguments, and read per sequence or per query."""

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Sequence(NamedTuple):
    """One row of the table as ints, or its columns as tensors or arrays [N]."""

    batch: Any
    q_start: Any
    q_end: Any
    k_start: Any
    k_end: Any


def table_rows(sequences: Tensor) -> Tensor:
    """Return the rows [N, 5] of a table, also of one of fragments."""
    return sequences.flatten(0, -2)


def page_place(page_table: Tensor, batch: Any, k_start: Any, block_size: int) -> tuple[Any, Any]:
    """Return row and column of page_table [rows, max_pages] where the pages of a sequence begin; ints or arrays.

    Page tables are numbered through their rows, as `k_start` of a paged cache says (see flexmsa.kernels).
    """
    stride = max(1, page_table.stride(0))
    return batch + k_start // block_size // stride, k_start // block_size % stride


def num_fragments(sequences: Tensor) -> int:
    """Return how many neighbouring rows of a table share their keys, 1 unless it is one of fragments."""
    return sequences.shape[1] if sequences.dim() == 3 else 1


def list_sequences(sequences: Tensor) -> list[Sequence]:
    """Return the rows of the table as ints."""
    return [Sequence(*row) for row in table_rows(sequences).tolist()]


def sequence_table(
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
) -> Tensor:
    """Return `sequences` [N, 5] int32 on `device`; without cu_seqlens_k, cu_seqlens are the keys' offsets too.

    Values out of range are clamped. On a GPU nobody reads the values back to check them, so bad values can give a
    wrong answer there, but never an address outside the tensors: offsets rise from 0 to the length of the buffer, and
    every query stays in exactly one sequence.
    """
    if cu_seqlens is not None:
        queries = keys = _document_ranges(cu_seqlens, seqlen_q, device)
        if cu_seqlens_k is not None:
            keys = _document_ranges(cu_seqlens_k, seqlen_k, device)
        return torch.stack([torch.zeros_like(queries[0]), *queries, *keys], dim=1)
    table = torch.zeros(batch, 5, device=device, dtype=torch.int32)
    column = Sequence(*table.unbind(1))
    if batch > 1:
        column.batch.copy_(torch.arange(batch, device=device, dtype=torch.int32))
    if kv_lens is None and seqlen_q == seqlen_k:
        # Both columns in one launch.
        table[:, 2::2].fill_(seqlen_q)
    elif kv_lens is None:
        column.q_end.fill_(seqlen_q)
        column.k_end.fill_(seqlen_k)
    else:
        column.q_end.fill_(seqlen_q)
        column.k_end.copy_(kv_lens).clamp_(0, seqlen_k)
    if kv_starts is not None:
        torch.minimum(kv_starts.clamp(min=0), column.k_end, out=column.k_start)
    return table


def _document_ranges(offsets: Tensor, total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return first and last + 1 [documents] of what offsets [documents + 1] cut a buffer of `total` into."""
    starts = offsets.to(device=device, dtype=torch.int32).clamp(0, total)[:-1].cummax(0).values
    starts = torch.cat([torch.zeros_like(starts[:1]), starts[1:]])
    return starts, torch.cat([starts[1:], torch.full_like(starts[:1], total)])


def fragment_table(fragments: Tensor, batch: int, seqlen_q: int, seqlen_k: int) -> Tensor:
    """Return a table of fragments [documents, fragments, 5], int32 and contiguous, with values pulled into range."""
    column = Sequence(*fragments.to(torch.int32).unbind(-1))
    queries = (x.clamp(0, seqlen_q) for x in (column.q_start, column.q_end))
    k_start = column.k_start.clamp(0, seqlen_k)
    k_end = torch.maximum(column.k_end.clamp(max=seqlen_k), k_start)
    return torch.stack([column.batch.clamp(0, batch - 1), *queries, k_start, k_end], dim=-1)


def query_sequences(sequences: Tensor, batch: int, seqlen_q: int) -> Tensor:
    """Return [B*Sq] int64: the row of `table_rows` that each query belongs to."""
    sequences = table_rows(sequences)
    first_query = sequences[:, 0].long() * seqlen_q + sequences[:, 1]
    # A sequence without queries has the same first query as the next one; the search finds the last of such a run.
    order = torch.arange(batch * seqlen_q, device=sequences.device)
    return torch.searchsorted(first_query, order, right=True) - 1


def key_ranges(sequences: Tensor, batch: int, seqlen_q: int) -> tuple[Tensor, Tensor]:
    """Return `start`, `end` [B, Sq] int32: query i of batch row b sees the keys start[b, i] .. end[b, i]-1.

    `start` is the anchor of the query's blocks. A query that sees nothing has end <= start.
    """
    of_query = Sequence(*table_rows(sequences)[query_sequences(sequences, batch, seqlen_q)].unbind(1))
    token = torch.arange(seqlen_q, device=sequences.device, dtype=torch.int32).repeat(batch)
    start = of_query.k_start.reshape(batch, seqlen_q).contiguous()
    return start, (of_query.k_end - of_query.q_end + token + 1).view(batch, seqlen_q)


def next_positions(kv_lens: Tensor, kv_starts: Tensor, count: int) -> Tensor:
    """Return [B, count] int64: the positions of each row's next tokens, counted from the row's first key."""
    return ((kv_lens - kv_starts)[:, None] + torch.arange(count, device=kv_lens.device)).clamp(min=0)


def paged_table(
    cu_seqlens_q: Tensor | None,
    kv_lens: Tensor,
    page_table: Tensor,
    num_tokens: int,
    page_size: int,
    table: Tensor,
    first_row: int = 0,
) -> None:
    """Write the table of sequences of num_tokens queries, whose keys are in pages, as PyTorch operations.

    Without cu_seqlens_q, table is [R, 5]: each sequence is a batch row, with num_tokens // R queries. With it, table is
    [R + 1, 5]: all sequences are of batch row 0, as are the queries past the last of them, which see no key. Values out
    of range are pulled into it; offsets count from the first. first_row: of page_table, of the first sequence.
    """
    count = kv_lens.shape[0]
    table.zero_()
    column = Sequence(*table[:count].unbind(1))
    order = torch.arange(count, dtype=torch.int32, device=kv_lens.device)
    if cu_seqlens_q is None:
        column.batch.copy_(order)
        column.q_end.fill_(num_tokens // count)
    else:
        offsets = (cu_seqlens_q - cu_seqlens_q[:1]).to(torch.int32).clamp(0, num_tokens).cummax(0).values
        column.q_start.copy_(offsets[:-1])
        column.q_end.copy_(offsets[1:])
        column.k_start.copy_((order + first_row) * (page_table.stride(0) * page_size))
        table[count, 1:2] = offsets[-1:]
        table[count, 2] = num_tokens
    column.k_end.copy_(column.k_start + kv_lens.clamp(0, page_table.shape[1] * page_size))
