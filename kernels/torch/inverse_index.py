"""The inverse index: for each key/value block the queries that attend to it, and the order of the work.

A list holds, in ascending order, the rows (see ``packing``) that attend to one block of one sequence and group. Long
lists are cut into *work items*, and work items are put together into *tiles* of bounded size, so that a tile is always
one batched product: a few large matrices for long sequences, many small ones for short sequences.

No row occurs twice in a tile, so the results of a tile can be written back without a reduction. Therefore the lists
are sorted into *rounds*, and a tile has work items of one round. A round usually is a block number within the
sequences. But a few queries that chose among many blocks would make a tile per block, each of a few rows. For these,
round ``r`` has the ``r``-th block of every row, and the rows of a block are one list per round.

Blocks that no query chose are not packed, so the work depends on the number of queries, not of keys.
"""

from collections.abc import Iterator
from copy import copy
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flexmsa.kernels.sequences import list_sequences
from flexmsa.kernels.torch.packing import BlockTable, PackedBlocks, TokenRange, array, query_positions, token_ranges
from flexmsa.kernels.torch.tile import Tile

# The least numbers in the packed rows of a token range, and the least query vectors in its average list.
_RANGE_NUMEL = 2**21
_VECTORS_PER_LIST = 2048
# If block numbers have fewer rows on average than this part of a tile, their products take less time than their calls.
LEAST_FILLED = 1 / 16


class _WorkItem(NamedTuple):
    """The entries ``start .. start + length - 1`` of the lists, or these rows themselves if no lists are stored.

    ``block_id`` is the block's number in its sequence, ``block`` its index in the packed blocks. ``is_local`` says that
    the list's first row does not see the whole block. ``offset`` counts the list's rows in earlier work items. Tiles
    join items of one ``round``.
    """

    round: int
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
        page_table: Tensor | None = None,
    ) -> None:
        self.block_size = block_size
        self._shape = batch, num_kv_heads, seqlen_q
        self._sequences = list_sequences(sequences)
        self._block_indices = block_indices
        positions = query_positions(sequences, batch, seqlen_q)
        self._sequence, self._position = (torch.as_tensor(x) for x in positions)
        self._table = BlockTable(sequences, block_size)
        self._first_block = torch.as_tensor(self._table.first_block.repeat(self._table.fragments))
        is_packed = self._mark_blocks()
        numbers = array(is_packed.nonzero().squeeze(1))
        self._index = is_packed.cumsum(0) - 1
        self.blocks = PackedBlocks(self._table, numbers, page_table)
        self._num_ids = len(np.unique(self.blocks.block_id))

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

    def without(self, queries: Tensor) -> "InverseIndex":
        """The same index without the rows where ``queries`` [B,Hkv,Sq] is True, unless no lists are stored."""
        other = copy(self)
        if self._block_indices is not None:
            other._block_indices = self._block_indices.masked_fill(queries[..., None], -1)
        return other

    def token_ranges(self, group_size: int, head_dim: int) -> Iterator[TokenRange]:
        """Cut up the queries; with many blocks to choose from, ranges are long so that lists do not become short."""
        num_blocks = max(self._table.num_blocks.tolist(), default=0)
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
            lists, rows = self._chosen_lists(self._block_indices, tokens, position, max_tokens)
        for _, same_round in groupby(lists, key=lambda item: item.round):
            items = [item for whole in same_round for item in _split(whole, max_tokens)]
            for group in batch_by_size([(item.length, 1) for item in items], max_tokens):
                yield self._tile([items[i] for i in group], rows, position)

    def _mark_blocks(self) -> Tensor:
        """Whether any query attends to each block of the table, [Hkv * total]."""
        ids, num_blocks = self._block_indices, self.num_kv_heads * self._table.total
        if ids is None:
            return torch.ones(num_blocks, dtype=torch.bool)
        is_chosen = torch.zeros(num_blocks, dtype=torch.bool)
        for tokens in token_ranges(*self._shape, max(1, _RANGE_NUMEL // max(1, ids.shape[-1]))):
            chosen, visible = self._chosen(ids, tokens)
            is_chosen[self._numbers(self._pairs(tokens)[..., None], chosen)[visible]] = True
        return is_chosen

    def _select(self, by_query: Tensor, tokens: TokenRange) -> Tensor:
        """The part [batch, 1, token] of by_query [B,Sq] in the token range."""
        return by_query[tokens.batch.start : tokens.batch.stop, None, tokens.token.start : tokens.token.stop]

    def _chosen(self, block_indices: Tensor, tokens: TokenRange) -> tuple[Tensor, Tensor]:
        """The block ids of a token range, [*tokens.shape, K], and whether the query sees each."""
        ids = tokens.of(block_indices).squeeze(3).to(torch.int64)
        newest = self._select(self._position, tokens).div(self.block_size, rounding_mode="floor")[..., None]
        return ids, (ids >= 0) & (ids <= newest)

    def _chosen_lists(
        self, block_indices: Tensor, tokens: TokenRange, position: Tensor, max_tokens: int
    ) -> tuple[list[_WorkItem], Tensor]:
        """The lists of the chosen blocks as one work item each, and the rows of all lists, one after another."""
        ids, visible = self._chosen(block_indices, tokens)
        pair, row = self._pairs(tokens), torch.arange(tokens.num_rows).view(*tokens.shape, 1)
        num_pairs, nothing = len(self._sequences) * self.num_kv_heads, torch.iinfo(torch.int64).max
        # Sorting by (round, block id, pair, row) puts the rows of each list together, in ascending order, and repeated
        # ids next to each other.
        key = ((ids * num_pairs + pair[..., None]) * tokens.num_rows + row).masked_fill_(~visible, nothing)
        num_visible = int(visible.sum())
        by_rank = num_visible < LEAST_FILLED * max_tokens * self._num_ids
        ids_end = max(self._table.num_blocks.tolist(), default=0)
        if by_rank:
            key = key.sort(-1).values
            key[..., 1:].masked_fill_(key[..., 1:] == key[..., :-1], nothing)
            rank = torch.arange(key.shape[-1]) * (ids_end * num_pairs * tokens.num_rows)
            key = torch.where(key < nothing, key + rank, nothing)
            num_visible = int((key < nothing).sum())
        key = key.flatten().sort().values[:num_visible]
        repeated = key[1:] == key[:-1]
        if bool(repeated.any()):
            key = torch.cat([key[:1], key[1:][~repeated]])
        list_id = key.div(tokens.num_rows, rounding_mode="floor")
        rows = key - list_id * tokens.num_rows
        list_id, length = torch.unique_consecutive(list_id, return_counts=True)
        block_id, pair = list_id // num_pairs % ids_end, list_id % num_pairs
        start = length.cumsum(0) - length
        is_local = position[rows[start]] < (block_id + 1) * self.block_size - 1
        block = self._index[self._numbers(pair, block_id)]
        rounds = list_id // (num_pairs * ids_end) if by_rank else block_id
        columns = torch.stack([rounds, block_id, block, start, length, is_local], 1)
        return [_WorkItem(*numbers) for numbers in columns.tolist()], rows

    def _pairs(self, tokens: TokenRange) -> Tensor:
        """For each row of a token range, [*tokens.shape], the number of its (sequence, group)."""
        head = torch.arange(tokens.head.start, tokens.head.stop)[:, None]
        return self._select(self._sequence, tokens) * self.num_kv_heads + head

    def _numbers(self, pair: Tensor, block_id: Tensor) -> Tensor:
        """The numbers in the table of the blocks block_id of pairs (sequence, group)."""
        sequence, head = pair // self.num_kv_heads, pair % self.num_kv_heads
        return head * self._table.total + self._first_block[sequence] + block_id

    def _visible_lists(self, tokens: TokenRange) -> list[_WorkItem]:
        """The list of each visible block as one work item."""
        items = []
        block_size = self.block_size
        for first_block, sequence in zip(self._first_block.tolist(), self._sequences, strict=True):
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
                    block = head * self._table.total + first_block + block_id
                    row = (sequence.batch - tokens.batch.start) * len(tokens.head) + head - tokens.head.start
                    row = row * len(tokens.token) + first - tokens.token.start
                    items.append(_WorkItem(block_id, block_id, block, row, stop - first, is_local))
        return sorted(items, key=lambda item: item.round)

    def _tile(self, items: list[_WorkItem], rows: Tensor | None, position: Tensor) -> Tile:
        padded = _padded_rows(items, rows, padding=position.numel() - 1)
        # At most block_size rows have their own newest key in this block, and they are the first of the list.
        masked = max(min(item.length, self.block_size - item.offset) if item.is_local else 0 for item in items)
        future = None
        if masked > 0:
            first_key = torch.tensor([[item.block_id * self.block_size] for item in items])
            newest = position.take(padded[:, :masked]) - first_key
            future = torch.arange(self.block_size) > newest[..., None]
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
