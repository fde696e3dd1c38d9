"""The choice of the blocks of each row that are scored again, from rough scores.

A program has 32 rows, in tiles [blocks, 32 rows]: a thread has several rows of a block, whose bits make a word in few
steps.
"""

import triton
import triton.language as tl

from ...common.records import load_sequence
from ..topk import ID_MASK
from .rows import PLACES, TILE, ranked_end, scanned_end, visible_keys

# Blocks whose numbers are equal modulo this are one candidate for the threshold: of the best blocks, few are.
CLASSES = tl.constexpr(128)
# Blocks that are compared with the threshold at once.
AHEAD = tl.constexpr(64)
# Halvings of the range that the threshold is in: to a few thousandths of it.
HALVINGS = tl.constexpr(14)
# How far the threshold of 16 bits may be below that of 8, in mean bounds over the root of Di. Too small a number marks
# more rows, and makes none wrong.
DOUBT = tl.constexpr(3.0)


@triton.jit
def rough_scores(maxima_ptr, scale, tokens, row, block, seen):
    """Rough scores [blocks, 32] of rows and blocks, from the middle of what a maximum may be."""
    at = maxima_ptr + block.to(tl.int64) * (tokens.tiles * TILE) + row
    return tl.load(at, mask=seen, other=0).to(tl.float32) * (64 * scale) + 32 * scale


@triton.jit
def ordered(x):
    """int32 bits of fp32 numbers as int32 numbers in their order, and back."""
    return x ^ ((x >> 31) & ID_MASK)


@triton.jit
def about_best(scores, count):
    """[1, 32]: the count-th largest of scores [n, 32], or a little less; -inf where there are fewer above -inf."""
    low = tl.min(tl.where(scores == float("-inf"), float("inf"), scores), 0, keep_dims=True)
    low = ordered(low.to(tl.int32, bitcast=True))
    high = ordered(tl.max(scores, 0, keep_dims=True).to(tl.int32, bitcast=True))
    for _ in range(HALVINGS):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = scores >= ordered(middle).to(tl.float32, bitcast=True)
        enough = tl.sum(above.to(tl.int32), 0, keep_dims=True) >= count
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    enough = tl.sum((scores > float("-inf")).to(tl.int32), 0, keep_dims=True) >= count
    return tl.where(enough, ordered(low).to(tl.float32, bitcast=True), float("-inf"))


@triton.jit
def guess_low(maxima_ptr, queries, blocks, sequence, tokens, row, end, forced, C: tl.constexpr):
    """[1, 32]: a number that the scores of all selected blocks of a row will be above, if the guess is right."""
    best = tl.full([CLASSES, 32], float("-inf"), tl.float32)
    for first in range(forced.num_init, end, CLASSES):
        block = first + tl.arange(0, CLASSES)[:, None]
        scale = tl.load(blocks.scale + tokens.sequence * blocks.num_blocks + block, mask=block < end, other=0.0)
        scores = rough_scores(maxima_ptr, scale, tokens, row, block, block < end)
        best = tl.where(block < end, tl.maximum(best, scores), best)
    sums = blocks.sums + tokens.sequence * 2
    mean = tl.load(queries.per_error + row) * tl.load(sums) + tl.load(queries.per_norm + row) * tl.load(sums + 1)
    mean /= tl.maximum((sequence.k_end - sequence.k_start) // C.block_size, 1).to(tl.float32)
    return about_best(best, C.topk - forced.num_local - forced.num_init) - mean * (DOUBT * C.depth**-0.5)


@triton.jit
def choose_kernel(
    maxima_ptr, queries, blocks, rows, bits_ptr, total_ptr, sequences_ptr, tokens, forced, C: tl.constexpr
):
    """bits [blocks, rows / 32]: whether a row scores a block again; and low, near, used and over of the rows."""
    word = tl.num_programs(0) - 1 - tl.program_id(0)
    if word == 0:
        tl.store(total_ptr, 0)
    lane = tl.arange(0, 32)[None, :]
    row = word * 32 + lane
    sequence = load_sequence(sequences_ptr, tokens.sequence)
    end = scanned_end(sequence, tokens, word * 32, forced, C)
    low = guess_low(maxima_ptr, queries, blocks, sequence, tokens, row, end, forced, C)
    per_error, per_norm = tl.load(queries.per_error + row), tl.load(queries.per_norm + row)

    visible = visible_keys(sequence, tokens, row, C)
    # Others keep all that they see.
    ranked = (row < tokens.count * C.num_kv_heads) & (visible > C.topk * C.block_size)
    last = tl.where(ranked, ranked_end(visible, forced, C), 0)
    stored = ranked_end(visible_keys(sequence, tokens, word * 32 + 31, C), forced, C)
    bit = tl.full([1, 32], 1, tl.int32) << lane
    wanted = tl.zeros([AHEAD, 32], tl.int32)
    for first in range(forced.num_init, stored, AHEAD):
        block = first + tl.arange(0, AHEAD)[:, None]
        scanned = block < end
        at = tokens.sequence * blocks.num_blocks + block
        scale = tl.load(blocks.scale + at, mask=scanned, other=0.0)
        bound = per_norm * tl.load(blocks.norm + at, mask=scanned, other=0.0) + 33 * scale
        bound += per_error * tl.load(blocks.error + at, mask=scanned, other=0.0)
        # A bound may be NaN, and rules nothing out then.
        out = scanned & (rough_scores(maxima_ptr, scale, tokens, row, block, scanned) + bound < low)
        near = (out == 0) & (block < last)
        bits = tl.sum(tl.where(near, bit, 0), 1, keep_dims=True)
        tl.store(bits_ptr + block.to(tl.int64) * (tokens.tiles * (TILE // 32)) + word, bits, mask=block < stored)
        wanted += near.to(tl.int32)
    near = tl.sum(wanted, 0, keep_dims=True)
    tl.store(rows.low + row, low)
    tl.store(rows.near + row, near)
    tl.store(rows.used + row, tl.zeros([1, 32], tl.int32))
    tl.store(rows.over + word, tl.sum(tl.sum(tl.where(near > PLACES, bit, 0), 1), 0))
