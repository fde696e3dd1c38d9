"""The inverse index: for each key/value block the queries that attend to it, and the order of the work.

A list holds, in ascending order, the rows (see ``packing``) that attend to one block of one sequence and group. Long
lists are cut into *work items*, and work items are put together into *tiles* of bounded size, so that a tile is always
one batched product: a few large matrices for long sequences, many small ones for short sequences.

The work items of one tile have the same block number ``block_id`` within their sequences. Work items of one sequence
and group with the same ``block_id`` are parts of one list, and other work items have other rows. Therefore no row
occurs twice in a tile, and the results of a tile can be written back without a reduction.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from flexmsa.kernels.sequences import list_sequences
from flexmsa.kernels.torch.packing import BlockTable, TokenRange, query_positions, token_ranges
from flexmsa.kernels.torch.tile import Tile

# The least numbers in the packed rows of a token range, and the least query vectors in its average list.
_RANGE_NUMEL = 2**21
_VECTORS_PER_LIST = 2048


class _WorkItem(NamedTuple):
    """The entries ``start .. start + length - 1`` of the lists, or these rows themselves if no lists are stored.

    ``block_id`` is the block's number in its sequence, ``block`` its index in the packed blocks. ``is_local`` says that
    the list's first row does not see the whole block. ``offset`` counts the list's rows in earlier work items.
    """

    block_id: int
    block: int
    start: int
    length: int
    is_local: bool
    offset: int = 0


class InverseIndex:
    """Made from block_indices [B,Hkv,Sq,K], or from None if queries attend to every visible block.

    With None, a list consists of consecutive rows, and is not stored.
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
        self._sequences = list_sequences(sequences)
        self._block_indices = block_indices
        positions = query_positions(sequences, batch, seqlen_q)
        self._sequence, self._position = (torch.as_tensor(x) for x in positions)

    @property
    def num_kv_heads(self) -> int:
        return self._shape[1]

    @property
    def sees_keys(self) -> Tensor:
        """Whether each query [B,1,Sq] sees at least one key."""
        return (self._position >= 0)[:, None]

    @property
    def num_visible(self) -> int:
        """The number of (batch, group, query) that see at least one key."""
        return int(self.sees_keys.sum()) * self.num_kv_heads

    def token_ranges(self, group_size: int, head_dim: int) -> Iterator[TokenRange]:
        """Cut up the queries; with many blocks to choose from, ranges are long so that lists do not become short."""
        num_blocks = max(self.table.num_blocks.tolist(), default=0)
        topk = num_blocks if self._block_indices is None else self._block_indices.shape[-1]
        num_rows = _VECTORS_PER_LIST // group_size * num_blocks // max(1, topk)
        return token_ranges(*self._shape, max(1, num_rows, _RANGE_NUMEL // (group_size * head_dim)))

    def tiles(self, tokens: TokenRange, max_tokens: int) -> Iterator[Tile]:
        """Tiles of at most ``max_tokens`` rows that together cover every list of the token range once."""
        position = torch.full((tokens.num_rows + 1,), torch.iinfo(torch.int64).max)
        position[:-1].view(tokens.shape).copy_(self._select(self._position, tokens))
        if self._block_indices is None:
            lists, rows = self._visible_lists(tokens), None
        else:
            lists, rows = self._chosen_lists(self._block_indices, tokens, position)
        for _, same_id in groupby(lists, key=lambda item: item.block_id):
            items = [item for whole in same_id for item in _split(whole, max_tokens)]
            for group in batch_by_size([(item.length, 1) for item in items], max_tokens):
                yield self._tile([items[i] for i in group], rows, position)

    def _select(self, by_query: Tensor, tokens: TokenRange) -> Tensor:
        """The part [batch, 1, token] of by_query [B,Sq] in the token range."""
        return by_query[tokens.batch.start : tokens.batch.stop, None, tokens.token.start : tokens.token.stop]

    def _chosen_lists(
        self, block_indices: Tensor, tokens: TokenRange, position: Tensor
    ) -> tuple[list[_WorkItem], Tensor]:
        """The list of each chosen block as one work item, and the rows of all lists, one after another."""
        ids = tokens.of(block_indices).squeeze(3).to(torch.int64)
        newest = position[:-1].view(*tokens.shape, 1).div(self.table.block_size, rounding_mode="floor")
        head = torch.arange(tokens.head.start, tokens.head.stop)[:, None]
        # Sorting by (block id, sequence, group, row) puts the rows of each list together, in ascending order, and
        # repeated ids next to each other.
        num_heads, num_rows = tokens.num_kv_heads, tokens.num_rows
        num_lists = self.table.first_block.numel() * num_heads
        key = (ids * num_lists + (self._select(self._sequence, tokens) * num_heads + head)[..., None]) * num_rows
        key += torch.arange(num_rows).view(*tokens.shape, 1)
        visible = (ids >= 0) & (ids <= newest)
        key = key.masked_fill_(~visible, torch.iinfo(key.dtype).max).flatten().sort().values[: int(visible.sum())]
        repeated = key[1:] == key[:-1]
        if bool(repeated.any()):
            key = torch.cat([key[:1], key[1:][~repeated]])
        list_id = key.div(num_rows, rounding_mode="floor")
        rows = key - list_id * num_rows
        list_id, length = torch.unique_consecutive(list_id, return_counts=True)
        block_id, owner = list_id // num_lists, list_id % num_lists // num_heads
        block = list_id % num_heads * self.table.total + self.table.first_block[owner] + block_id
        start = length.cumsum(0) - length
        is_local = position[rows[start]] < (block_id + 1) * self.table.block_size - 1
        columns = torch.stack([block_id, block, start, length, is_local], 1)
        return [_WorkItem(*numbers) for numbers in columns.tolist()], rows

    def _visible_lists(self, tokens: TokenRange) -> list[_WorkItem]:
        """The list of each visible block as one work item."""
        items = []
        block_size = self.table.block_size
        for first_block, sequence in zip(self.table.first_block.tolist(), self._sequences, strict=True):
            if sequence.batch not in tokens.batch:
                continue
            stop = min(sequence.q_end, tokens.token.stop)
            shift = sequence.k_end - sequence.k_start - sequence.q_end
            for block_id in range((stop - 1 + shift) // block_size + 1):
                first = max(sequence.q_start, tokens.token.start, block_id * block_size - shift)
                if first >= stop:
                    continue
                is_local = first + shift < (block_id + 1) * block_size - 1
                for head in tokens.head:
                    block = head * self.table.total + first_block + block_id
                    row = (sequence.batch - tokens.batch.start) * len(tokens.head) + head - tokens.head.start
                    row = row * len(tokens.token) + first - tokens.token.start
                    items.append(_WorkItem(block_id, block, row, stop - first, is_local))
        return sorted(items, key=lambda item: item.block_id)

    def _tile(self, items: list[_WorkItem], rows: Tensor | None, position: Tensor) -> Tile:
        block_size = self.table.block_size
        padded = _padded_rows(items, rows, padding=position.numel() - 1)
        # At most block_size rows have their own newest key in this block, and they are the first of the list.
        masked = max(min(item.length, block_size - item.offset) if item.is_local else 0 for item in items)
        future = None
        if masked > 0:
            newest = position.take(padded[:, :masked]) - items[0].block_id * block_size
            future = torch.arange(block_size) > newest[..., None]
        return Tile([item.block for item in items], padded.flatten(), future)


def _padded_rows(items: list[_WorkItem], rows: Tensor | None, padding: int) -> Tensor:
    """The rows [C, T] of C work items, each filled up to the longest with the row ``padding``."""
    num_tokens = max(item.length for item in items)
    if len(items) == 1:
        first, stop = items[0].start, items[0].start + num_tokens
        return (torch.arange(first, stop) if rows is None else rows[first:stop])[None]
    start = torch.tensor([[item.start] for item in items])
    offset = torch.arange(num_tokens)
    padded = start + offset
    if rows is not None:
        padded = rows.take(padded.clamp_(max=rows.numel() - 1))
    return padded.masked_fill_(offset >= torch.tensor([[item.length] for item in items]), padding)


def _split(item: _WorkItem, max_tokens: int) -> Iterator[_WorkItem]:
    """Cut a whole list into work items of at most ``max_tokens`` rows, all of nearly the same length."""
    num_items = -(-item.length // max_tokens)
    for i in range(num_items):
        begin, end = item.length * i // num_items, item.length * (i + 1) // num_items
        yield item._replace(start=item.start + begin, length=end - begin, offset=begin)


def batch_by_size(sizes: list[tuple[int, int]], budget: int) -> Iterator[list[int]]:
    """Group items (height, width) that are padded to the largest of their group; yields lists of item numbers.

    A group's padded area is at most ``budget``, and its padding at most a quarter of that. An item larger than the
    budget is a group of its own.
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
