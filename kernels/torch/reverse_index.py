"""The reverse index: for each key/value block the queries that attend to it, and the order to work through it.

One *job* is a block of one sequence and group, with the rows (see ``packing``) that attend to it in ascending
order. Long jobs are split and short ones put together into *tiles* of bounded size, so that a tile is always one
batched product: a few large matrices for long sequences, many small ones for short sequences.

The jobs of one tile have the same block number ``b`` within their sequences. Jobs of one sequence and group with
the same ``b`` are parts of one list, and other jobs have other rows: so no row comes twice in a tile, and the
results of a tile can be written back without a reduction.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from flexmsa.kernels.torch.packing import BlockTable, Chunk, chunks, query_positions
from flexmsa.kernels.torch.tile import Tile

# The least numbers in the packed rows of a chunk, and the least query vectors in its average job.
_CHUNK_NUMEL = 2**21
_VECTORS_PER_JOB = 2048


class _Job(NamedTuple):
    """The rows ``start .. start + length - 1`` of the list, or these rows themselves if there is no list.

    ``ordinal`` is the block's number in its sequence, ``block`` its place in the packed blocks. ``is_local`` says that
    the first row does not see the whole block. ``offset`` counts the rows of the job that come before, in other pieces.
    """

    ordinal: int
    block: int
    start: int
    length: int
    is_local: bool
    offset: int = 0


class ReverseIndex:
    """Made from block_indices [B,Hkv,Sq,K], or from None when every visible block counts.

    In the second case a job's rows are consecutive numbers, and no list of them is stored.
    """

    def __init__(
        self,
        sequences: Tensor,
        block_indices: Tensor | None,
        block_size: int,
        batch: int,
        num_kv_heads: int,
        seqlen_q: int,
    ) -> None:
        self.table = BlockTable(sequences, block_size)
        self._shape = batch, num_kv_heads, seqlen_q
        self._sequences: list[list[int]] = sequences.tolist()
        self._block_indices = block_indices
        places = query_positions(sequences, batch, seqlen_q)
        self._sequence, self._position = (torch.as_tensor(x) for x in places)

    @property
    def num_kv_heads(self) -> int:
        return self._shape[1]

    @property
    def sees_keys(self) -> Tensor:
        """Whether each query [B,1,Sq] sees at least one key."""
        return (self._position >= 0)[:, None]

    @property
    def num_visible(self) -> int:
        """How many (batch, group, query) see at least one key."""
        return int(self.sees_keys.sum()) * self.num_kv_heads

    def chunks(self, group_size: int, head_dim: int) -> Iterator[Chunk]:
        """Cut up the queries; many blocks to choose from ask for long chunks, or the jobs become short."""
        num_blocks = max(self.table.num_blocks.tolist(), default=0)
        topk = num_blocks if self._block_indices is None else self._block_indices.shape[-1]
        num_rows = _VECTORS_PER_JOB // group_size * num_blocks // max(1, topk)
        return chunks(*self._shape, max(1, num_rows, _CHUNK_NUMEL // (group_size * head_dim)))

    def tiles(self, chunk: Chunk, max_tokens: int) -> Iterator[Tile]:
        """Tiles of at most ``max_tokens`` rows that together cover every job of the chunk once."""
        position = torch.full((chunk.num_rows + 1,), torch.iinfo(torch.int64).max)
        position[:-1].view(chunk.shape).copy_(self._part(self._position, chunk))
        jobs, rows = self._visible(chunk) if self._block_indices is None else self._selected(chunk, position)
        for _, same in groupby(jobs, key=lambda job: job.ordinal):
            pieces = [piece for job in same for piece in _split(job, max_tokens)]
            for group in batch_by_size([(piece.length, 1) for piece in pieces], max_tokens):
                yield self._tile([pieces[i] for i in group], rows, position)

    def _part(self, by_query: Tensor, chunk: Chunk) -> Tensor:
        """by_query [B,Sq] to the chunk's [batch, 1, token]."""
        return by_query[chunk.batch.start : chunk.batch.stop, None, chunk.token.start : chunk.token.stop]

    def _selected(self, chunk: Chunk, position: Tensor) -> tuple[list[_Job], Tensor | None]:
        assert self._block_indices is not None
        ids = chunk.of(self._block_indices).squeeze(3).to(torch.int64)
        newest = position[:-1].view(*chunk.shape, 1).div(self.table.block_size, rounding_mode="floor")
        head = torch.arange(chunk.head.start, chunk.head.stop)[:, None]
        # Sorting on (block number, sequence, group, row) puts the rows of each job together, in ascending order,
        # and repeated ids next to each other.
        num_heads, num_rows = chunk.num_kv_heads, chunk.num_rows
        num_lists = self.table.first_block.numel() * num_heads
        key = (ids * num_lists + (self._part(self._sequence, chunk) * num_heads + head)[..., None]) * num_rows
        key += torch.arange(num_rows).view(*chunk.shape, 1)
        visible = (ids >= 0) & (ids <= newest)
        key = key.masked_fill_(~visible, torch.iinfo(key.dtype).max).flatten().sort().values[: int(visible.sum())]
        repeated = key[1:] == key[:-1]
        if bool(repeated.any()):
            key = torch.cat([key[:1], key[1:][~repeated]])
        list_id = key.div(num_rows, rounding_mode="floor")
        rows = key - list_id * num_rows
        list_id, length = torch.unique_consecutive(list_id, return_counts=True)
        ordinal, owner = list_id // num_lists, list_id % num_lists // num_heads
        block = list_id % num_heads * self.table.total + self.table.first_block[owner] + ordinal
        start = length.cumsum(0) - length
        is_local = position[rows[start]] < (ordinal + 1) * self.table.block_size - 1
        columns = torch.stack([ordinal, block, start, length, is_local], 1)
        return [_Job(*numbers) for numbers in columns.tolist()], rows

    def _visible(self, chunk: Chunk) -> tuple[list[_Job], Tensor | None]:
        jobs = []
        first_blocks = self.table.first_block.tolist()
        for first_block, (batch, q_start, q_end, k_start, k_end) in zip(first_blocks, self._sequences, strict=True):
            if batch not in chunk.batch:
                continue
            stop = min(q_end, chunk.token.stop)
            shift = k_end - k_start - q_end
            for ordinal in range((stop - 1 + shift) // self.table.block_size + 1):
                first = max(q_start, chunk.token.start, ordinal * self.table.block_size - shift)
                if first >= stop:
                    continue
                for head in chunk.head:
                    block = head * self.table.total + first_block + ordinal
                    row = (batch - chunk.batch.start) * len(chunk.head) + head - chunk.head.start
                    row = row * len(chunk.token) + first - chunk.token.start
                    is_local = first + shift < (ordinal + 1) * self.table.block_size - 1
                    jobs.append(_Job(ordinal, block, row, stop - first, is_local))
        return sorted(jobs, key=lambda job: job.ordinal), None

    def _tile(self, pieces: list[_Job], rows: Tensor | None, position: Tensor) -> Tile:
        block_size = self.table.block_size
        num_tokens = max(piece.length for piece in pieces)
        entry = self._padded(pieces, num_tokens, rows, position.numel() - 1)
        # At most block_size rows have their own newest key in this block, and they are the first of the job.
        masked = max(min(piece.length, block_size - piece.offset) if piece.is_local else 0 for piece in pieces)
        future = None
        if masked > 0:
            newest = position.take(entry[:, :masked]) - pieces[0].ordinal * block_size
            future = torch.arange(block_size) > newest[..., None]
        return Tile([piece.block for piece in pieces], entry.flatten(), future)

    def _padded(self, pieces: list[_Job], num_tokens: int, rows: Tensor | None, padding: int) -> Tensor:
        """The rows of the pieces, each filled up to num_tokens."""
        if len(pieces) == 1:
            first, stop = pieces[0].start, pieces[0].start + num_tokens
            return (torch.arange(first, stop) if rows is None else rows[first:stop])[None]
        start = torch.tensor([[piece.start] for piece in pieces])
        offset = torch.arange(num_tokens)
        entry = start + offset
        if rows is not None:
            entry = rows.take(entry.clamp_(max=rows.numel() - 1))
        return entry.masked_fill_(offset >= torch.tensor([[piece.length] for piece in pieces]), padding)


def _split(job: _Job, max_tokens: int) -> Iterator[_Job]:
    """Cut one job into pieces of at most ``max_tokens`` rows, all of nearly the same length."""
    num_pieces = -(-job.length // max_tokens)
    for i in range(num_pieces):
        begin, end = job.length * i // num_pieces, job.length * (i + 1) // num_pieces
        yield job._replace(start=job.start + begin, length=end - begin, offset=begin)


def batch_by_size(sizes: list[tuple[int, int]], budget: int) -> Iterator[list[int]]:
    """Group items (height, width) that will be padded to the largest of their group; yields lists of positions.

    A group's padded area stays within ``budget`` and its padding within a quarter of that, except that an item
    larger than the budget is a group of its own.
    """
    order = sorted(range(len(sizes)), key=lambda i: sizes[i][::-1], reverse=True)
    group: list[int] = []
    height = width = area = 0
    for i in order:
        item_height, item_width = sizes[i]
        new_height, new_width = max(height, item_height), max(width, item_width)
        padded = new_height * new_width * (len(group) + 1)
        new_area = area + item_height * item_width
        if group and (padded > budget or padded - new_area > budget // 4):
            yield group
            group, new_height, new_width, new_area = [], item_height, item_width, item_height * item_width
        group.append(i)
        height, width, area = new_height, new_width, new_area
    if group:
        yield group
