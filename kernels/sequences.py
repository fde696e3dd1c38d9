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


def list_sequences(sequences: Tensor) -> list[Sequence]:
    """Return the rows of the table as ints."""
    return [Sequence(*row) for row in sequences.tolist()]


def sequence_table(
    cu_seqlens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device,
) -> Tensor:
    """Return `sequences` [N, 5] int32 on `device`.

    Values out of range are clamped. On a GPU nobody reads the values back to check them, so bad values can give a
    wrong answer there, but never an address outside the tensors: offsets rise from 0 to the length of the buffer, and
    every query stays in exactly one sequence.
    """
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(device=device, dtype=torch.int32).clamp(0, seqlen_q)
        starts = offsets[:-1].cummax(0).values
        starts = torch.cat([torch.zeros_like(starts[:1]), starts[1:]])
        ends = torch.cat([starts[1:], torch.full_like(starts[:1], seqlen_q)])
        return torch.stack([torch.zeros_like(starts), starts, ends, starts, ends], dim=1)
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


def query_sequences(sequences: Tensor, batch: int, seqlen_q: int) -> Tensor:
    """Return [B*Sq] int64: the row of `sequences` that each query belongs to."""
    first_query = sequences[:, 0].long() * seqlen_q + sequences[:, 1]
    # A sequence without queries has the same first query as the next one; the search finds the last of such a run.
    order = torch.arange(batch * seqlen_q, device=sequences.device)
    return torch.searchsorted(first_query, order, right=True) - 1


def key_ranges(sequences: Tensor, batch: int, seqlen_q: int) -> tuple[Tensor, Tensor]:
    """Return `start`, `end` [B, Sq] int32: query i of batch row b sees the keys start[b, i] .. end[b, i]-1.

    `start` is the anchor of the query's blocks. A query that sees nothing has end <= start.
    """
    of_query = Sequence(*sequences[query_sequences(sequences, batch, seqlen_q)].unbind(1))
    token = torch.arange(seqlen_q, device=sequences.device, dtype=torch.int32).repeat(batch)
    start = of_query.k_start.reshape(batch, seqlen_q).contiguous()
    return start, (of_query.k_end - of_query.q_end + token + 1).view(batch, seqlen_q)


def next_positions(kv_lens: Tensor, kv_starts: Tensor, count: int) -> Tensor:
    """Return [B, count] int64: the positions of each row's next tokens, counted from the row's first key."""
    return ((kv_lens - kv_starts)[:, None] + torch.arange(count, device=kv_lens.device)).clamp(min=0)
