"""The parts of a selection certified from int8 scores, on a GPU: `python -m benchmarks.gpu_selection_8_bits`.

docs/notes/selection-8-bits.md describes the steps, docs/math.md the bounds, `benchmarks/selection_8_bits.py` the same in
plain PyTorch. One sequence, whole blocks, one forced newest block; rows are token * groups + group. Rough scores and
their bounds are divided by the scale of the row's query. Marked rows are counted, not scored.
"""

import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

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
def choose_kernel(
    maxima_ptr,
    scale_ptr,
    key_scale_ptr,
    per_error_ptr,
    per_norm_ptr,
    worst_ptr,
    low_ptr,
    high_ptr,
    first_row,
    num_rows,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    COUNT: tl.constexpr,
    HIGHER: tl.constexpr,
):
    """low, high [num_rows]: rough COUNT-th bests of each row, less and more the doubt.

    Of many blocks, the COUNT best of the maxima of four each, which the best blocks seldom share: not more than COUNT -
    HIGHER of them in most rows.
    """
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    own = (first_row + tile * ROWS) // GROUPS // BLOCK
    scores = ()
    for rank in tl.static_range(COUNT):
        scores += (tl.full([ROWS], float("-inf"), tl.float32),)
    number = tl.where(own > 8 * COUNT, own // 4, own)
    at = maxima_ptr + row
    for i in range(0, number):
        best = rough_of(tl.load(at + tl.cast(i, tl.int64) * num_rows)) * tl.load(key_scale_ptr + i)
        if number != own:
            for part in tl.static_range(1, 4):
                block = part * number + i
                best = tl.maximum(
                    best, rough_of(tl.load(at + tl.cast(block, tl.int64) * num_rows)) * tl.load(key_scale_ptr + block)
                )
        longer = ()
        for rank in tl.static_range(COUNT):
            longer += (tl.maximum(scores[rank], best),)
            best = tl.minimum(scores[rank], best)
        scores = longer
    bound = tl.load(per_error_ptr + first_row + row) * tl.load(worst_ptr) + tl.load(
        per_norm_ptr + first_row + row
    ) * tl.load(worst_ptr + 1)
    tl.store(low_ptr + row, scores[COUNT - 1] - bound * DOUBT)
    tl.store(high_ptr + row, scores[HIGHER] + bound * DOUBT)


@triton.jit
def list_kernel(
    maxima_ptr,
    key_scale_ptr,
    key_error_ptr,
    key_norm_ptr,
    per_error_ptr,
    per_norm_ptr,
    low_ptr,
    high_ptr,
    entries_ptr,
    lengths_ptr,
    used_ptr,
    places_ptr,
    first_row,
    num_rows,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """For each block the rows that score it again, as row * PLACES + place, in lists [N, num_rows] of `lengths` [N].

    used [num_rows] counts the places of a row, which sure blocks take with a score of +inf.
    """
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    first_block = tl.program_id(0) * BLOCKS
    last = (first_row + tl.program_id(1) * ROWS + ROWS - 1) // GROUPS // BLOCK
    if first_block >= last:
        return
    own = (first_row + row) // GROUPS // BLOCK
    per_error, per_norm = tl.load(per_error_ptr + first_row + row), tl.load(per_norm_ptr + first_row + row)
    low, high = tl.load(low_ptr + row), tl.load(high_ptr + row)
    for block in range(first_block, tl.minimum(first_block + BLOCKS, last)):
        scale = tl.load(key_scale_ptr + block)
        seen = block < own
        score = rough_of(tl.load(maxima_ptr + tl.cast(block, tl.int64) * num_rows + row, mask=seen, other=0)) * scale
        bound = per_error * tl.load(key_error_ptr + block) + per_norm * tl.load(key_norm_ptr + block) + 33 * scale
        near = seen & (score + bound >= low)
        sure = near & (score - bound > high)
        place = tl.atomic_add(used_ptr + row, 1, mask=near, sem="relaxed")
        fits = near & (place < PLACES - 1)
        key = pack_keys(tl.full([ROWS], float("inf"), tl.float32), tl.zeros([ROWS], tl.int32) + block)
        tl.store(places_ptr + place.to(tl.int64) * num_rows + row, key, mask=fits & sure)
        again = (fits & ~sure).to(tl.int32)
        total = tl.sum(again, 0)
        begin = tl.atomic_add(lengths_ptr + block, total, sem="relaxed")
        rank = tl.cumsum(again, 0) - again
        tl.store(entries_ptr + tl.cast(block, tl.int64) * num_rows + begin + rank, row * PLACES + place, mask=again > 0)


@triton.jit
def again_kernel(
    q_ptr,
    k_ptr,
    entries_ptr,
    lengths_ptr,
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
    """Scores of 16 bits of the listed rows and a block, into their places."""
    block = tl.program_id(1)
    length = tl.load(lengths_ptr + block)
    d, column = tl.arange(0, D), tl.arange(0, BLOCK)
    if tl.program_id(0) * ROWS >= length:
        return
    k = tl.load(k_ptr + (block * BLOCK + column)[:, None] * D + d[None, :])
    for first in tl.range(tl.program_id(0) * ROWS, length, SHARES * ROWS, num_stages=STAGES):
        number = first + tl.arange(0, ROWS)
        entry = tl.load(entries_ptr + tl.cast(block, tl.int64) * num_rows + number, mask=number < length, other=0)
        row = first_row + entry // PLACES
        place = (row % GROUPS).to(tl.int64) * seqlen + row // GROUPS
        q = tl.load(q_ptr + place[:, None] * D + d[None, :])
        best = tl.max(tl.dot(q, tl.trans(k)), 1)
        spot = (entry % PLACES).to(tl.int64) * num_rows + entry // PLACES
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
    q8_ptr, k8_ptr, maxima_ptr, num_blocks, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr
):
    """maxima [16, num_blocks] int32 of 16 rows q8, of which ROWS are written; every program takes every so many blocks."""
    d, column, row = tl.arange(0, D), tl.arange(0, BLOCK), tl.arange(0, 16)
    q = tl.load(q8_ptr + row[:, None] * D + d[None, :])
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=STAGES):
        k = tl.load(k8_ptr + (tl.cast(block, tl.int64) * BLOCK + column)[:, None] * D + d[None, :])
        best = tl.max(tl.dot(k, tl.trans(q), out_dtype=tl.int32), 0)
        tl.store(maxima_ptr + row * num_blocks + block, best, mask=row < ROWS)


@triton.jit
def decode_again_kernel(
    maxima_ptr,
    scale_ptr,
    key_scale_ptr,
    key_error_ptr,
    key_norm_ptr,
    per_error_ptr,
    per_norm_ptr,
    worst_ptr,
    q_ptr,
    k_ptr,
    places_ptr,
    num_blocks,
    BLOCKS: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    SHARES: tl.constexpr,
):
    """Of one row: the threshold, the blocks near it, and scores of 16 bits of one of SHARES of them."""
    row = tl.program_id(1)
    block = tl.arange(0, BLOCKS)
    key_scale = tl.load(key_scale_ptr + block, mask=block < num_blocks, other=0.0)
    score = tl.load(maxima_ptr + row * num_blocks + block, mask=block < num_blocks, other=0).to(tl.float32) * key_scale
    score = tl.where(block < num_blocks, score, float("-inf"))
    groups = tl.sort(tl.max(tl.reshape(score, [BLOCKS // 256, 256]), 0), descending=True)
    threshold = tl.max(tl.where(tl.arange(0, 256) == COUNT - 1, groups, float("-inf")), 0)
    per_error, per_norm = tl.load(per_error_ptr + row), tl.load(per_norm_ptr + row)
    low = threshold - (per_error * tl.load(worst_ptr) + per_norm * tl.load(worst_ptr + 1)) * DOUBT
    error = tl.load(key_error_ptr + block, mask=block < num_blocks, other=0.0)
    norm = tl.load(key_norm_ptr + block, mask=block < num_blocks, other=0.0)
    near = (score + per_error * error + per_norm * norm >= low).to(tl.int32)
    rank = tl.cumsum(near, 0)
    d, column = tl.arange(0, D), tl.arange(0, BLOCK)
    q = tl.load(q_ptr + row * D + d).to(tl.float32)
    total = tl.sum(near, 0)
    for number in range(tl.program_id(0), tl.minimum(total, PLACES), SHARES):
        mine = tl.sum(tl.where((rank == number + 1) & (near > 0), block, 0), 0)
        k = tl.load(k_ptr + (mine.to(tl.int64) * BLOCK + column)[:, None] * D + d[None, :]).to(tl.float32)
        best = tl.max(tl.sum(k * q[None, :], 1), 0)
        tl.store(places_ptr + row * PLACES + number, pack_keys(best, mine))


@dataclass
class Parts:
    """The launches of a selection for index_q [1, groups, S, D] and index_k [1, 1, S, D], chunk by chunk of queries."""

    index_q: Any
    index_k: Any
    chunk: int
    topk: int = 16
    scan_options: tuple[int, int, int, bool] = (128, 4, 3, True)
    again_options: tuple[int, int, int] = (64, 4, 3)
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
            "counts": empty(chunk_rows + blocks, dtype=torch.int32),
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
        names = "maxima", "scale", "key_scale", "per_error", "per_norm", "worst", "low", "high"
        self.launch(
            choose_kernel,
            (num // 128,),
            [*(b[name] for name in names), first, num],
            GROUPS=self.groups,
            ROWS=128,
            COUNT=self.topk - 1,
            HIGHER=self.topk - 5,
        )

    def list(self, first: int) -> None:
        b, num = self.buffers, self.groups * self.chunk
        b["counts"].zero_()
        names = "maxima", "key_scale", "key_error", "key_norm", "per_error", "per_norm", "low", "high", "entries"
        arguments = [*(b[name] for name in names), b["counts"][num:], b["counts"][:num], b["places"], first, num]
        blocks = triton.cdiv((first + num) // self.groups, 128 * 8)
        self.launch(list_kernel, (blocks, triton.cdiv(num, 2048)), arguments, GROUPS=self.groups, ROWS=2048, BLOCKS=8)

    def again(self, first: int) -> None:
        b, num = self.buffers, self.groups * self.chunk
        rows, warps, stages = self.again_options
        blocks = (first + num) // self.groups // 128
        shares = max(1, num * 40 // (blocks * rows * 4))
        arguments = [self.index_q, self.index_k, b["entries"], b["counts"][num:], b["places"], self.seqlen, first, num]
        self.launch(
            again_kernel,
            (shares, blocks),
            arguments,
            warps,
            GROUPS=self.groups,
            ROWS=rows,
            D=self.depth,
            SHARES=shares,
            STAGES=stages,
        )

    def certify(self, first: int) -> None:
        b, num = self.buffers, self.groups * self.chunk
        arguments = [
            b["places"],
            b["counts"][:num],
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


SCANS = [
    (128, 4, 3, True),
    (128, 4, 4, True),
    (128, 8, 4, True),
    (256, 8, 3, True),
    (256, 8, 4, True),
    (64, 4, 4, True),
    (128, 4, 3, False),
]


def prefill(seqlen: int, index_q: Any, index_k: Any, title: str, sweep: bool) -> None:
    """Print whether ids are those of bf16, and the time of each step."""
    import flexmsa

    parts = Parts(index_q, index_k, chunk_of_length(seqlen))
    parts.run()
    wanted = flexmsa.select_blocks(index_q, index_k)
    same = (parts.buffers["ids"] == wanted).all(-1)[0]
    marked = parts.buffers["marked"].view(seqlen, parts.groups).T != 0
    num = parts.groups * parts.chunk
    used, again = parts.buffers["counts"][:num].float(), parts.buffers["counts"][num:].sum().item() / num
    print(
        f"{title} {seqlen}: marked {marked.float().mean().item():.4%}, certified but wrong {int((~same & ~marked).sum())}"
        f" rows, differ {int((~same).sum())}; last chunk: near {used.mean().item():.1f} most {used.max().item():.0f}, again {again:.1f}",
        flush=True,
    )
    if sweep:
        for options in SCANS:
            try:
                times = [
                    milliseconds(lambda: [parts.scan(x, store, options) for x in parts.first_rows()])
                    for store in (False, True)
                ]
                print(f"  scan {options}: {times[0]:.3f} bare, {times[1]:.3f} stored", flush=True)
            except Exception as error:  # a variant may not fit
                print(f"  scan {options}: {type(error).__name__} {str(error)[:60]}")
        for rows, warps, stages in ((64, 4, 2), (64, 4, 4), (128, 4, 3), (128, 8, 3)):
            parts.again_options = rows, warps, stages
            print(
                f"  again {rows, warps, stages}: {milliseconds(lambda: [parts.again(x) for x in parts.first_rows()][0]):.3f} (lists of the last chunk)"
            )
        parts.again_options = 64, 4, 3
    repeats = 5 if seqlen < 500_000 else 1
    total = milliseconds(parts.run, repeats)
    today = milliseconds(lambda: flexmsa.select_blocks(index_q, index_k), repeats)
    steps = {name: 0.0 for name in ("scan", "choose", "list", "again", "certify")}
    for first in parts.first_rows():
        for name in steps:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            getattr(parts, name)(first)
            end.record()
            torch.cuda.synchronize()
            steps[name] += begin.elapsed_time(end)
    found = ", ".join(f"{name} {time:.3f}" for name, time in steps.items())
    print(
        f"  quantise {milliseconds(parts.quantise):.3f}, {found}; all {total:.3f}, bf16 today {today:.3f} ms",
        flush=True,
    )


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
    maxima = torch.zeros(16, blocks, dtype=torch.int32, device=device)
    places = torch.zeros(groups, 64, dtype=torch.int64, device=device)

    def scan(programs: int, stages: int) -> None:
        parts.launch(
            decode_scan_kernel, (programs,), [b["q8"], b["k8"], maxima, blocks], ROWS=groups, D=depth, STAGES=stages
        )

    def again(shares: int) -> None:
        names = "scale", "key_scale", "key_error", "key_norm", "per_error", "per_norm"
        arguments = [
            maxima,
            *(b[name] for name in names),
            worst,
            index_q[:, :, 0].contiguous(),
            index_k,
            places,
            blocks,
        ]
        parts.launch(
            decode_again_kernel,
            (shares, groups),
            arguments,
            8,
            BLOCKS=triton.next_power_of_2(blocks),
            COUNT=15,
            D=depth,
            SHARES=shares,
        )

    def microseconds(call: Any) -> float:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                call()
        return milliseconds(graph.replay) * 50

    for programs, stages in ((132 * 2, 4), (132 * 3, 4), (132 * 4, 3), (132 * 2, 6)):
        print(
            f"decode {num_keys}: scan {programs} programs {stages} stages {microseconds(lambda: scan(programs, stages)):.1f} us"
        )
    for shares in (16, 33):
        print(
            f"  again, {shares} shares: {microseconds(lambda: again(shares)):.1f} us, {(places != 0).sum(1).tolist()} blocks"
        )


def main() -> int:
    torch.manual_seed(0)
    for seqlen in (32768, 131072, 1048576):
        index_q = torch.randn(1, 4, seqlen, 128, device="cuda", dtype=torch.bfloat16)
        index_k = torch.randn(1, 1, seqlen, 128, device="cuda", dtype=torch.bfloat16)
        prefill(seqlen, index_q, index_k, "normal", seqlen < 200_000)
        if seqlen == 32768:
            prefill(seqlen, index_q, index_k[:, :, :1].expand_as(index_k).contiguous(), "all equal", False)
            integers = [torch.randint(-3, 4, x.shape, device="cuda").bfloat16() for x in (index_q, index_k)]
            prefill(seqlen, *integers, "integers", False)
    decode(1 << 20)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
