"""The best blocks of each row from its scores of 16 bits, and whether they are certain."""

# Kernels let tuples grow, which is another type to mypy each time.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

from ...common.records import load_sequence
from ..topk import EMPTY_KEY, ID_MASK, ascending, ids_place, key_scores, pack_keys
from .quantise import half_log2
from .rows import PLACES, TILE, visible_keys


@triton.jit
def insert_key(keys, key):
    """A tuple of keys [rows], descending, with one more in its place and without its last."""
    longer = ()
    for rank in tl.static_range(len(keys)):
        longer += (tl.maximum(keys[rank], key),)
        key = tl.minimum(keys[rank], key)
    return longer


@triton.jit
def kept_anyway(rank, visible, forced, C: tl.constexpr):
    """The rank-th block that rows keep whatever it scores, -1 where there is none."""
    newest = tl.where(visible > 0, (visible - 1) // C.block_size, -1)
    block = tl.where(rank < forced.num_init, rank, newest - (rank - forced.num_init))
    block = tl.where(rank < forced.num_init + forced.num_local, block, -1)
    return tl.where(newest < C.topk, tl.where(rank <= newest, rank, -1), block)


@triton.jit
def certify_kernel(rows, scale_ptr, ids, marked, sequences_ptr, tokens, forced, C: tl.constexpr):
    """The ids of certified rows; the others are added to the RowList `marked`."""
    # Triton 3.6 takes a field that is not a number for a constant only if it has a name of its own.
    topk: tl.constexpr = C.topk
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    sequence = load_sequence(sequences_ptr, tokens.sequence)
    visible = visible_keys(sequence, tokens, row, C)
    near = tl.load(rows.near + row)
    over = near > PLACES
    keys = ()
    for _ in tl.static_range(topk):
        keys += (tl.full([TILE], 0, tl.int64) + EMPTY_KEY,)
    for rank in range(topk):
        block = kept_anyway(rank, visible, forced, C)
        forced_key = pack_keys(tl.full([TILE], float("inf"), tl.float32), block)
        keys = insert_key(keys, tl.where(block >= 0, forced_key, EMPTY_KEY))
    for place in range(0, tl.max(tl.where(over, 0, near), 0)):
        at = rows.places + tl.cast(place, tl.int64) * (tokens.tiles * TILE) + row
        keys = insert_key(keys, tl.load(at, mask=(place < near) & (over == 0), other=EMPTY_KEY))

    grown: tl.constexpr = C.depth / 4.0 ** half_log2(C.depth)
    low = tl.load(rows.low + row) * (tl.load(scale_ptr + row) / grown)
    certified = (over == 0) & ((visible <= topk * C.block_size) | (key_scores(keys[topk - 1]) >= low))
    live = row < tokens.count * C.num_kv_heads
    token, group = tokens.first + row // C.num_kv_heads, row % C.num_kv_heads
    found = ()
    for rank in tl.static_range(topk):
        found += (tl.where(keys[rank] == EMPTY_KEY, ID_MASK, (keys[rank] & ID_MASK).to(tl.int32) ^ ID_MASK),)
    found = ascending(found, topk)
    at = ids.ptr + ids_place(ids, sequence.batch, group, token)
    for rank in tl.static_range(topk):
        tl.store(at + rank, tl.where(found[rank] == ID_MASK, -1, found[rank]), mask=live & certified)

    left = (live & (certified == 0)).to(tl.int32)
    begin = tl.atomic_add(marked.count, tl.sum(left, 0), sem="relaxed")
    tl.store(marked.rows + begin + tl.cumsum(left, 0) - left, token * C.num_kv_heads + group, mask=left != 0)
