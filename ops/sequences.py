"""flexmsa::sequence_table and flexmsa::next_positions: the sequences of a batch as one small tensor."""

import torch

from flexmsa.kernels import sequences as kernel

from .checks import check_cu_seqlens, check_kv_ranges
from .library import operator


def _empty_table(q, cu_seqlens, kv_starts, kv_lens, seqlen_k):
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((count, 5), dtype=torch.int32)


@operator(
    "sequence_table(Tensor q, Tensor? cu_seqlens, Tensor? kv_starts, Tensor? kv_lens, SymInt seqlen_k) -> Tensor",
    fake=_empty_table,
    has_gradient=False,
)
def sequence_table(q, cu_seqlens, kv_starts, kv_lens, seqlen_k):
    """Return `sequences` [N, 5] int32 (see flexmsa.kernels) for q [B, H, Sq, ...] and `seqlen_k` keys."""
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, q.shape[2])
    check_kv_ranges(kv_starts, kv_lens, seqlen_k)
    return kernel.sequence_table(cu_seqlens, kv_starts, kv_lens, q.shape[0], q.shape[2], seqlen_k, q.device)


def _empty_positions(kv_lens, kv_starts, count):
    return kv_lens.new_empty((kv_lens.shape[0], count), dtype=torch.int64)


# An operator, because compiled code may run plain arithmetic after kv_lens has changed (seen with torch 2.13).
@operator(
    "next_positions(Tensor kv_lens, Tensor kv_starts, SymInt count) -> Tensor",
    fake=_empty_positions,
    has_gradient=False,
)
def next_positions(kv_lens, kv_starts, count):
    """Return [B, count] int64: the positions of each row's next `count` tokens, counted from its first key."""
    return kernel.next_positions(kv_lens, kv_starts, count)
