"""The sequences of a batch as one small tensor.

- flexmsa::sequence_table: from the lengths that a user passes;
- flexmsa::fragment_table: of documents cut into fragments, for context parallel;
- flexmsa::next_positions: of tokens to be appended to a cache.
"""

import torch

from flexmsa.kernels import sequences as kernel

from .checks import check_cu_seqlens, check_fragments, check_kv_ranges
from .library import operator


def _empty_table(q, cu_seqlens, kv_starts, kv_lens, seqlen_k, cu_seqlens_k=None):
    count = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((count, 5), dtype=torch.int32)


@operator(
    "sequence_table(Tensor q, Tensor? cu_seqlens, Tensor? kv_starts, Tensor? kv_lens, SymInt seqlen_k, "
    "Tensor? cu_seqlens_k=None) -> Tensor",
    fake=_empty_table,
    has_gradient=False,
)
def sequence_table(q, cu_seqlens, kv_starts, kv_lens, seqlen_k, cu_seqlens_k=None):
    """Return `sequences` [N, 5] int32 (see flexmsa.kernels) for q [B, H, Sq, ...] and `seqlen_k` keys.

    cu_seqlens: of the queries, and of the keys if cu_seqlens_k is None.
    """
    if cu_seqlens is not None:
        check_cu_seqlens("cu_seqlens" if cu_seqlens_k is None else "cu_seqlens_q", cu_seqlens, q.shape[2])
    if cu_seqlens_k is not None:
        check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, seqlen_k)
    check_kv_ranges(kv_starts, kv_lens, seqlen_k)
    lengths = cu_seqlens, cu_seqlens_k, kv_starts, kv_lens
    return kernel.sequence_table(*lengths, q.shape[0], q.shape[2], seqlen_k, q.device)


def _empty_fragments(fragments, batch, seqlen_q, seqlen_k):
    return fragments.new_empty(fragments.shape, dtype=torch.int32)


@operator(
    "fragment_table(Tensor fragments, SymInt batch, SymInt seqlen_q, SymInt seqlen_k) -> Tensor",
    fake=_empty_fragments,
    has_gradient=False,
)
def fragment_table(fragments, batch, seqlen_q, seqlen_k):
    """Return `sequences` [documents, fragments, 5] int32 (see flexmsa.kernels)."""
    check_fragments(fragments, batch, seqlen_q, seqlen_k)
    return kernel.fragment_table(fragments, batch, seqlen_q, seqlen_k)


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
