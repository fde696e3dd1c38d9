"""The kernels of a selection certified from int8 scores, as a prototype: see `benchmarks/gpu_selection_8_bits.py`.

Rows are token * groups + group, and a block sees whole blocks before the row's own. Rough scores and their bounds are
divided by the scale of the row's query. Tiles are [blocks, words, 32 rows], so that a
thread has several rows of a block, whose bits make a word in few steps.
"""

# Kernels let tuples grow, which is another type to mypy each time.
# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flexmsa.kernels.triton.selection.topk import EMPTY_KEY, ID_MASK, ascending, key_scores, pack_keys

BLOCK = tl.constexpr(128)
# Places for the blocks of a row to score again.
PLACES = tl.constexpr(96)
# Of the bound, 2 / sqrt(128).
DOUBT = tl.constexpr(0.1768)


class Chunk(NamedTuple):
    """The rows of a pass: first, and number in words of 32, and the tokens of the sequence."""

    first: Any
    words: Any
    seqlen: Any


class Rows(NamedTuple):
    """What is known of each row of a chunk: low; near, the number of blocks to score again; used, of those in their
    places [PLACES, rows]; over [rows / 32], bits of the rows with too many."""

    low: Any
    near: Any
    used: Any
    places: Any
    over: Any


class Lists(NamedTuple):
    """The rows that score each block again: entries, of which a block has lengths [N] from begins [N]; their total."""

    entries: Any
    begins: Any
    lengths: Any
    total: Any


@triton.jit
def scan_kernel(q_ptr, key_tiles, maxima_ptr, chunk, GROUPS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    """maxima [N, rows] int16: the largest products of each row with each block before its own, over 64."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, d = tile * 128 + tl.arange(0, 128), tl.arange(0, D)
    q = tl.load(q_ptr + (chunk.first + row)[:, None] * D + d[None, :])
    own = (chunk.first + tile * 128) // GROUPS // BLOCK
    for block in tl.range(0, own, num_stages=STAGES):
        best = tl.max(tl.dot(q, tl.trans(key_tiles.load([block * BLOCK, 0])), out_dtype=tl.int32), 1)
        tl.store(maxima_ptr + tl.cast(block, tl.int64) * (chunk.words * 32) + row, (best >> 6).to(tl.int16))


@triton.jit
def rough_scores(maxima_ptr, keys, chunk, row, block, seen):
    """Rough scores [blocks, W, 32] of rows and blocks, from the middle of what a maximum may be."""
    scale = tl.load(keys.scale + block, mask=seen, other=0.0)
    at = maxima_ptr + block.to(tl.int64) * (chunk.words * 32) + row
    return tl.load(at, mask=seen, other=0).to(tl.float32) * (64 * scale) + 32 * scale


@triton.jit
def ordered(x):
    """int32 bits of fp32 numbers as int32 numbers in their order, and back."""
    return x ^ ((x >> 31) & ID_MASK)


@triton.jit
def about_best(scores, count, STEPS: tl.constexpr):
    """[1, W, 32]: the count-th largest of scores [n, W, 32], or a little less; -inf if there are fewer above that."""
    low = tl.min(tl.where(scores == float("-inf"), float("inf"), scores), 0, keep_dims=True)
    low = ordered(low.to(tl.int32, bitcast=True))
    high = ordered(tl.max(scores, 0, keep_dims=True).to(tl.int32, bitcast=True))
    for _ in range(STEPS):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        above = scores >= ordered(middle).to(tl.float32, bitcast=True)
        enough = tl.sum(above.to(tl.int32), 0, keep_dims=True) >= count
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    enough = tl.sum((scores > float("-inf")).to(tl.int32), 0, keep_dims=True) >= count
    return tl.where(enough, ordered(low).to(tl.float32, bitcast=True), float("-inf"))


@triton.jit
def choose_kernel(
    maxima_ptr,
    queries,
    keys,
    rows,
    bits_ptr,
    total_ptr,
    chunk,
    GROUPS: tl.constexpr,
    COUNT: tl.constexpr,
    WORDS: tl.constexpr,
    CLASSES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """bits [N, rows / 32]: whether a row scores a block again; and low, near and over of the rows.

    Blocks whose numbers are equal modulo CLASSES are one candidate for the threshold: the best blocks seldom are.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    if tile == 0:
        tl.store(total_ptr, 0)
    word = tile * WORDS + tl.arange(0, WORDS)[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    row = word * 32 + lane
    own = (chunk.first + tile * (WORDS * 32)) // GROUPS // BLOCK
    best = tl.full([CLASSES, WORDS, 32], float("-inf"), tl.float32)
    for first in range(0, own, CLASSES):
        block = first + tl.arange(0, CLASSES)[:, None, None]
        scores = rough_scores(maxima_ptr, keys, chunk, row, block, block < own)
        best = tl.where(block < own, tl.maximum(best, scores), best)
    at = chunk.first + row
    per_error, per_norm = tl.load(queries.per_error + at), tl.load(queries.per_norm + at)
    worst = per_error * tl.load(keys.worst) + per_norm * tl.load(keys.worst + 1)
    low = about_best(best, COUNT, 14) - worst * DOUBT
    bit = tl.full([1, 1, 32], 1, tl.int32) << lane
    wanted = tl.zeros([AHEAD, WORDS, 32], tl.int32)
    for first in range(0, own, AHEAD):
        block = first + tl.arange(0, AHEAD)[:, None, None]
        seen = block < own
        error, norm = (
            tl.load(keys.error + block, mask=seen, other=0.0),
            tl.load(keys.norm + block, mask=seen, other=0.0),
        )
        bound = per_error * error + (per_norm * norm + 33 * tl.load(keys.scale + block, mask=seen, other=0.0))
        near = (rough_scores(maxima_ptr, keys, chunk, row, block, seen) + bound >= low) & seen
        bits = tl.sum(tl.where(near, bit, 0), 2, keep_dims=True)
        tl.store(bits_ptr + block.to(tl.int64) * chunk.words + word, bits, mask=seen)
        wanted += near.to(tl.int32)
    near = tl.sum(wanted, 0, keep_dims=True)
    tl.store(rows.low + row, low)
    tl.store(rows.near + row, near)
    tl.store(rows.used + row, tl.zeros([1, WORDS, 32], tl.int32))
    tl.store(rows.over + word, tl.sum(tl.where(near > PLACES, bit, 0), 2, keep_dims=True))


@triton.jit
def count_bits(x):
    """The bits of int32 numbers that are 1."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + ((x >> 4) & 0x0F0F0F0F)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def list_kernel(bits_ptr, over_ptr, lists, chunk, GROUPS: tl.constexpr, WORDS: tl.constexpr):
    """The rows that score a block again, ascending."""
    block = tl.program_id(0)
    start = tl.maximum((block + 1) * BLOCK * GROUPS - chunk.first, 0) // 32
    at = bits_ptr + block.to(tl.int64) * chunk.words
    counts = tl.zeros([WORDS], tl.int32)
    for first in range(start, chunk.words, WORDS):
        word = first + tl.arange(0, WORDS)
        over = tl.load(over_ptr + word, mask=word < chunk.words, other=0)
        counts += count_bits(tl.load(at + word, mask=word < chunk.words, other=0) & ~over)
    length = tl.sum(counts, 0)
    begin = tl.atomic_add(lists.total, length, sem="relaxed")
    tl.store(lists.begins + block, begin)
    tl.store(lists.lengths + block, length)
    for first in range(start, chunk.words, WORDS):
        word = first + tl.arange(0, WORDS)
        over = tl.load(over_ptr + word, mask=word < chunk.words, other=0)
        bits = tl.load(at + word, mask=word < chunk.words, other=0) & ~over
        count = count_bits(bits)
        place = begin + tl.cumsum(count, 0) - count
        for i in range(0, tl.max(count, 0)):
            tl.store(lists.entries + place + i, word * 32 + count_bits((bits & (0 - bits)) - 1), mask=bits != 0)
            bits = bits & (bits - 1)
        begin += tl.sum(count, 0)


@triton.jit
def again_kernel(
    q_ptr, k_ptr, lists, rows, chunk, GROUPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr
):
    """Scores of 16 bits of the listed rows and a block, into their next places."""
    block = tl.program_id(1)
    length = tl.load(lists.lengths + block)
    d, column = tl.arange(0, D), tl.arange(0, BLOCK)
    if tl.program_id(0) * ROWS >= length:
        return
    entries = lists.entries + tl.load(lists.begins + block)
    k = tl.load(k_ptr + (block * BLOCK + column)[:, None] * D + d[None, :])
    for first in tl.range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS, num_stages=STAGES):
        number = first + tl.arange(0, ROWS)
        own = tl.load(entries + number, mask=number < length, other=0)
        row = chunk.first + own
        place = (row % GROUPS).to(tl.int64) * chunk.seqlen + row // GROUPS
        q = tl.load(q_ptr + place[:, None] * D + d[None, :])
        best = tl.max(tl.dot(q, tl.trans(k)), 1)
        spot = tl.atomic_add(rows.used + own, 1, mask=number < length, sem="relaxed").to(tl.int64)
        spot = spot * (chunk.words * 32) + own
        tl.store(rows.places + spot, pack_keys(best, tl.zeros([ROWS], tl.int32) + block), mask=number < length)


@triton.jit
def certify_kernel(
    rows, scale_ptr, ids_ptr, marked_ptr, chunk, GROUPS: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr
):
    """ids [GROUPS, S, COUNT + 1], and whether a row is not certified."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = (chunk.first + row) // GROUPS // BLOCK
    near = tl.load(rows.near + row)
    keys = ()
    for _ in tl.static_range(COUNT):
        keys += (tl.full([ROWS], 0, tl.int64) + EMPTY_KEY,)
    for place in range(0, tl.max(tl.where(near <= PLACES, near, 0), 0)):
        at = rows.places + tl.cast(place, tl.int64) * (chunk.words * 32) + row
        key = tl.load(at, mask=(place < near) & (near <= PLACES), other=EMPTY_KEY)
        longer = ()
        for rank in tl.static_range(COUNT):
            longer += (tl.maximum(keys[rank], key),)
            key = tl.minimum(keys[rank], key)
        keys = longer
    low = tl.load(rows.low + row) * (tl.load(scale_ptr + chunk.first + row) * 0.5)
    enough = key_scores(keys[COUNT - 1]) >= low
    ids = ()
    for rank in tl.static_range(COUNT):
        ids += (tl.where(keys[rank] == EMPTY_KEY, ID_MASK, (keys[rank] & ID_MASK).to(tl.int32) ^ ID_MASK),)
    ids = ascending(ids, COUNT)
    at = ids_ptr + ((row % GROUPS).to(tl.int64) * chunk.seqlen + (chunk.first + row) // GROUPS) * (COUNT + 1)
    for rank in tl.static_range(COUNT):
        tl.store(at + rank, tl.where(ids[rank] != ID_MASK, ids[rank], tl.where(rank == own, own, -1)))
    tl.store(at + COUNT, tl.where(own >= COUNT, own, -1))
    certified = (near <= PLACES) & ((own <= COUNT) | enough)
    # 1: the guess was too high; 2: too many blocks are near.
    tl.store(marked_ptr + chunk.first + row, tl.where(certified, 0, tl.where(near > PLACES, 2, 1)).to(tl.int8))
