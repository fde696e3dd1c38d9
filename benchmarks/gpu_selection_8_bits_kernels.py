"""The kernels of a selection certified from int8 scores, as a prototype: see `benchmarks/gpu_selection_8_bits.py`.

Rows are token * groups + group, and a block sees whole blocks before the row's own. Rough scores and their bounds are
divided by the scale of the row's query. A tile is 128 rows, as [4, 32]: a warp's row of 32 makes a word of bits.
"""

# Kernels let tuples grow, which is another type to mypy each time.
# mypy: disable-error-code="assignment"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flexmsa.kernels.triton.selection.topk import EMPTY_KEY, ID_MASK, ascending, key_scores, pack_keys

BLOCK = tl.constexpr(128)
# Places for blocks of a row: the sure ones, and those to score again.
PLACES = tl.constexpr(64)
# Of the bound, 2 / sqrt(128).
DOUBT = tl.constexpr(0.1768)


class Chunk(NamedTuple):
    """The rows of a pass: first and number, and the tokens of the sequence."""

    first: Any
    rows: Any
    seqlen: Any


class Rows(NamedTuple):
    """What is known of each row of a chunk: low and high; near, the number of blocks that are sure or scored again, and
    used, of those in their places [PLACES, rows]; over [rows / 32], bits of the rows with too many."""

    low: Any
    high: Any
    near: Any
    used: Any
    places: Any
    over: Any


@triton.jit
def scan_kernel(q_ptr, key_tiles, maxima_ptr, chunk, GROUPS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr):
    """maxima [N, rows] int16: the largest products of each row with each block before its own, over 64."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row, d = tile * 128 + tl.arange(0, 128), tl.arange(0, D)
    q = tl.load(q_ptr + (chunk.first + row)[:, None] * D + d[None, :])
    own = (chunk.first + tile * 128) // GROUPS // BLOCK
    for block in tl.range(0, own, num_stages=STAGES):
        best = tl.max(tl.dot(q, tl.trans(key_tiles.load([block * BLOCK, 0])), out_dtype=tl.int32), 1)
        tl.store(maxima_ptr + tl.cast(block, tl.int64) * chunk.rows + row, (best >> 6).to(tl.int16))


@triton.jit
def rough_scores(maxima_ptr, keys, chunk, row, block, seen):
    """Rough scores of rows and a block, from the middle of what a maximum may be; -inf if it is not `seen`."""
    scale = tl.load(keys.scale + block, mask=seen, other=0.0)
    found = tl.load(maxima_ptr + tl.cast(block, tl.int64) * chunk.rows + row, mask=seen, other=0)
    return tl.where(seen, (found.to(tl.float32) * 64 + 32) * scale, float("-inf"))


@triton.jit
def num_groups(own, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """Groups of PARTS blocks of a tile with `own` blocks, if these are many; blocks behind them are groups alone."""
    return tl.where(own > 2 * COUNT * PARTS, own // PARTS, 0)


@triton.jit
def group_kernel(
    maxima_ptr,
    keys,
    best_ptr,
    chunk,
    GROUPS: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    EACH: tl.constexpr,
):
    """best [groups, rows]: the largest rough score of each group of blocks, which lie far from each other."""
    row = tl.program_id(0) * 128 + tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    own = (chunk.first + tl.program_id(0) * 128) // GROUPS // BLOCK
    number = num_groups(own, COUNT, PARTS)
    first = tl.program_id(1) * EACH
    for group in range(first, tl.minimum(first + EACH, number)):
        every = ()
        for part in tl.static_range(PARTS):
            every += (rough_scores(maxima_ptr, keys, chunk, row, part * number + group, group < number),)
        best = every[0]
        for part in tl.static_range(1, PARTS):
            best = tl.maximum(best, every[part])
        tl.store(best_ptr + tl.cast(group, tl.int64) * chunk.rows + row, best)


@triton.jit
def insert_score(scores, score):
    """The best scores of each row, a tuple, best first, with one more."""
    longer = ()
    for rank in tl.static_range(len(scores)):
        longer += (tl.maximum(scores[rank], score),)
        score = tl.minimum(scores[rank], score)
    return longer


@triton.jit
def threshold_kernel(
    maxima_ptr,
    best_ptr,
    queries,
    keys,
    rows,
    chunk,
    GROUPS: tl.constexpr,
    COUNT: tl.constexpr,
    PARTS: tl.constexpr,
    HIGHER: tl.constexpr,
):
    """low and high: the rough COUNT-th best, less and more the doubt; near and used are cleared.

    The best blocks seldom share a group: not more than COUNT - HIGHER of them in most rows.
    """
    row = tl.program_id(0) * 128 + tl.arange(0, 4)[:, None] * 32 + tl.arange(0, 32)[None, :]
    own = (chunk.first + tl.program_id(0) * 128) // GROUPS // BLOCK
    number = num_groups(own, COUNT, PARTS)
    scores = ()
    for _ in tl.static_range(COUNT):
        scores += (tl.full([4, 32], float("-inf"), tl.float32),)
    for first in range(0, number, 8):
        every = ()
        for step in tl.static_range(8):
            at = best_ptr + tl.cast(first + step, tl.int64) * chunk.rows + row
            every += (tl.load(at, mask=first + step < number, other=float("-inf")),)
        for step in tl.static_range(8):
            scores = insert_score(scores, every[step])
    for first in range(PARTS * number, own, 4):
        every = ()
        for step in tl.static_range(4):
            every += (rough_scores(maxima_ptr, keys, chunk, row, first + step, first + step < own),)
        for step in tl.static_range(4):
            scores = insert_score(scores, every[step])
    at = chunk.first + row
    bound = tl.load(queries.per_error + at) * tl.load(keys.worst) + tl.load(queries.per_norm + at) * tl.load(
        keys.worst + 1
    )
    tl.store(rows.low + row, scores[COUNT - 1] - bound * DOUBT)
    tl.store(rows.high + row, scores[HIGHER] + bound * DOUBT)
    tl.store(rows.near + row, 0)
    tl.store(rows.used + row, 0)


@triton.jit
def mark_kernel(
    maxima_ptr, queries, keys, rows, bits_ptr, chunk, GROUPS: tl.constexpr, EACH: tl.constexpr, AHEAD: tl.constexpr
):
    """bits [N, rows / 32]: whether a row scores a block again. Sure blocks take their places."""
    tile, lane = tl.program_id(0), tl.arange(0, 32)[None, :]
    word = tile * 4 + tl.arange(0, 4)[:, None]
    row = word * 32 + lane
    own = (chunk.first + tile * 128) // GROUPS // BLOCK
    begin = tl.program_id(1) * EACH
    if begin >= own:
        return
    per_error, per_norm = tl.load(queries.per_error + chunk.first + row), tl.load(queries.per_norm + chunk.first + row)
    low, high = tl.load(rows.low + row), tl.load(rows.high + row)
    wanted = tl.zeros([4, 32], tl.int32)
    for first in range(begin, tl.minimum(begin + EACH, own), AHEAD):
        scores = ()
        bounds = ()
        for step in tl.static_range(AHEAD):
            block, seen = first + step, first + step < own
            scores += (rough_scores(maxima_ptr, keys, chunk, row, block, seen),)
            bound = per_error * tl.load(keys.error + block, mask=seen, other=0.0)
            bound += per_norm * tl.load(keys.norm + block, mask=seen, other=0.0)
            bounds += (bound + 33 * tl.load(keys.scale + block, mask=seen, other=0.0),)
        for step in tl.static_range(AHEAD):
            block = first + step
            near = (scores[step] + bounds[step] >= low) & (block < own)
            sure = near & (scores[step] - bounds[step] > high)
            place = tl.atomic_add(rows.used + row, 1, mask=sure, sem="relaxed")
            key = pack_keys(tl.full([4, 32], float("inf"), tl.float32), tl.zeros([4, 32], tl.int32) + block)
            tl.store(rows.places + place.to(tl.int64) * chunk.rows + row, key, mask=sure & (place < PLACES))
            bits = tl.sum((near & (sure == 0)).to(tl.int32) << lane, 1, keep_dims=True)
            tl.store(bits_ptr + tl.cast(block, tl.int64) * (chunk.rows // 32) + word, bits, mask=block < own)
            wanted += near.to(tl.int32)
    tl.atomic_add(rows.near + row, wanted, sem="relaxed")


@triton.jit
def over_kernel(rows):
    """The bits of rows that need more than PLACES."""
    word = tl.program_id(0) * 32 + tl.arange(0, 32)[:, None]
    lane = tl.arange(0, 32)[None, :]
    over = tl.load(rows.near + word * 32 + lane) > PLACES
    tl.store(rows.over + word, tl.sum(over.to(tl.int32) << lane, 1, keep_dims=True))


@triton.jit
def count_bits(x):
    """The bits of int32 numbers that are 1."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + ((x >> 4) & 0x0F0F0F0F)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def list_kernel(bits_ptr, over_ptr, entries_ptr, lengths_ptr, chunk, GROUPS: tl.constexpr, WORDS: tl.constexpr):
    """The rows that score a block again, ascending, in entries [N, rows], of which there are lengths [N]."""
    block = tl.program_id(0)
    start = tl.maximum((block + 1) * BLOCK * GROUPS - chunk.first, 0) // 32
    words = chunk.rows // 32
    base = entries_ptr + block.to(tl.int64) * chunk.rows
    total = 0
    for first in range(start, words, WORDS):
        word = first + tl.arange(0, WORDS)
        bits = tl.load(bits_ptr + block.to(tl.int64) * words + word, mask=word < words, other=0)
        bits = bits & ~tl.load(over_ptr + word, mask=word < words, other=0)
        count = count_bits(bits)
        place = total + tl.cumsum(count, 0) - count
        for i in range(0, tl.max(count, 0)):
            tl.store(base + place + i, word * 32 + count_bits((bits & (0 - bits)) - 1), mask=bits != 0)
            bits = bits & (bits - 1)
        total += tl.sum(count, 0)
    tl.store(lengths_ptr + block, total)


@triton.jit
def again_kernel(
    q_ptr,
    k_ptr,
    entries_ptr,
    lengths_ptr,
    rows,
    chunk,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of 16 bits of the listed rows and a block, into their next places."""
    block = tl.program_id(1)
    length = tl.load(lengths_ptr + block)
    d, column = tl.arange(0, D), tl.arange(0, BLOCK)
    if tl.program_id(0) * ROWS >= length:
        return
    k = tl.load(k_ptr + (block * BLOCK + column)[:, None] * D + d[None, :])
    for first in tl.range(tl.program_id(0) * ROWS, length, tl.num_programs(0) * ROWS, num_stages=STAGES):
        number = first + tl.arange(0, ROWS)
        own = tl.load(entries_ptr + block.to(tl.int64) * chunk.rows + number, mask=number < length, other=0)
        row = chunk.first + own
        place = (row % GROUPS).to(tl.int64) * chunk.seqlen + row // GROUPS
        q = tl.load(q_ptr + place[:, None] * D + d[None, :])
        best = tl.max(tl.dot(q, tl.trans(k)), 1)
        spot = tl.atomic_add(rows.used + own, 1, mask=number < length, sem="relaxed").to(tl.int64) * chunk.rows + own
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
    for _ in tl.static_range(COUNT + 1):
        keys += (tl.full([ROWS], 0, tl.int64) + EMPTY_KEY,)
    for place in range(0, tl.minimum(tl.max(near, 0), PLACES)):
        at = rows.places + tl.cast(place, tl.int64) * chunk.rows + row
        key = tl.load(at, mask=(place < near) & (near <= PLACES), other=EMPTY_KEY)
        longer = ()
        for rank in tl.static_range(COUNT + 1):
            longer += (tl.maximum(keys[rank], key),)
            key = tl.minimum(keys[rank], key)
        keys = longer
    scale = tl.load(scale_ptr + chunk.first + row) * 0.5
    low, high = tl.load(rows.low + row) * scale, tl.load(rows.high + row) * scale
    enough = (key_scores(keys[COUNT - 1]) >= low) & (key_scores(keys[COUNT]) <= high)
    ids = ()
    for rank in tl.static_range(COUNT):
        ids += (tl.where(keys[rank] == EMPTY_KEY, ID_MASK, (keys[rank] & ID_MASK).to(tl.int32) ^ ID_MASK),)
    ids = ascending(ids, COUNT)
    at = ids_ptr + ((row % GROUPS).to(tl.int64) * chunk.seqlen + (chunk.first + row) // GROUPS) * (COUNT + 1)
    for rank in tl.static_range(COUNT):
        tl.store(at + rank, tl.where(ids[rank] != ID_MASK, ids[rank], tl.where(rank == own, own, -1)))
    tl.store(at + COUNT, tl.where(own >= COUNT, own, -1))
    certified = (near <= PLACES) & ((own <= COUNT) | enough)
    tl.store(marked_ptr + chunk.first + row, (certified == 0).to(tl.int8))
