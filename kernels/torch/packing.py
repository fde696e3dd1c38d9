"""The layout of the plain PyTorch kernels' operands: queries as rows, keys as blocks.

Rows. The G query heads of one group share their selection, so the G * D numbers of one token and group make one row.
The kernels pack the rows of one ``TokenRange`` at a time, which is small enough that gathering its rows, once per
selected block, mostly hits the processor's cache. The last row is an additional one of zeros, and pads short lists of
rows.

Blocks. The keys of every sequence are cut into blocks from the sequence's own first key. Zeros fill up the last block
of a sequence, so keys between sequences are never read. In a paged cache every block is a page.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexmsa.kernels.sequences import Sequence, num_fragments, page_place, table_rows
from flexmsa.kernels.torch import fp8

Array = np.ndarray


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that products are accumulated in: float64 for float64, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Scratch:
    """Named buffers that grow to the largest request, and that all token ranges and tiles use again.

    For a megabyte of fresh memory, the page faults cost more than an elementwise pass.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, valid until the next call with this name and type."""
        key = name, dtype or self.dtype
        if key not in self._buffers:
            self._buffers[key] = torch.empty(0, dtype=key[1])
        return self._buffers[key].resize_(shape)

    def widen(self, stored: Tensor, out: Tensor) -> Tensor:
        """Fill ``out`` with the numbers ``stored``, e4m3 ones divided by ``fp8.SHIFT``."""
        if fp8.is_e4m3(stored):
            stored = fp8.as_float16(stored, self.take("e4m3", *stored.shape, dtype=torch.int16))
        return out.copy_(stored)


@dataclass(frozen=True)
class TokenRange:
    """The queries that are worked on at once: a range each of batch rows, groups and tokens.

    Rows are numbered in the order (batch row, group, token).
    """

    batch: range
    head: range
    token: range
    num_kv_heads: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.batch), len(self.head), len(self.token)

    @property
    def num_rows(self) -> int:
        return math.prod(self.shape)

    def of(self, x: Tensor) -> Tensor:
        """View this range of x [B,Hkv*G,Sq,...] as [*shape, G, ...]."""
        batch, head, token = (slice(part.start, part.stop) for part in (self.batch, self.head, self.token))
        return x.unflatten(1, (self.num_kv_heads, -1))[batch, head, :, token].transpose(2, 3)

    def pack(self, x: Tensor, scratch: Scratch, name: str) -> Tensor:
        """x [B,Hkv*G,Sq,D] or [B,Hkv*G,Sq] to rows [num_rows + 1, G * D], the last of them zero."""
        part = self.of(x)
        rows = scratch.take(name, self.num_rows + 1, math.prod(part.shape[3:]))
        rows[:-1].view(part.shape).copy_(part)
        rows[-1].zero_()
        return rows

    def unpack(self, rows: Tensor, out: Tensor) -> None:
        """The inverse of :meth:`pack`, into this range of ``out``."""
        part = self.of(out)
        part.copy_(rows[:-1].view(part.shape))


def token_ranges(batch: int, num_kv_heads: int, seqlen_q: int, num_rows: int) -> Iterator[TokenRange]:
    """Cut the queries into ranges of at most ``num_rows`` rows: first by batch, then by group, then by token."""
    token_step = max(1, min(seqlen_q, num_rows))
    head_step = max(1, min(num_kv_heads, num_rows // token_step)) if token_step == seqlen_q else 1
    batch_step = max(1, num_rows // (token_step * head_step)) if head_step == num_kv_heads else 1
    for b in _steps(batch, batch_step):
        for head in _steps(num_kv_heads, head_step):
            for token in _steps(seqlen_q, token_step):
                yield TokenRange(b, head, token, num_kv_heads)


def _steps(stop: int, step: int) -> Iterator[range]:
    return (range(first, min(first + step, stop)) for first in range(0, stop, step))


def array(x: Tensor) -> Array:
    """A small tensor as a NumPy array: an operation on it takes a fifth of the time of PyTorch's."""
    return x.cpu().numpy()


def locate_block(
    batch: Array, k_start: Array, block: Array, block_size: int, page_table: Tensor | None
) -> tuple[Array, Array]:
    """The index of a cache's first dimension (batch row or page) where block ``block`` is, and its first key there."""
    if page_table is None:
        return batch, k_start + block * block_size
    row, column = page_place(page_table, batch, k_start, block_size)
    return array(page_table)[row, column + block].astype(np.int64), np.zeros_like(block)


def sequence_columns(sequences: Tensor) -> Sequence:
    """The columns of the rows of the table of sequences as int64 arrays [N]."""
    return Sequence(*array(table_rows(sequences)).astype(np.int64).T)


class BlockTable:
    """Every group's blocks: block ``b`` of document ``n`` has the number ``head * total + first_block[n] + b``.

    A document is a sequence, or fragments of one: then k_end is that of the fragment with queries that sees most.
    """

    def __init__(self, sequences: Tensor, block_size: int) -> None:
        self.fragments = num_fragments(sequences)
        columns = Sequence(*(x.reshape(-1, self.fragments) for x in sequence_columns(sequences)))
        k_end = np.where(columns.q_end > columns.q_start, columns.k_end, columns.k_start).max(1, initial=0)
        self.batch, self.k_start, self.k_end = columns.batch[:, 0], columns.k_start[:, 0], k_end
        self.num_blocks = -(-(k_end - self.k_start).clip(min=0) // block_size)
        self.first_block = self.num_blocks.cumsum() - self.num_blocks
        self.block_size = block_size
        self.total = int(self.num_blocks.sum())


class PackedBlocks:
    """The blocks of a table with the given ascending ``numbers``; the keys of other blocks are not read."""

    def __init__(self, table: BlockTable, numbers: Array, page_table: Tensor | None = None) -> None:
        block_size = table.block_size
        head, self._in_group = np.divmod(numbers, max(1, table.total))
        owner = np.searchsorted(table.first_block, self._in_group, side="right") - 1
        self.block_id = block_id = self._in_group - table.first_block[owner]
        k_start = table.k_start[owner]
        row, first = locate_block(table.batch[owner], k_start, block_id, block_size, page_table)
        last = (table.k_end[owner] - k_start - 1 - block_id * block_size)[:, None]
        offset = np.arange(block_size)
        self._row, self._head = (torch.as_tensor(x)[:, None] for x in (row, head))
        self._key = torch.as_tensor(first[:, None] + np.minimum(offset, last))
        self._is_padding = torch.as_tensor(offset > last) if bool((last < block_size - 1).any()) else None

    def pack(
        self, x: Tensor, scale: float = 1.0, token_scale: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """[B,H,Sk,D] to blocks [n, block_size, D] in ``dtype``, or x's compute dtype, times ``scale``.

        H may be 1, one head for all groups. token_scale [B,H,Sk] holds the scales of e4m3 numbers.
        """
        blocks = self._take(x).to(compute_dtype(x.dtype) if dtype is None else dtype)
        if token_scale is not None:
            blocks.mul_(fp8.factors(self._take(fp8.as_scales(token_scale)))[..., None])
        if self._is_padding is not None:
            blocks[self._is_padding] = 0
        return blocks if scale == 1 else blocks.mul_(scale)

    def unpack(self, blocks: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The transpose of :meth:`pack`: a contiguous tensor of ``like``'s shape, zero for other keys.

        The result has ``dtype``, or ``like``'s. Sums the groups' blocks if ``like`` has one head for all of them.
        """
        key, is_padding = self._place(like.shape), self._is_padding
        if like.shape[1] == 1:
            _, first, target = np.unique(self._in_group, return_index=True, return_inverse=True)
            shared = blocks.new_zeros(len(first), *blocks.shape[1:])
            blocks = shared.index_add_(0, torch.as_tensor(target), blocks)
            key = key[torch.as_tensor(first)]
            is_padding = None if is_padding is None else is_padding[torch.as_tensor(first)]
        if is_padding is not None:
            key, blocks = key[~is_padding], blocks[~is_padding]
        out = torch.zeros(like.shape, dtype=dtype or like.dtype)
        out.view(-1, like.shape[-1]).index_copy_(0, key.flatten(), blocks.to(out.dtype).view(-1, like.shape[-1]))
        return out

    def _place(self, shape: torch.Size) -> Tensor:
        """The numbers [n, block_size] of the keys in a contiguous tensor [B,H,Sk,...] of this shape."""
        _, num_heads, seqlen_k = shape[:3]
        head = self._head if num_heads > 1 else 0
        return (self._row * num_heads + head) * seqlen_k + self._key

    def _take(self, x: Tensor) -> Tensor:
        """[B,H,Sk,...] to [n, block_size, ...], e4m3 numbers divided by ``fp8.SHIFT``."""
        if fp8.is_e4m3(x):
            return fp8.as_float16(self._take(x.view(torch.int8)))
        if x.is_contiguous():
            taken = x.flatten(0, 2).index_select(0, self._place(x.shape).flatten())
            return taken.view(*self._key.shape, *x.shape[3:])
        return x[self._row, self._head if x.shape[1] > 1 else 0, self._key]


def query_positions(sequences: Tensor, batch: int, seqlen_q: int) -> tuple[Array, Array]:
    """For each query [B,Sq]: its sequence, and the position of its newest visible key from the sequence's first key.

    The position is negative for a query that sees no key.
    """
    columns = sequence_columns(sequences)
    length = (columns.q_end - columns.q_start).clip(min=0)
    owner = np.repeat(np.arange(len(length)), length)
    offset = np.arange(len(owner)) - (length.cumsum() - length)[owner]
    query = columns.batch[owner], columns.q_start[owner] + offset
    sequence = np.zeros((batch, seqlen_q), np.int64)
    position = np.full((batch, seqlen_q), -1)
    sequence[query] = owner
    position[query] = (columns.k_end - columns.k_start - length)[owner] + offset
    return sequence, position
