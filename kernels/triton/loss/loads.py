"""What the index loss's kernels share: their part of a block, the entries of a piece, and the queries of those."""

import triton
import triton.language as tl

from ..schedule.work_items import ItemsRecord, load_item

# Never worth a kernel of its own: lengths, counts, and what changes from launch to launch.
VARYING = [
    "num_groups",
    "group_size",
    "seqlen_q",
    "seqlen_k",
    "chunk",
    "first_token",
    "num_tokens",
    "chunk_tokens",
    "num_blocks",
    "num_items",
    "none",
    "topk",
]


@triton.jit
def load_part(plan_ptr, chunk, num_items, COLUMNS: tl.constexpr):
    """`load_item`, but of program_id(1)'s share of the block's keys; of none past its end."""
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    batch, first_key, stop_key, shift, begin, stop = (
        item.batch,
        item.first_key,
        item.stop_key,
        item.shift,
        item.begin,
        item.stop,
    )
    first_key += tl.program_id(1) * COLUMNS
    return batch, first_key, tl.minimum(stop_key, first_key + COLUMNS), shift, begin, stop


@triton.jit
def load_rows(base, query, stride_s, stride_d, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """The vectors of the queries [ROWS] as a tile [ROWS, DEPTH]."""
    depth = tl.arange(0, DEPTH)
    rows = base + query.to(tl.int64)[:, None] * stride_s + depth.to(tl.int64)[None, :] * stride_d
    if DIM == DEPTH:
        return tl.load(rows)
    else:
        return tl.load(rows, mask=(depth < DIM)[None, :], other=0.0)


@triton.jit
def load_entries(entries_ptr, entry, num_entries, origin):
    """int32: which of the chunk's entries are those of a piece; the last one again past its end."""
    place = entries_ptr + tl.minimum(entry, num_entries - 1)
    # The low halves suffice, because the difference fits.
    return tl.load(place).to(tl.int32) - origin.to(tl.int32)
