"""The rows that are not certain, scored in 16 bits as `selection.kernel` scores tiles of neighbouring rows."""

import triton
import triton.language as tl

from ...common.records import load_sequence
from ..kernel import Seen, rank_tile
from ..merge import merge_ids
from ..scoring import IndexKeys, QueryTile, tile_rows
from ..topk import ids_place


@triton.jit
def marked_kernel(index_q, index_k, pages, marked, skipped, sequences_ptr, number, forced, outputs, C: tl.constexpr):
    """The ids of the rows of a RowList behind its first `skipped`, all of one sequence; or lists, one row's after the
    other's. Programs without rows return at once. Grid (tiles, splits)."""
    first = skipped + tl.program_id(0) * C.rows
    if first >= tl.load(marked.count):
        return
    sequence = load_sequence(sequences_ptr, number)
    num_keys, q_end = sequence.k_end - sequence.k_start, sequence.q_end
    tile = QueryTile(number, sequence.batch, sequence.q_start, q_end, first, sequence.k_start, num_keys, marked)
    token, _, live = tile_rows(tile, tl.arange(0, C.rows), C)
    visible = tl.where(live, num_keys - q_end + token + 1, 0)
    seen = Seen(visible, tl.min(tl.where(live, visible, num_keys), 0), tl.max(visible, 0))
    keys = IndexKeys(index_k, None, pages, 0)
    rank_tile(index_q, keys, tile, seen, 0, forced, outputs, C)


@triton.jit
def merge_marked_kernel(marked, lists, ids, sequences_ptr, number, C: tl.constexpr):
    """The ids of the first rows of a RowList from their lists. Grid (rows)."""
    row = tl.program_id(0)
    if row >= tl.load(marked.count):
        return
    found = tl.load(marked.rows + row)
    place = ids_place(ids, load_sequence(sequences_ptr, number).batch, found % C.num_kv_heads, found // C.num_kv_heads)
    merge_ids(lists.keys + row * lists.num_lists * C.lists.kept, lists.num_lists, ids.ptr + place, True, C)
