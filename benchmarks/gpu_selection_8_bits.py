"""The parts of a selection certified from int8 scores, on a GPU: `python -m benchmarks.gpu_selection_8_bits`.

docs/notes/selection-8-bits.md describes the steps, docs/math.md the bounds, `benchmarks/selection_8_bits.py` the same in
plain PyTorch. One sequence, whole blocks, one forced newest block; rows are token * groups + group. Rough scores and
their bounds are divided by the scale of the row's query. Marked rows are counted, not scored.
"""

import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import flexmsa
from flexmsa.kernels.triton.common.launch import Launch, Options
from flexmsa.kernels.triton.selection.topk import EMPTY_KEY, ID_MASK, ascending, key_scores, pack_keys

BLOCK = tl.constexpr(128)
# Places for blocks of a row: those to score again, the sure ones, and the forced one.
PLACES = tl.constexpr(64)
# The rotation is a product on tensor cores, whose sums are rougher than the tree of sums that docs/math.md allows for.
ROUNDED = tl.constexpr(2.0**-12)
SUMMED = tl.constexpr(2.0**-12)
SLACK = tl.constexpr(1 + 2.0**-10)
DOUBT = tl.constexpr(0.125)


@triton.jit
def rotate_rows(x, hadamard_ptr, D: tl.constexpr):
    """Rows [R, D] of bf16 times a Hadamard matrix of +-1, over 8: scores double."""
    d = tl.arange(0, D)
    return tl.dot(x, tl.load(hadamard_ptr + d[:, None] * D + d[None, :])) * 0.125


@triton.jit
def nearest(x):
    """x [R, D], |x| <= 127, as int8."""
    return tl.floor(x + 0.5).to(tl.int8)


@triton.jit
def quantise_queries_kernel(
    q_ptr,
    hadamard_ptr,
    numbers_ptr,
    scale_ptr,
    per_error_ptr,
    per_norm_ptr,
    seqlen,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """int8 rows of index_q [1, GROUPS, S, D]; a bound is per_error * a block's error + per_norm * its norm."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    place = (row % GROUPS).to(tl.int64) * seqlen + row // GROUPS
    x = rotate_rows(tl.load(q_ptr + place[:, None] * D + d[None, :]), hadamard_ptr, D)
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest == 0, 1.0, largest / 127)
    n = nearest(x / scale[:, None])
    rest = x - n.to(tl.float32) * scale[:, None]
    norm = tl.sqrt(tl.sum(x * x, 1))
    error = tl.sqrt(tl.sum(rest * rest, 1)) * SLACK + norm * ROUNDED
    tl.store(numbers_ptr + row[:, None] * D + d[None, :], n)
    tl.store(scale_ptr + row, scale)
    tl.store(per_error_ptr + row, (norm + error) / scale * SLACK)
    tl.store(per_norm_ptr + row, (error + norm * SUMMED) / scale * SLACK)


@triton.jit
def quantise_keys_kernel(k_ptr, hadamard_ptr, numbers_ptr, scale_ptr, error_ptr, norm_ptr, D: tl.constexpr):
    """int8 keys of index_k [S, D], with a scale, an error and a norm per block."""
    key = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    x = rotate_rows(tl.load(k_ptr + key[:, None] * D + d[None, :]), hadamard_ptr, D)
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    scale = tl.where(largest == 0, 1.0, largest / 127)
    n = nearest(x / scale)
    rest = x - n.to(tl.float32) * scale
    norm = tl.sqrt(tl.sum(x * x, 1))
    error = tl.sqrt(tl.sum(rest * rest, 1)) * SLACK + norm * ROUNDED
    tl.store(numbers_ptr + key[:, None] * D + d[None, :], n)
    tl.store(scale_ptr + tl.program_id(0), scale)
    tl.store(error_ptr + tl.program_id(0), tl.max(error, 0))
    tl.store(norm_ptr + tl.program_id(0), tl.max(norm, 0) * SLACK)


@triton.jit
def scan_kernel(
    q_ptr,
    keys,
    maxima_ptr,
    first_row,
    num_rows,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    TMA: tl.constexpr,
    STORE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """maxima [N, num_rows] int16: the largest products of rows first_row .. with each block before their own, over 64."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    d, column = tl.arange(0, D), tl.arange(0, BLOCK)
    q = tl.load(q_ptr + (first_row + row)[:, None] * D + d[None, :])
    own = (first_row + tile * ROWS) // GROUPS // BLOCK
    most = tl.full([ROWS], -(2**31), tl.int32)
    for block in tl.range(0, own, num_stages=STAGES):
        if TMA:
            k = keys.load([block * BLOCK, 0])
        else:
            k = tl.load(keys + (block * BLOCK + column)[:, None] * D + d[None, :])
        best = tl.max(tl.dot(q, tl.trans(k), out_dtype=tl.int32), 1)
        if STORE:
            tl.store(maxima_ptr + tl.cast(block, tl.int64) * num_rows + row, (best >> 6).to(tl.int16))
        else:
            most = tl.maximum(most, best)
    if not STORE:
        tl.store(maxima_ptr + row, (most >> 6).to(tl.int16))


@triton.jit
def rough_of(maxima):
    """The middle of what a stored maximum may have been."""
    return maxima.to(tl.float32) * 64 + 32


@triton.jit
def insert_score(scores, score):
    """The best scores of each row, a tuple, best first, with one more."""
    longer = ()
    for rank in tl.static_range(len(scores)):
        longer += (tl.maximum(scores[rank], score),)
        score = tl.minimum(scores[rank], score)
    return longer


@triton.jit
def load_rough(at, key_scale_ptr, block, own, num_rows):
    """Rough scores of a tile's rows and a block, if it is before block `own`."""
    seen = block < own
    scale = tl.load(key_scale_ptr + block, mask=seen, other=0.0)
    return rough_of(tl.load(at + tl.cast(block, tl.int64) * num_rows, mask=seen, other=0)) * scale


@triton.jit
def choose_kernel(
    maxima_ptr,
    key_scale_ptr,
    key_error_ptr,
    key_norm_ptr,
    per_error_ptr,
    per_norm_ptr,
    worst_ptr,
    low_ptr,
    high_ptr,
    bits_ptr,
    over_ptr,
    used_ptr,
    places_ptr,
    first_row,
    num_rows,
    GROUPS: tl.constexpr,
    COUNT: tl.constexpr,
    HIGHER: tl.constexpr,
    PARTS: tl.constexpr,
    SIDE: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """low, high [num_rows]; bits [N, num_rows / 32]: whether a row scores a block again; over: has no place for them.

    The thresholds are the rough COUNT-th best, less and more the doubt. Of many blocks, the COUNT best of the maxima of
    PARTS each, which the best blocks seldom share: not more than COUNT - HIGHER of them in most rows. Sure blocks take
    the first places of a row, `used` of them.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    lane = tl.arange(0, 32)[None, :]
    row = tile * 128 + tl.arange(0, 4)[:, None] * 32 + lane
    own = (first_row + tile * 128) // GROUPS // BLOCK
    at = maxima_ptr + row
    nothing = tl.full([4, 32], float("-inf"), tl.float32)
    scores = ()
    for rank in tl.static_range(COUNT):
        scores += (nothing,)
    number = tl.where(own > 2 * COUNT * PARTS, own // PARTS, 0)
    for i in range(0, number, SIDE):
        every = ()
        for side in tl.static_range(SIDE):
            for part in tl.static_range(PARTS):
                every += (load_rough(at, key_scale_ptr, part * number + i + side, own, num_rows),)
        for side in tl.static_range(SIDE):
            best = every[side * PARTS]
            for part in tl.static_range(1, PARTS):
                best = tl.maximum(best, every[side * PARTS + part])
            scores = insert_score(scores, tl.where(i + side < number, best, nothing))
    for block in range(PARTS * number, own):
        scores = insert_score(scores, load_rough(at, key_scale_ptr, block, own, num_rows))
    per_error, per_norm = tl.load(per_error_ptr + first_row + row), tl.load(per_norm_ptr + first_row + row)
    doubt = (per_error * tl.load(worst_ptr) + per_norm * tl.load(worst_ptr + 1)) * DOUBT
    low, high = scores[COUNT - 1] - doubt, scores[HIGHER] + doubt
    used = tl.zeros([4, 32], tl.int32)
    wanted = tl.zeros([4, 32], tl.int32)
    word = tl.arange(0, 4)[:, None]
    for begin in range(0, own, AHEAD):
        every = ()
        for step in tl.static_range(AHEAD):
            every += (load_rough(at, key_scale_ptr, begin + step, own, num_rows),)
        for step in tl.static_range(AHEAD):
            block = begin + step
            if block < own:
                bound = per_error * tl.load(key_error_ptr + block) + per_norm * tl.load(key_norm_ptr + block)
                bound += 33 * tl.load(key_scale_ptr + block)
                near = every[step] + bound >= low
                sure = near & (every[step] - bound > high)
                key = pack_keys(tl.full([4, 32], float("inf"), tl.float32), tl.zeros([4, 32], tl.int32) + block)
                spot = places_ptr + used.to(tl.int64) * num_rows + row
                tl.store(spot, key, mask=sure & (used < PLACES - 1))
                used += sure.to(tl.int32)
                wanted += near.to(tl.int32)
                bits = tl.sum((near & (sure == 0)).to(tl.int32) << lane, 1, keep_dims=True)
                tl.store(bits_ptr + tl.cast(block, tl.int64) * (num_rows // 32) + tile * 4 + word, bits)
    over = wanted > PLACES - 1
    tl.store(over_ptr + tile * 4 + word, tl.sum(over.to(tl.int32) << lane, 1, keep_dims=True))
    tl.store(used_ptr + row, tl.where(over, PLACES, used))
    tl.store(low_ptr + row, low)
    tl.store(high_ptr + row, high)


@triton.jit
def count_bits(x):
    """The bits of int32 numbers that are 1."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + ((x >> 4) & 0x0F0F0F0F)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 0xFF


@triton.jit
def list_kernel(
    bits_ptr, over_ptr, entries_ptr, lengths_ptr, first_row, num_rows, GROUPS: tl.constexpr, WORDS: tl.constexpr
):
    """The rows that score a block again, ascending, in entries [N, num_rows], of which there are lengths [N]."""
    block = tl.program_id(0)
    start = tl.maximum((block + 1) * BLOCK * GROUPS - first_row, 0) // 32
    base = entries_ptr + block.to(tl.int64) * num_rows
    total = 0
    for first in range(start, num_rows // 32, WORDS):
        word = first + tl.arange(0, WORDS)
        seen = word < num_rows // 32
        bits = tl.load(bits_ptr + block.to(tl.int64) * (num_rows // 32) + word, mask=seen, other=0)
        bits = bits & ~tl.load(over_ptr + word, mask=seen, other=0)
        count = count_bits(bits)
        place = total + tl.cumsum(count, 0) - count
        for i in range(0, tl.max(count, 0)):
            lowest = bits & (0 - bits)
            tl.store(base + place + i, word * 32 + count_bits(lowest - 1), mask=bits != 0)
            bits = bits & (bits - 1)
        total += tl.sum(count, 0)
    tl.store(lengths_ptr + block, total)


@triton.jit
def again_kernel(
    q_ptr,
    k_ptr,
    entries_ptr,
    lengths_ptr,
    used_ptr,
    places_ptr,
    seqlen,
    first_row,
    num_rows,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    SHARES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Scores of 16 bits of the listed rows and a block, into their next places."""
    block = tl.program_id(1)
    length = tl.load(lengths_ptr + block)
    d, column = tl.arange(0, D), tl.arange(0, BLOCK)
    if tl.program_id(0) * ROWS >= length:
        return
    k = tl.load(k_ptr + (block * BLOCK + column)[:, None] * D + d[None, :])
    for first in tl.range(tl.program_id(0) * ROWS, length, SHARES * ROWS, num_stages=STAGES):
        number = first + tl.arange(0, ROWS)
        own = tl.load(entries_ptr + block.to(tl.int64) * num_rows + number, mask=number < length, other=0)
        row = first_row + own
        place = (row % GROUPS).to(tl.int64) * seqlen + row // GROUPS
        q = tl.load(q_ptr + place[:, None] * D + d[None, :])
        best = tl.max(tl.dot(q, tl.trans(k)), 1)
        spot = tl.atomic_add(used_ptr + own, 1, mask=number < length, sem="relaxed").to(tl.int64) * num_rows + own
        tl.store(places_ptr + spot, pack_keys(best, tl.zeros([ROWS], tl.int32) + block), mask=number < length)


@triton.jit
def certify_kernel(
    places_ptr,
    used_ptr,
    low_ptr,
    high_ptr,
    scale_ptr,
    ids_ptr,
    marked_ptr,
    seqlen,
    first_row,
    num_rows,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
):
    """ids [GROUPS, S, COUNT + 1], and whether a row is not certified."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    own = (first_row + row) // GROUPS // BLOCK
    used = tl.load(used_ptr + row)
    filled = tl.minimum(used, PLACES - 1)
    keys = ()
    for rank in tl.static_range(COUNT + 1):
        keys += (tl.full([ROWS], 0, tl.int64) + EMPTY_KEY,)
    for place in range(0, tl.max(filled, 0)):
        key = tl.load(places_ptr + tl.cast(place, tl.int64) * num_rows + row, mask=place < filled, other=EMPTY_KEY)
        longer = ()
        for rank in tl.static_range(COUNT + 1):
            longer += (tl.maximum(keys[rank], key),)
            key = tl.minimum(keys[rank], key)
        keys = longer
    scale = tl.load(scale_ptr + first_row + row) * 0.5
    low = tl.load(low_ptr + row)
    high = tl.load(high_ptr + row) * scale
    enough = (key_scores(keys[COUNT - 1]) >= low * scale) & (key_scores(keys[COUNT]) <= high)
    good = (used < PLACES) & ((own <= COUNT) | enough)
    ids = ()
    for rank in tl.static_range(COUNT):
        ids += (tl.where(keys[rank] == EMPTY_KEY, ID_MASK, (keys[rank] & ID_MASK).to(tl.int32) ^ ID_MASK),)
    ids = ascending(ids, COUNT)
    at = ((row % GROUPS).to(tl.int64) * seqlen + (first_row + row) // GROUPS) * (COUNT + 1)
    for rank in tl.static_range(COUNT):
        tl.store(ids_ptr + at + rank, tl.where(ids[rank] != ID_MASK, ids[rank], tl.where(rank == own, own, -1)))
    tl.store(ids_ptr + at + COUNT, tl.where(own >= COUNT, own, -1))
    tl.store(marked_ptr + first_row + row, (good == 0).to(tl.int8))


@triton.jit
def decode_scan_kernel(
    q8_ptr, k8_ptr, key_scale_ptr, rough_ptr, num_blocks, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr
):
    """Rough scores [ROWS, num_blocks] of the first ROWS of 16 rows q8; every program takes every so many blocks."""
    d, column, row = tl.arange(0, D), tl.arange(0, BLOCK), tl.arange(0, 16)
    q = tl.load(q8_ptr + row[:, None] * D + d[None, :])
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=STAGES):
        k = tl.load(k8_ptr + (tl.cast(block, tl.int64) * BLOCK + column)[:, None] * D + d[None, :])
        best = tl.max(tl.dot(k, tl.trans(q), out_dtype=tl.int32), 0).to(tl.float32) * tl.load(key_scale_ptr + block)
        tl.store(rough_ptr + row * num_blocks + block, best, mask=row < ROWS)


@triton.jit
def decode_again_kernel(
    rough_ptr,
    per_error_ptr,
    per_norm_ptr,
    worst_ptr,
    q_ptr,
    k_ptr,
    places_ptr,
    num_blocks,
    EACH: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    SHARES: tl.constexpr,
    MOST: tl.constexpr,
):
    """Of one row: the threshold, and of every SHARES-th block, those near it, scored in 16 bits; at most MOST."""
    share, row = tl.program_id(0), tl.program_id(1)
    block = tl.arange(0, EACH)[:, None] * SHARES + tl.arange(0, SHARES)[None, :]
    score = tl.load(rough_ptr + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    groups = tl.max(score, 1)
    threshold = tl.max(groups, 0)
    for _ in range(COUNT - 1):
        groups = tl.where(groups == threshold, float("-inf"), groups)
        threshold = tl.max(groups, 0)
    bound = tl.load(per_error_ptr + row) * tl.load(worst_ptr) + tl.load(per_norm_ptr + row) * tl.load(worst_ptr + 1)
    own = tl.arange(0, EACH) * SHARES + share
    score = tl.load(rough_ptr + row * num_blocks + own, mask=own < num_blocks, other=float("-inf"))
    left = tl.where(score + bound * (1 + DOUBT.value) >= threshold, own, -1)
    d, column = tl.arange(0, D), tl.arange(0, BLOCK)
    q = tl.load(q_ptr + row * D + d).to(tl.float32)
    taken = 0
    mine = tl.max(left, 0)
    while (mine >= 0) & (taken < MOST):
        k = tl.load(k_ptr + (mine.to(tl.int64) * BLOCK + column)[:, None] * D + d[None, :]).to(tl.float32)
        best = tl.max(tl.sum(k * q[None, :], 1), 0)
        tl.store(places_ptr + (row * SHARES + share) * MOST + taken, pack_keys(best, mine))
        left = tl.where(left == mine, -1, left)
        mine = tl.max(left, 0)
        taken += 1


@dataclass
class Parts:
    """The launches of a selection for index_q [1, groups, S, D] and index_k [1, 1, S, D], chunk by chunk of queries."""

    index_q: Any
    index_k: Any
    chunk: int
    topk: int = 16
    scan_options: tuple[int, int, int, bool] = (128, 4, 4, True)
    again_options: tuple[int, int, int] = (128, 4, 3)
    buffers: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        _, self.groups, self.seqlen, self.depth = self.index_q.shape
        rows, blocks, device = self.groups * self.seqlen, self.seqlen // 128, self.index_q.device
        chunk_rows = self.chunk * self.groups

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        matrix = torch.ones(1, 1)
        while len(matrix) < self.depth:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        self.buffers = {
            "hadamard": matrix.to(device, self.index_q.dtype),
            "q8": empty(rows, self.depth, dtype=torch.int8),
            "k8": empty(self.seqlen, self.depth, dtype=torch.int8),
            **{name: empty(rows) for name in ("scale", "per_error", "per_norm")},
            **{name: empty(blocks) for name in ("key_scale", "key_error", "key_norm")},
            "worst": empty(2),
            "maxima": empty(blocks, chunk_rows, dtype=torch.int16),
            "entries": empty(blocks, chunk_rows, dtype=torch.int32),
            "bits": empty(blocks, chunk_rows // 32, dtype=torch.int32),
            "over": empty(chunk_rows // 32, dtype=torch.int32),
            "used": empty(chunk_rows, dtype=torch.int32),
            "lengths": empty(blocks, dtype=torch.int32),
            "places": empty(64, chunk_rows, dtype=torch.int64),
            "low": empty(chunk_rows),
            "high": empty(chunk_rows),
            "ids": empty(1, self.groups, self.seqlen, self.topk, dtype=torch.int32),
            "marked": empty(rows, dtype=torch.int8),
        }

    def launch(self, kernel: Any, grid: tuple, arguments: list, warps: int = 4, **constants: Any) -> None:
        names = [name for name in kernel.arg_names if name not in constants]
        given = dict(zip(names, arguments, strict=True))
        ordered = {name: constants[name] for name in kernel.arg_names if name in constants}
        Launch(kernel, (*grid, *(1,) * (3 - len(grid))), given, ordered, Options(warps, 3)).run()

    def quantise(self) -> None:
        b, rows = self.buffers, self.groups * self.seqlen
        outputs = [b[name] for name in ("hadamard", "q8", "scale", "per_error", "per_norm")]
        self.launch(
            quantise_queries_kernel,
            (rows // 64,),
            [self.index_q, *outputs, self.seqlen],
            GROUPS=self.groups,
            ROWS=64,
            D=self.depth,
        )
        outputs = [b[name] for name in ("hadamard", "k8", "key_scale", "key_error", "key_norm")]
        self.launch(quantise_keys_kernel, (self.seqlen // 128,), [self.index_k, *outputs], D=self.depth)
        if b["worst"].device.type != "meta":
            torch.stack((b["key_error"].amax(), b["key_norm"].amax()), out=b["worst"])

    def first_rows(self) -> range:
        return range(0, self.groups * self.seqlen, self.groups * self.chunk)

    def scan(self, first: int, store: bool = True, options: tuple[int, int, int, bool] | None = None) -> None:
        rows, warps, stages, tma = options or self.scan_options
        b, num = self.buffers, self.groups * self.chunk
        keys = (
            TensorDescriptor(b["k8"], [self.seqlen, self.depth], [self.depth, 1], [128, self.depth]) if tma else b["k8"]
        )
        arguments = [b["q8"], keys, b["maxima"], first, num]
        self.launch(
            scan_kernel,
            (num // rows,),
            arguments,
            warps,
            GROUPS=self.groups,
            ROWS=rows,
            D=self.depth,
            TMA=tma,
            STORE=store,
            STAGES=stages,
        )

    def choose(self, first: int) -> None:
        b, num = self.buffers, self.groups * self.chunk
        names = "maxima", "key_scale", "key_error", "key_norm", "per_error", "per_norm", "worst", "low", "high", "bits"
        arguments = [*(b[name] for name in (*names, "over", "used", "places")), first, num]
        parts = 4 if self.seqlen < 200_000 else 16
        constants = {"COUNT": self.topk - 1, "HIGHER": self.topk - 5, "PARTS": parts, "SIDE": 16 // parts, "AHEAD": 16}
        self.launch(choose_kernel, (num // 128,), arguments, GROUPS=self.groups, **constants)

    def list(self, first: int) -> None:
        b, num = self.buffers, self.groups * self.chunk
        arguments = [b["bits"], b["over"], b["entries"], b["lengths"], first, num]
        self.launch(list_kernel, ((first + num) // self.groups // 128,), arguments, GROUPS=self.groups, WORDS=1024)

    def again(self, first: int) -> None:
        b, num = self.buffers, self.groups * self.chunk
        rows, warps, stages = self.again_options
        blocks = (first + num) // self.groups // 128
        shares = max(1, num * 40 // (blocks * rows * 4))
        arguments = [self.index_q, self.index_k, b["entries"], b["lengths"], b["used"], b["places"], self.seqlen]
        constants = {"ROWS": rows, "D": self.depth, "SHARES": shares, "STAGES": stages}
        self.launch(again_kernel, (shares, blocks), [*arguments, first, num], warps, GROUPS=self.groups, **constants)

    def certify(self, first: int) -> None:
        b, num = self.buffers, self.groups * self.chunk
        arguments = [
            b["places"],
            b["used"],
            b["low"],
            b["high"],
            b["scale"],
            b["ids"],
            b["marked"],
            self.seqlen,
            first,
            num,
        ]
        self.launch(certify_kernel, (num // 128,), arguments, 4, GROUPS=self.groups, ROWS=128, COUNT=self.topk - 1)

    def run(self) -> None:
        self.quantise()
        for first in self.first_rows():
            self.chunk_of(first)

    def chunk_of(self, first: int) -> None:
        for step in (self.scan, self.choose, self.list, self.again, self.certify):
            step(first)


def milliseconds(call: Any, repeats: int = 5) -> float:
    """The median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def chunk_of_length(seqlen: int) -> int:
    """Queries of a chunk, whose buffers are about a GiB at most."""
    return min(seqlen, max(8192, 2**32 // seqlen))


def timed(call: Any, *arguments: Any) -> float:
    """Milliseconds of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(*arguments)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def prefill(index_q: Any, index_k: Any, title: str) -> None:
    """Print whether ids are those of bf16, and the time of each step."""
    parts = Parts(index_q, index_k, chunk_of_length(index_q.shape[2]))
    parts.run()
    wanted = flexmsa.select_blocks(index_q, index_k)
    same = (parts.buffers["ids"] == wanted).all(-1)[0]
    marked = parts.buffers["marked"].view(parts.seqlen, parts.groups).T != 0
    again = parts.buffers["lengths"].sum().item() / (parts.groups * parts.chunk)
    print(
        f"{title} {parts.seqlen}: {marked.float().mean().item():.3%} marked, {int((~same & ~marked).sum())} certified but "
        f"wrong, {int((~same & marked).sum())} marked and wrong of {same.numel()} rows; {again:.1f} again in the last chunk"
    )
    repeats = 9 if parts.seqlen < 500_000 else 1
    total = milliseconds(parts.run, repeats)
    today = milliseconds(partial(flexmsa.select_blocks, index_q, index_k), repeats)
    steps = [parts.scan, parts.choose, parts.list, parts.again, parts.certify]
    times = torch.tensor([[timed(step, first) for step in steps] for first in parts.first_rows()]).sum(0).tolist()
    found = ", ".join(f"{step.__name__} {time:.3f}" for step, time in zip(steps, times, strict=True))
    quantised = milliseconds(parts.quantise)
    print(f"  quantise {quantised:.3f}, {found}; all {total:.3f}, bf16 today {today:.3f} ms", flush=True)


def decode(num_keys: int) -> None:
    """Print the times of a decoding step's scan and second scores, in microseconds, replayed from a graph."""
    groups, depth, device = 4, 128, "cuda"
    index_q = torch.randn(1, groups, 16, depth, device=device, dtype=torch.bfloat16)
    index_k = torch.randn(1, 1, num_keys, depth, device=device, dtype=torch.bfloat16)
    parts = Parts(index_q[:, :, :16].contiguous(), index_k[:, :, :128], 16)
    blocks = num_keys // 128
    b = parts.buffers
    b |= {"k8": torch.empty(num_keys, depth, dtype=torch.int8, device=device)}
    b |= {name: torch.empty(blocks, device=device) for name in ("key_scale", "key_error", "key_norm")}
    parts.index_k, parts.seqlen = index_k, num_keys
    outputs = [b[name] for name in ("hadamard", "k8", "key_scale", "key_error", "key_norm")]
    parts.launch(quantise_keys_kernel, (blocks,), [index_k, *outputs], D=depth)
    outputs = [b[name] for name in ("hadamard", "q8", "scale", "per_error", "per_norm")]
    parts.launch(quantise_queries_kernel, (1,), [index_q, *outputs, 16], GROUPS=groups, ROWS=64, D=depth)
    worst = torch.stack((b["key_error"].amax(), b["key_norm"].amax()))
    rough = torch.zeros(16, blocks, device=device)
    places = torch.zeros(groups, 64, 8, dtype=torch.int64, device=device)
    queries = index_q[:, :, 0].contiguous()

    def scan(programs: int, stages: int) -> None:
        arguments = [b["q8"], b["k8"], b["key_scale"], rough, blocks]
        parts.launch(decode_scan_kernel, (programs,), arguments, ROWS=groups, D=depth, STAGES=stages)

    def again(shares: int, warps: int) -> None:
        arguments = [rough, b["per_error"], b["per_norm"], worst, queries, index_k, places, blocks]
        constants = {"EACH": triton.next_power_of_2(blocks) // shares, "COUNT": 15, "D": depth, "SHARES": shares}
        parts.launch(decode_again_kernel, (shares, groups), arguments, warps, **constants, MOST=8)

    def microseconds(call: Any) -> float:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                call()
        return milliseconds(graph.replay) * 50

    for programs, stages in ((132 * 3, 4), (132 * 4, 3)):
        time = microseconds(partial(scan, programs, stages))
        print(f"decode {num_keys}: scan {programs} programs {stages} stages {time:.1f} us")
    for shares, warps in ((32, 4), (32, 8), (64, 4)):
        places.zero_()
        time = microseconds(partial(again, shares, warps))
        print(f"  again, {shares} shares, {warps} warps: {time:.1f} us, {int((places != 0).sum()) / 4} blocks")


def main() -> int:
    torch.manual_seed(0)
    for seqlen in (32768, 131072, 1048576):
        index_q = torch.randn(1, 4, seqlen, 128, device="cuda", dtype=torch.bfloat16)
        index_k = torch.randn(1, 1, seqlen, 128, device="cuda", dtype=torch.bfloat16)
        prefill(index_q, index_k, "normal")
        if seqlen < 200_000:
            prefill(index_q, index_k[:, :, :1].expand_as(index_k).contiguous(), "all equal")
            prefill(*(torch.randint(-3, 4, x.shape, device="cuda").bfloat16() for x in (index_q, index_k)), "integers")
    decode(1 << 20)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
