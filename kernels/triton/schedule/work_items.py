"""The lists of a reverse index, shared out among programs: pieces of bounded length, one program each.

A block that every query chose is so worked on by many programs. Launches are sized by upper bounds, and programs beyond
the last piece return at once.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .inverse_index import ReverseIndex


@triton.jit(do_not_specialize=["num_blocks", "num_items"])
def plan_kernel(
    offsets_ptr,
    blocks_ptr,
    plan_ptr,
    shares_ptr,
    num_blocks,
    num_items,
    LENGTH: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """`Pieces.plan` and `Pieces.shares` of one chunk, BLOCKS lists at a time; see there."""
    chunk = tl.program_id(0).to(tl.int64)
    offsets_ptr += chunk * num_blocks
    origin = tl.load(offsets_ptr)
    items, slots = num_blocks * 0, num_blocks * 0
    for start in range(0, num_blocks, BLOCKS):
        block = start + tl.arange(0, BLOCKS)
        live = block < num_blocks
        begin = (tl.load(offsets_ptr + block, mask=live, other=0) - origin).to(tl.int32)
        stop = (tl.load(offsets_ptr + block + 1, mask=live, other=0) - origin).to(tl.int32)
        count = tl.where(live, tl.cdiv(stop - begin, LENGTH), 0)
        several = tl.where(count > 1, count, 0)
        item = items + tl.cumsum(count, axis=0) - count
        slot = slots + tl.cumsum(several, axis=0) - several
        share = shares_ptr + (chunk * num_blocks + block) * 2
        tl.store(share, slot, mask=live)
        tl.store(share + 1, several, mask=live)
        place = blocks_ptr + block * 4
        batch, first_key = tl.load(place, mask=live), tl.load(place + 1, mask=live)
        stop_key, shift = tl.load(place + 2, mask=live), tl.load(place + 3, mask=live)
        for piece in range(0, tl.max(count, axis=0)):
            mask = piece < count
            row = plan_ptr + (chunk * num_items + item + piece) * 8
            first = begin + piece * LENGTH
            tl.store(row, batch, mask=mask)
            tl.store(row + 1, first_key, mask=mask)
            tl.store(row + 2, stop_key, mask=mask)
            tl.store(row + 3, shift, mask=mask)
            tl.store(row + 4, first, mask=mask)
            tl.store(row + 5, tl.minimum(first + LENGTH, stop), mask=mask)
            tl.store(row + 6, tl.where(count > 1, slot + piece, -1), mask=mask)
            tl.store(row + 7, block, mask=mask)
        items += tl.sum(count, axis=0)
        slots += tl.sum(several, axis=0)


@triton.jit
def load_piece(plan_ptr, chunk, num_items):
    """(batch as int64, first key, last key + 1, shift, first entry, last entry + 1) of item program_id(0)."""
    row = plan_ptr + (tl.cast(chunk, tl.int64) * num_items + tl.program_id(0)) * 8
    batch, first_key, stop_key, shift = tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return batch, first_key, stop_key, shift, tl.load(row + 4), tl.load(row + 5)


@triton.jit
def piece_entries(entries_ptr, offsets_ptr, chunk, num_blocks, begin):
    """Where the entries of a piece are that begins `begin` entries after the chunk's first."""
    return entries_ptr + tl.load(offsets_ptr + tl.cast(chunk, tl.int64) * num_blocks) + begin


@triton.jit
def load_slot(plan_ptr, chunk, num_items):
    """The slot of item program_id(0), as int64."""
    return tl.load(plan_ptr + (tl.cast(chunk, tl.int64) * num_items + tl.program_id(0)) * 8 + 6).to(tl.int64)


@triton.jit
def load_share(shares_ptr, chunk, num_blocks, block):
    """(first slot as int64, number of pieces) of a list of several pieces; no pieces if it has one or none."""
    share = shares_ptr + (tl.cast(chunk, tl.int64) * num_blocks + block) * 2
    return tl.load(share).to(tl.int64), tl.load(share + 1)


@dataclass(frozen=True)
class Pieces:
    """Made by `cut_lists`.

    plan: [num_chunks, num_items, 8] int32, for each piece (batch, first key, last key + 1, shift) of its block, its
    first entry and last entry + 1, counted from the chunk's first, its slot, and its block. Pieces of a list are
    neighbours; a list's only piece has slot -1, and others count through the chunk, so that slots can name places in a
    workspace. Items past the last piece have no entries.
    shares: [num_chunks, num_blocks, 2] int32, of each list that has several pieces, the first slot and their number.
    """

    plan: torch.Tensor
    shares: torch.Tensor

    @property
    def num_items(self) -> int:
        return self.plan.shape[1]


def cut_lists(index: ReverseIndex, length: int) -> Pieces:
    """Cut every list into pieces of at most `length` entries."""
    num_items = index.num_blocks + index.chunk_tokens * index.topk // length
    plan = index.blocks.new_zeros(index.num_chunks, num_items, 8)
    shares = index.blocks.new_empty(index.num_chunks, index.num_blocks, 2)
    plan_kernel[(index.num_chunks,)](
        index.offsets,
        index.blocks,
        plan,
        shares,
        index.num_blocks,
        num_items,
        LENGTH=length,
        BLOCKS=min(1024, triton.next_power_of_2(index.num_blocks)),
        num_warps=4,
    )
    return Pieces(plan, shares)
