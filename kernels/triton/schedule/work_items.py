"""The lists of an inverse index, cut into work items of bounded length, one program each.

Many programs so work on a block that every query chose. Launches are sized by upper bounds, and programs beyond the
last work item return at once.

A *pass* is one round of launches: it works on several neighbouring token ranges at once, if each group is one range and
the workspace has room for several. Entries, tokens and slots are counted from the first of the pass.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import Launch
from .inverse_index import InverseIndex, load_block

# Lists that are cut at a time.
CHUNK = tl.constexpr(1024)


class WorkItem(NamedTuple):
    """A part of a list: its block (fields of `inverse_index.Block` and its number), its entries, and its slot.

    begin, stop: the first entry and the last entry + 1, in the order of the lists; an item that is not there has none.
    slot: where the item keeps partial results, -1 if its list has no other item. batch and slot are int64.
    """

    batch: Any
    first_key: Any
    stop_key: Any
    shift: Any
    begin: Any
    stop: Any
    slot: Any
    block: Any


class Share(NamedTuple):
    """The work items of a list that has several: their first slot (int64) and their number; 0 if it has one or none."""

    first_slot: Any
    num_items: Any


class WorkItems(NamedTuple):
    """Made by `cut_into_items`, and taken by kernels as it is; num_items, num_slots, num_entries: per token range.

    table: [num_ranges, num_items, 8] int32, a `WorkItem` each, counted from its token range's first entry and slot.
    Items of a list are neighbours; a list's only item has slot -1. Rows past the last item have no entries.
    shares: [num_ranges, num_blocks, 2] int32, the `Share` of each list.
    """

    table: torch.Tensor
    shares: torch.Tensor
    num_items: int
    num_blocks: int
    num_slots: int
    num_entries: int


@triton.jit
def load_item(items, first_range, number, item=None):
    """A WorkItem, program_id(0) by default, of token range `number` of a pass that begins with first_range.

    To load it again is cheaper than to keep it over a loop.
    """
    place = tl.program_id(0) if item is None else item
    row = items.table + (tl.cast(first_range + number, tl.int64) * items.num_items + place) * 8
    slot = tl.load(row + 6).to(tl.int64)
    return WorkItem(
        tl.load(row).to(tl.int64),
        tl.load(row + 1),
        tl.load(row + 2),
        tl.load(row + 3),
        tl.load(row + 4) + number * items.num_entries,
        tl.load(row + 5) + number * items.num_entries,
        slot + tl.where(slot < 0, 0, number * items.num_slots),
        tl.load(row + 7),
    )


@triton.jit
def store_item(row, item, mask):
    """Write the WorkItems [N] to these rows [N] of `WorkItems.table` where mask is set."""
    tl.store(row, item.batch, mask=mask)
    tl.store(row + 1, item.first_key, mask=mask)
    tl.store(row + 2, item.stop_key, mask=mask)
    tl.store(row + 3, item.shift, mask=mask)
    tl.store(row + 4, item.begin, mask=mask)
    tl.store(row + 5, item.stop, mask=mask)
    tl.store(row + 6, item.slot, mask=mask)
    tl.store(row + 7, item.block, mask=mask)


@triton.jit
def load_share(items, first_range, number, block):
    """The Share of a block's list in token range `number` of a pass that begins with first_range."""
    row = items.shares + (tl.cast(first_range + number, tl.int64) * items.num_blocks + block) * 2
    return Share(tl.load(row).to(tl.int64) + number * items.num_slots, tl.load(row + 1))


@triton.jit
def store_share(row, share, mask):
    """Write the Shares [N] to these rows [N] of `WorkItems.shares` where mask is set."""
    tl.store(row, share.first_slot, mask=mask)
    tl.store(row + 1, share.num_items, mask=mask)


@triton.jit
def item_entries(index, items, first_range, number, begin):
    """Where the entries of a work item are, by its `begin`."""
    first_list = tl.cast(first_range + number, tl.int64) * (index.num_blocks + 1)
    return index.entries + tl.load(index.offsets + first_list) + (begin - number * items.num_entries)


@triton.jit
def work_items_kernel(index, items, length: tl.constexpr):
    """`WorkItems.table` and `WorkItems.shares` of token range program_id(0), CHUNK lists at a time; see there."""
    range_number = tl.program_id(0).to(tl.int64)
    offsets_ptr = index.offsets + range_number * (index.num_blocks + 1)
    origin = tl.load(offsets_ptr)
    num_items, num_slots = index.num_blocks * 0, index.num_blocks * 0
    for start in range(0, index.num_blocks, CHUNK):
        number = start + tl.arange(0, CHUNK)
        live = number < index.num_blocks
        begin = (tl.load(offsets_ptr + number, mask=live, other=0) - origin).to(tl.int32)
        stop = (tl.load(offsets_ptr + number + 1, mask=live, other=0) - origin).to(tl.int32)
        count = tl.where(live, tl.cdiv(stop - begin, length), 0)
        several = tl.where(count > 1, count, 0)
        item = num_items + tl.cumsum(count, axis=0) - count
        slot = num_slots + tl.cumsum(several, axis=0) - several
        store_share(items.shares + (range_number * index.num_blocks + number) * 2, Share(slot, several), live)
        block = load_block(index.blocks, number, live)
        for part in range(0, tl.max(count, axis=0)):
            first = begin + part * length
            last = tl.minimum(first + length, stop)
            place = tl.where(count > 1, slot + part, -1)
            row = items.table + (range_number * items.num_items + item + part) * 8
            store_item(
                row,
                WorkItem(block.batch, block.first_key, block.stop_key, block.shift, first, last, place, number),
                part < count,
            )
        num_items += tl.sum(count, axis=0)
        num_slots += tl.sum(several, axis=0)
    nothing = tl.zeros([CHUNK], tl.int32)
    for start in range(num_items, items.num_items, CHUNK):
        item = start + tl.arange(0, CHUNK)
        none = WorkItem(nothing, nothing, nothing, nothing, nothing, nothing, nothing, nothing)
        store_item(items.table + (range_number * items.num_items + item) * 8, none, item < items.num_items)


def cut_into_items(index: InverseIndex, length: int) -> WorkItems:
    """Cut every list into work items of at most `length` entries."""
    num_entries = index.range_tokens * index.topk
    num_items = min(index.num_blocks, num_entries) + num_entries // length
    # Only lists of more than one item have slots: at most two for every `length` entries.
    num_slots = min(num_items, 2 * num_entries // length) if num_entries > length else 0
    table = index.blocks.new_empty(index.num_ranges, num_items, 8)
    shares = index.blocks.new_empty(index.num_ranges, index.num_blocks, 2)
    items = WorkItems(table, shares, num_items, index.num_blocks, num_slots, num_entries)
    Launch(work_items_kernel, (index.num_ranges, 1, 1), {"index": index, "items": items}, {"length": length}).run()
    return items
