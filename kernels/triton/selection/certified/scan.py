"""The scan: the largest int8 product of each row with each block."""

import triton
import triton.language as tl

from ...common.records import Place, load_sequence
from ..scoring import IndexKeys, load_keys
from .rows import TILE, scanned_end


@triton.jit
def scan_kernel(numbers_ptr, key_numbers, maxima_ptr, sequences_ptr, tokens, forced, C: tl.constexpr):
    """maxima [blocks, rows] int16, over 64: a product of 128 numbers is below 2^21."""
    tl.static_assert(C.head_dim == C.depth and C.depth <= 128 and C.columns == C.block_size, "Di is a power of two")
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, d = tile * TILE + tl.arange(0, TILE), tl.arange(0, C.depth)
    sequence = load_sequence(sequences_ptr, tokens.sequence)
    q = tl.load(numbers_ptr + row.to(tl.int64)[:, None] * C.depth + d[None, :])
    keys = IndexKeys(key_numbers, None, None, 0)
    end = scanned_end(sequence, tokens, tile * TILE, forced, C)
    for block in tl.range(forced.num_init, end, num_stages=4):
        place = Place(sequence.batch, sequence.k_start + block * C.block_size)
        k = load_keys(keys, place, C.block_size, C.block_size, True, C)
        best = tl.max(tl.dot(q, tl.trans(k), out_dtype=tl.int32), 1)
        tl.store(maxima_ptr + tl.cast(block, tl.int64) * (tokens.tiles * TILE) + row, (best >> 6).to(tl.int16))
