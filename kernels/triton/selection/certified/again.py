"""Scores of 16 bits of the blocks that are left, in key-major order: a list of rows per block, and their products."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...common.records import Place, load_sequence
from ..scoring import IndexKeys, load_keys, masked_maximum, score_keys
from ..topk import pack_keys
from .rows import TILE, load_rows, ranked_end, visible_keys

# Words of bits that are looked at at once.
SPAN = tl.constexpr(1024)
# Rows of a product.
ROWS = tl.constexpr(128)


class BlockLists(NamedTuple):
    """The rows that score each block again: entries, of which a block has lengths [N] from begins [N]; their total."""

    entries: Any
    begins: Any
    lengths: Any
    total: Any


@triton.jit
def count_bits(x):
    """The bits of int32 numbers that are 1."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + ((x >> 4) & 0x0F0F0F0F)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def load_bits(bits_ptr, over_ptr, block, word, sequence, tokens, forced, C: tl.constexpr):
    """The bits of words of a block, of rows that have room for all their blocks."""
    words = tokens.tiles * (TILE // 32)
    visible = visible_keys(sequence, tokens, word * 32 + 31, C)
    stored = (word < words) & (block < ranked_end(visible, forced, C))
    bits = tl.load(bits_ptr + block.to(tl.int64) * words + word, mask=stored, other=0)
    return bits & ~tl.load(over_ptr + word, mask=stored, other=0)


@triton.jit
def list_kernel(bits_ptr, over_ptr, lists, sequences_ptr, tokens, forced, C: tl.constexpr):
    """The rows that score a block again, ascending. Grid (blocks,)."""
    block = tl.program_id(0)
    sequence = load_sequence(sequences_ptr, tokens.sequence)
    words = tokens.tiles * (TILE // 32)
    counts = tl.zeros([SPAN], tl.int32)
    for first in range(0, words, SPAN):
        word = first + tl.arange(0, SPAN)
        counts += count_bits(load_bits(bits_ptr, over_ptr, block, word, sequence, tokens, forced, C))
    length = tl.where(block < forced.num_init, 0, tl.sum(counts, 0))
    begin = tl.atomic_add(lists.total, length, sem="relaxed")
    tl.store(lists.begins + block, begin)
    tl.store(lists.lengths + block, length)
    for first in range(0, tl.where(length > 0, words, 0), SPAN):
        word = first + tl.arange(0, SPAN)
        bits = load_bits(bits_ptr, over_ptr, block, word, sequence, tokens, forced, C)
        count = count_bits(bits)
        place = begin + tl.cumsum(count, 0) - count
        for i in range(0, tl.max(count, 0)):
            tl.store(lists.entries + place + i, word * 32 + count_bits((bits & (0 - bits)) - 1), mask=bits != 0)
            bits = bits & (bits - 1)
        begin += tl.sum(count, 0)


@triton.jit
def again_kernel(index_q, index_k, lists, rows, sequences_ptr, tokens, forced, C: tl.constexpr):
    """Scores of the listed rows and a block, as keys in the rows' next places. Grid (blocks, shares of a list)."""
    block = tl.program_id(0)
    length = tl.load(lists.lengths + block)
    if tl.program_id(1) * ROWS >= length:
        return
    sequence = load_sequence(sequences_ptr, tokens.sequence)
    start, num_keys = sequence.k_start + block * C.block_size, sequence.k_end - sequence.k_start
    count = tl.minimum(num_keys - block * C.block_size, C.block_size)
    k = load_keys(IndexKeys(index_k, None, None, 0), Place(sequence.batch, start), count, C.block_size, False, C)
    entries = lists.entries + tl.load(lists.begins + block)
    for first in tl.range(tl.program_id(1) * ROWS, length, tl.num_programs(1) * ROWS, num_stages=2):
        number = first + tl.arange(0, ROWS)
        row = tl.load(entries + number, mask=number < length, other=0)
        q = load_rows(index_q, sequence.batch, tokens, row, number < length, C)
        visible = visible_keys(sequence, tokens, row, C)
        best = masked_maximum(score_keys(q, k, 1.0, False, C), block, visible, forced, C)
        place = tl.atomic_add(rows.used + row, 1, mask=number < length, sem="relaxed")
        at = rows.places + place.to(tl.int64) * (tokens.tiles * TILE) + row
        tl.store(at, pack_keys(best, tl.zeros([ROWS], tl.int32) + block), mask=number < length)
