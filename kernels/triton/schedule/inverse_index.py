"""The inverse index on the device: for each KV block the (query, top-k slot) pairs that chose it, in a fixed order.

An *entry* is one (group, token, top-k slot) of block_indices; a token is a query of the flattened batch, b * Sq + i.
The kernels work on one *token range* of one group at a time, which bounds what they keep per entry. A *list* is the
entries of one (group, token range, block), and its number is

    (group * ranges per group + token range) * num_blocks + block

where block counts through the blocks of all sequences. Entries are sorted by list, then token, with a stable sort, so
the order is always the same. A slot belongs to no list if it holds no block, an id that its row held before, or a block
that the query does not see. Nothing is read back to the host. `make_index` makes the index, from the kernels here, and
`work_items` then cuts the lists for the programs.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import Launch
from ..common.records import load_sequence
from ..common.sizes import cdiv

# Rows of the table of blocks that a program writes, and sequences that it reads at a time.
ROWS = tl.constexpr(64)


class Block(NamedTuple):
    """A row of `InverseIndex.blocks`: query i of the sequence sees the block's keys j <= i + shift; batch is int64."""

    batch: Any
    first_key: Any
    stop_key: Any
    shift: Any


class InverseIndex(NamedTuple):
    """Made by `inverse_index`, and taken by kernels as it is.

    blocks: [num_blocks, 4] int32, a `Block` each. There is room for as many blocks as the shapes allow; no list names
    those left over.
    numbers: [groups, num_tokens, topk] int32, the list of each entry, `none` for none.
    entries: [groups * num_tokens * topk] int64, entries in the order of their lists.
    offsets: [num_ranges, num_blocks + 1] int64, where in `entries` each list of a token range begins, and the last
        ends.
    range_tokens: tokens per token range.
    """

    blocks: torch.Tensor
    numbers: torch.Tensor
    entries: torch.Tensor
    offsets: torch.Tensor
    num_blocks: int
    first_token: int
    num_tokens: int
    range_tokens: int
    topk: int
    none: int

    @property
    def num_ranges(self) -> int:
        """Token ranges of all groups: kernels run once for each."""
        return self.numbers.shape[0] * cdiv(self.num_tokens, self.range_tokens)


class TokenRange(NamedTuple):
    """The tokens that a launch works on at once, of one group; all int64.

    first_entry: the first entry of the range before sorting; first_token: of the flattened batch; num_tokens: the last
    range of a group may have fewer than the others.
    """

    group: Any
    first_entry: Any
    first_token: Any
    num_tokens: Any


@triton.jit
def load_block(blocks_ptr, block, mask=None):
    """The Block of that number, or of a tensor of numbers where mask is set."""
    row = blocks_ptr + tl.cast(block, tl.int64) * 4
    return Block(
        tl.load(row, mask=mask).to(tl.int64),
        tl.load(row + 1, mask=mask),
        tl.load(row + 2, mask=mask),
        tl.load(row + 3, mask=mask),
    )


@triton.jit
def store_block(blocks_ptr, number, block, mask):
    """Write the Blocks [N] of these numbers [N] where mask is set."""
    row = blocks_ptr + number.to(tl.int64) * 4
    tl.store(row, block.batch, mask=mask)
    tl.store(row + 1, block.first_key, mask=mask)
    tl.store(row + 2, block.stop_key, mask=mask)
    tl.store(row + 3, block.shift, mask=mask)


@triton.jit
def find_token_range(index, number, topk):
    """The TokenRange of number `group * ranges per group + range`; topk: index.topk, or the same as a constant."""
    per_group = tl.cdiv(index.num_tokens, index.range_tokens)
    group = tl.cast(number // per_group, tl.int64)
    token = tl.cast(number % per_group, tl.int64) * index.range_tokens
    num_tokens = tl.minimum(index.range_tokens, index.num_tokens - token)
    return TokenRange(group, (group * index.num_tokens + token) * topk, index.first_token + token, num_tokens)


@triton.jit
def block_table_kernel(sequences_ptr, blocks_ptr, before_ptr, num_sequences, num_blocks, block_size: tl.constexpr):
    """ROWS rows of `InverseIndex.blocks`; rows past the last have no keys.

    Program 0 also writes before[n]: how many rows come before those of sequence n.
    """
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block = number[:, None]
    batch = tl.zeros([ROWS], tl.int32)
    first_key, stop_key, shift = batch, batch, batch
    total = num_sequences * 0
    for start in range(0, num_sequences, ROWS):
        n = start + tl.arange(0, ROWS)
        live = n < num_sequences
        sequence = load_sequence(sequences_ptr, n, live)
        counts = tl.cdiv(tl.maximum(sequence.k_end - sequence.k_start, 0), block_size)
        before = total + tl.cumsum(counts, axis=0) - counts
        if tl.program_id(0) == 0:
            tl.store(before_ptr + n, before, mask=live)
        # At most one sequence owns a row.
        owned = (block >= before[None, :]) & (block < (before + counts)[None, :])
        key = sequence.k_start[None, :] + (block - before[None, :]) * block_size
        batch += tl.sum(tl.where(owned, sequence.batch.to(tl.int32)[None, :], 0), axis=1)
        first_key += tl.sum(tl.where(owned, key, 0), axis=1)
        stop_key += tl.sum(tl.where(owned, tl.minimum(key + block_size, sequence.k_end[None, :]), 0), axis=1)
        shift += tl.sum(tl.where(owned, (sequence.k_end - sequence.q_end)[None, :], 0), axis=1)
        total += tl.sum(counts, axis=0)
    store_block(blocks_ptr, number, Block(batch, first_key, stop_key, shift), number < num_blocks)


@triton.jit
def find_sequences(sequences_ptr, token, num_sequences, seqlen_q):
    """[ROWS] int32: the sequence of each token of the flattened batch, found by bisection."""
    low, high = token * 0, token * 0 + num_sequences
    size = num_sequences
    while size > 1:
        middle = (low + high) // 2
        sequence = load_sequence(sequences_ptr, middle)
        # A sequence of no queries starts where the next one does, which is then found.
        below = sequence.batch * seqlen_q + sequence.q_start <= token
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
        size = tl.cdiv(size, 2)
    return low


@triton.jit
def list_numbers_kernel(
    ids, index, sequences_ptr, before_ptr, skip_ptr, short_ptr, num_sequences, seqlen_q,
    block_size: tl.constexpr, slots: tl.constexpr,
):  # fmt: skip
    """numbers[group, token, slot] = the entry's list, or the number past the last list if it belongs to none.

    Program (i, group) owns 2048 / slots tokens, and takes `slots` top-k slots of each at a time. ids: block_indices, or
    None for every visible block. skip[group, token], unless None, leaves the token out. short: numbers - 2^15, in 16
    bits, which are too few where no one reads them.
    """
    rows: tl.constexpr = 2048 // slots
    group, num_tokens, topk = tl.program_id(1), index.num_tokens, index.topk
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    live = row < num_tokens
    token = tl.where(live, index.first_token + row, 0)
    owner = find_sequences(sequences_ptr, token, num_sequences, seqlen_q)
    sequence = load_sequence(sequences_ptr, owner)
    query = token % seqlen_q
    sees = tl.where(live, sequence.k_end - sequence.q_end + query + 1 - sequence.k_start, 0)
    if skip_ptr is not None:
        skipped = tl.load(skip_ptr + group.to(tl.int64) * num_tokens + row, mask=live, other=1)
        sees = tl.where(skipped != 0, 0, sees)
    per_group = tl.cdiv(num_tokens, index.range_tokens)
    first_list = (group * per_group + row // index.range_tokens) * index.num_blocks + tl.load(before_ptr + owner)
    for first_slot in range(0, topk, slots):
        slot = first_slot + tl.arange(0, slots)
        inside = live[:, None] & (slot < topk)[None, :]
        if ids is None:
            chosen = tl.broadcast_to(slot[None, :], [rows, slots])
            repeated = chosen < 0
        else:
            ids_row = ids.ptr + sequence.batch * ids.stride_b + group.to(tl.int64) * ids.stride_h
            ids_row += query.to(tl.int64) * ids.stride_s
            place = ids_row[:, None] + slot[None, :].to(tl.int64) * ids.stride_d
            chosen = tl.load(place, mask=inside, other=-1).to(tl.int64)
            repeated = chosen < 0
            for earlier in range(0, tl.minimum(first_slot + slots, topk) - 1):
                other = tl.load(ids_row + tl.cast(earlier, tl.int64) * ids.stride_d, mask=live, other=-1).to(tl.int64)
                repeated |= (chosen == other[:, None]) & (slot > earlier)[None, :]
        # Compared in 64 bits: an id of any size is out of range, never wrapped into it.
        seen = chosen.to(tl.int64) * block_size < sees[:, None]
        number = tl.where(seen & ~repeated, first_list[:, None] + chosen.to(tl.int32), index.none)
        place = (group.to(tl.int64) * num_tokens + row)[:, None] * topk + slot[None, :]
        tl.store(index.numbers + place, number, mask=inside)
        tl.store(short_ptr + place, (number - 2**15).to(tl.int16), mask=inside)


def block_table(
    sequences: torch.Tensor, batch: int, seqlen_k: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`InverseIndex.blocks`, and [N] int32, how many of its rows come before each sequence's own."""
    num_sequences = sequences.shape[0]
    limit = batch * cdiv(seqlen_k, block_size) + (num_sequences if num_sequences != batch else 0)
    blocks, before = sequences.new_empty(limit, 4), sequences.new_empty(num_sequences)
    pointers = {"sequences_ptr": sequences, "blocks_ptr": blocks, "before_ptr": before}
    sizes = {"num_sequences": num_sequences, "num_blocks": limit}
    grid = cdiv(limit, ROWS.value), 1, 1
    Launch(block_table_kernel, grid, pointers | sizes, {"block_size": block_size}).run()
    return blocks, before
