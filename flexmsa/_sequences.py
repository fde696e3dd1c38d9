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
        ranges: (start, stop) of the parts of plain rows that the queries are, in order; queries after them are padding.
            None for other sequences. The host knows them; what a table holds only the device knows.
    """

    def __init__(
        self,
        q: Tensor,
        seqlen_k: int,
        cu_seqlens: Tensor | None = None,
        kv_starts: Tensor | None = None,
        kv_lens: Tensor | None = None,
        table: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        ranges: list[tuple[int, int]] | None = None,
    ) -> None:
        """Take q [B, H, Sq, ...], of which only shape and device are read, and either the lengths or the table.

        cu_seqlens are the offsets of the queries, and of the keys too without cu_seqlens_k.
        """
        self.batch, self.seqlen_q, self.seqlen_k = q.shape[0], q.shape[2], seqlen_k
        self.are_aligned = cu_seqlens is None and kv_starts is None and table is None
        self.are_whole = self.are_aligned and kv_lens is None
        self._lengths = q, cu_seqlens, kv_starts, kv_lens, seqlen_k, cu_seqlens_k
        self._table = table
        self.ranges = ranges

    @classmethod
    def from_table(cls, q: Tensor, seqlen_k: int, fragments: Tensor) -> "Sequences":
        """Return the sequences of queries q [B, H, Sq, ...] that are fragments of documents.

        Args:
            q: the queries of one rank, of which only shape and device are read.
            seqlen_k: the keys that the rank has.
            fragments: [documents, fragments, 5] int32 on q's device, a table as `flexmsa.kernels` describes it.

        Raises:
            ValueError: the table has another shape, or, on a CPU, wrong values.

        >>> fragments = torch.tensor([[[0, 0, 2, 0, 2], [0, 2, 4, 0, 8]]])
        >>> start, end = Sequences.from_table(torch.empty(1, 1, 4, 16), 8, fragments).key_ranges()
        >>> end.tolist()
        [[1, 2, 7, 8]]
        """
        validation.check_lengths("fragments", fragments, q.device)
        if fragments.dim() != 3 or fragments.shape[2] != 5 or fragments.numel() == 0:
            raise ValueError(f"fragments: expected [documents, fragments, 5], got {list(fragments.shape)}")
        return cls(q, seqlen_k, table=ops.fragment_table(fragments, q.shape[0], q.shape[2], seqlen_k))

    @property
    def table(self) -> Tensor:
        """[N, 5] int32, or [documents, fragments, 5]."""
        if self._table is None:
            self._table = ops.sequence_table(*self._lengths)
        return self._table

    def count(self, num_kv_heads: int) -> Tensor:
        """The number of groups and queries that see a key: a scalar int64."""
        if self.are_whole:
            number = self.batch * num_kv_heads * min(self.seqlen_q, self.seqlen_k)
            return self._lengths[0].new_full((), number, dtype=torch.int64)
        _, q_start, q_end, k_start, k_end = self.table.long().unbind(-1)
        queries = torch.minimum(q_end - q_start, k_end - k_start).clamp(min=0).sum()
        return queries * num_kv_heads

    def parts(self, index_q: Tensor, index_k: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the queries, keys and table of each range that is not empty: the last tokens of a whole row."""
        assert self.ranges is not None
        found, first = [], 0
        for start, stop in self.ranges:
            queries = index_q[:, :, first : first + stop - start]
            first += stop - start
            if start < stop:
                found.append((queries, index_k[:, :, :stop], Sequences(queries, stop).table))
        return found

    def key_ranges(self) -> tuple[Tensor, Tensor]:
        """Return start, end [B, Sq] int32: a query sees the keys start .. end-1."""
        return key_ranges(self.table, self.batch, self.seqlen_q)


def check_sequences(
    q: Tensor,
    seqlen_k: int,
    cu_seqlens: Tensor | None,
    kv_starts: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Sequences:
    """Return the sequences of queries q [B, H, Sq, ...] and `seqlen_k` keys, from the arguments of a public function.

    Raises:
        ValueError, TypeError: a length has a wrong shape, dtype or device. Wrong values raise when the table is made.
    """
    offsets = {"cu_seqlens": cu_seqlens, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    given = {name: x for name, x in offsets.items() if x is not None}
    for name, x in given.items():
        validation.check_lengths(name, x, q.device)
        if x.dim() != 1 or x.shape[0] < 2:
            raise ValueError(f"{name}: expected [documents + 1] offsets, got shape {list(x.shape)}")
        if kv_starts is not None or kv_lens is not None:
            raise ValueError(f"{name}: expected alone, got it with kv_starts or kv_lens; either pack or pad")
        if q.shape[0] != 1:
            raise ValueError(f"{name}: expected one packed row, B = 1, got B={q.shape[0]}; flatten the batch")
    for name, lengths in (("kv_starts", kv_starts), ("kv_lens", kv_lens)):
        if lengths is not None:
            validation.check_lengths(name, lengths, q.device)
            validation.check_shape(name, lengths, (q.shape[0],), "[B]")
    if cu_seqlens is None:
        cu_seqlens = _check_pair(cu_seqlens_q, cu_seqlens_k)
    elif len(given) > 1:
        raise ValueError("cu_seqlens: expected either cu_seqlens, or cu_seqlens_q and cu_seqlens_k, got both")
    elif q.shape[2] != seqlen_k:
        raise ValueError(
            f"cu_seqlens: expected as many queries as keys, got Sq={q.shape[2]}, Sk={seqlen_k}; pass cu_seqlens_q and "
            "cu_seqlens_k instead"
        )
    return Sequences(q, seqlen_k, cu_seqlens, kv_starts, kv_lens, cu_seqlens_k=cu_seqlens_k)


def _check_pair(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> Tensor | None:
    """Check the offsets of queries and of keys against each other, and return the queries'."""
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return None
    if cu_seqlens_q is None or cu_seqlens_k is None:
        missing = "cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k"
        raise ValueError(f"cu_seqlens_q, cu_seqlens_k: expected both or neither, got no {missing}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "cu_seqlens_q, cu_seqlens_k: expected one offset more than documents each, got "
            f"{cu_seqlens_q.shape[0]} and {cu_seqlens_k.shape[0]}"
        )
    return cu_seqlens_q
