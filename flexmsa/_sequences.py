"""The sequences of one call: the lengths that a user passed, or the table made from them."""

import torch
from torch import Tensor

from flexmsa import ops, validation
from flexmsa.kernels.sequences import key_ranges

__all__ = ["Sequences", "check_sequences"]


class Sequences:
    """The keys that each query sees. The table of sequences (see flexmsa.kernels) is made once, when it is first read.

    Attributes:
        batch, seqlen_q, seqlen_k: B, Sq and Sk.
        are_whole: each batch row is one sequence, which ends with the last key.
        are_aligned: each sequence starts at key 0, so that key j is in block j // block_size.
    """

    def __init__(
        self,
        q: Tensor,
        seqlen_k: int,
        cu_seqlens: Tensor | None = None,
        kv_starts: Tensor | None = None,
        kv_lens: Tensor | None = None,
        table: Tensor | None = None,
    ) -> None:
        """Take q [B, H, Sq, ...], of which only shape and device are read, and either the lengths or the table."""
        self.batch, self.seqlen_q, self.seqlen_k = q.shape[0], q.shape[2], seqlen_k
        self.are_aligned = cu_seqlens is None and kv_starts is None and table is None
        self.are_whole = self.are_aligned and kv_lens is None
        self._lengths = q, cu_seqlens, kv_starts, kv_lens, seqlen_k
        self._table = table

    @property
    def table(self) -> Tensor:
        """[N, 5] int32."""
        if self._table is None:
            self._table = ops.sequence_table(*self._lengths)
        return self._table

    def count(self, num_kv_heads: int) -> Tensor:
        """The number of groups and queries that see a key, at least 1: a scalar int64."""
        if self.are_whole:
            number = self.batch * num_kv_heads * min(self.seqlen_q, self.seqlen_k)
            return self._lengths[0].new_full((), max(1, number), dtype=torch.int64)
        _, q_start, q_end, k_start, k_end = self.table.long().unbind(1)
        queries = torch.minimum(q_end - q_start, k_end - k_start).clamp(min=0).sum()
        return (queries * num_kv_heads).clamp(min=1)

    def key_ranges(self) -> tuple[Tensor, Tensor]:
        """Return start, end [B, Sq] int32: a query sees the keys start .. end-1."""
        return key_ranges(self.table, self.batch, self.seqlen_q)


def check_sequences(
    q: Tensor, seqlen_k: int, cu_seqlens: Tensor | None, kv_starts: Tensor | None, kv_lens: Tensor | None
) -> Sequences:
    """Return the sequences of queries q [B, H, Sq, ...] and `seqlen_k` keys, from the arguments of a public function.

    Raises:
        ValueError, TypeError: a length has a wrong shape, dtype or device. Wrong values raise when the table is made.
    """
    validation.check_sequences(q.shape[0], q.shape[2], seqlen_k, q.device, cu_seqlens, kv_starts, kv_lens)
    return Sequences(q, seqlen_k, cu_seqlens, kv_starts, kv_lens)
