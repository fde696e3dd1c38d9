"""The rows that are not certain, scored in 16 bits as `selection.kernel` scores tiles of neighbouring rows."""

import triton
import triton.language as tl

from ...common.records import load_sequence
from ..kernel import Seen, rank_tile
from ..scoring import IndexKeys, QueryTile, tile_rows


@triton.jit
def marked_kernel(index_q, index_k, pages, marked, sequences_ptr, number, forced, outputs, C: tl.constexpr):
    """The ids of the rows of a RowList, all of one sequence. Programs without rows return at once."""
    first = tl.program_id(0) * C.rows
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
