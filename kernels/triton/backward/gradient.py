"""The backward's main kernel: dK and dV of one work item, and the share of dQ of each row in it.

One program holds K, V, dK and dV of the work item's block, and loops over the tiles that its entries' rows are in (see
`workspace`). It writes each row's own share of dQ, and the teacher of the index loss if there is room for it. If the
list has no other work item, the program adds dK and dV to the fp32 sums; else it writes them to its slot. If registers
cannot hold dK and dV of a whole block, each part of the block's keys takes a launch of its own. See `launch` for the
formulas, and `reduce` for the sums of the shares.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ..common.launch import Launch, Options, view
from ..common.softmax import LOG2_E
from ..common.target import Target
from ..loss.teacher import store_teacher
from ..schedule.work_items import load_item
from .config import BackwardConfig
from .workspace import TileSizes, Workspace, partial_place, tile_sizes


@dataclass(frozen=True)
class GradientConstants(TileSizes):
    """Constants of `gradient_kernel`.

    rows: query rows per step; columns: keys that a program holds, from key `offset` of its block on; swap: see
    `gradient_tile`.
    """

    rows: int
    columns: int
    swap: bool
    offset: int


class Folded(NamedTuple):
    """What `gradient_tile` returns: the rows' own grad_q `[D, M]`, the sums, and the probabilities `[N, M]`."""

    grad_q: Any
    grad_k: Any
    grad_v: Any
    weights: Any


@triton.jit
def gradient_tile(q, grad, k, v, lse2, delta, limit, grad_k, grad_v, scale, offset: tl.constexpr, swap: tl.constexpr):
    """Fold rows q, grad `[M, D]` into grad_k (without scale), grad_v `[N, D]`.

    Scores are `[N, M]`: probabilities leave one product in
    the layout of the next one's operand. `swap` multiplies grad_q as `[M, N] x [N, D]`: where that is not slower,
    it needs K in shared memory only once.
    """
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    scores = tl.dot(k, tl.trans(q), input_precision=precision)
    probs = tl.exp2(scores * (scale * LOG2_E) - lse2[None, :])
    probs = tl.where(offset + tl.arange(0, k.shape[0])[:, None] < limit[None, :], probs, 0.0)
    grad_probs = tl.dot(v, tl.trans(grad), input_precision=precision)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(q.dtype)
    weights = probs.to(grad.dtype)
    grad_v = tl.dot(weights, grad, grad_v, input_precision=precision)
    grad_k = tl.dot(grad_scores, q, grad_k, input_precision=precision)
    if swap:
        grad_q = tl.trans(tl.dot(tl.trans(grad_scores), k, input_precision=precision))
    else:
        grad_q = tl.dot(tl.trans(k), grad_scores, input_precision=precision)
    return Folded(grad_q * scale, grad_k, grad_v, weights)


@triton.jit
def load_keys(x, batch, group, first_key, stop_key, C: tl.constexpr):
    """C.columns keys or values of a block, from C.offset on, zero from stop_key on: `[N, D]`."""
    column = C.offset + tl.arange(0, C.columns)
    d = tl.arange(0, C.depth)
    inside = (first_key + column < stop_key)[:, None] & (d < C.head_dim)[None, :]
    rows = x.ptr + batch * x.stride_b + group * x.stride_h + (first_key + column).to(tl.int64) * x.stride_s
    return tl.load(rows[:, None] + d.to(tl.int64)[None, :] * x.stride_d, mask=inside, other=0.0)


@triton.jit
def keep_teacher(teacher_ptr, weights, tile, begin, stop, C: tl.constexpr, entries: tl.constexpr):
    """Write the mean of the weights `[N, M]` over each entry's heads; entries: of a tile, or more, as products take."""
    ENTRIES: tl.constexpr = C.entries
    HEADS: tl.constexpr = C.group_size
    COLUMNS: tl.constexpr = C.columns
    number = tl.arange(0, entries)
    if C.rows == ENTRIES * HEADS:
        total = tl.sum(tl.reshape(weights.to(tl.float32), [COLUMNS, ENTRIES, HEADS]), axis=2)
    else:
        precision: tl.constexpr = "ieee" if weights.dtype == tl.float32 else "tf32"
        owned = (tl.arange(0, C.rows) // HEADS)[:, None] == number[None, :]
        total = tl.dot(weights, owned.to(weights.dtype), input_precision=precision)
    mean = total * (1.0 / HEADS)
    entry = tile * ENTRIES + number
    column = C.offset + tl.arange(0, C.columns)
    present = (number < C.entries) & (entry >= begin) & (entry < stop)
    mask = present[None, :] & (column < C.block_size)[:, None]
    store_teacher(teacher_ptr, tile, number, column, mean, mask, C)


@triton.jit
def store_key_gradients(work, grad_k, grad_v, C: tl.constexpr):
    """Add a program's grad_k and grad_v `[N, D]` to the sums if its list has no other work item; else keep them."""
    # Loaded again: the loop before leaves no register to keep them in.
    item = load_item(work.items, work.first_range, tl.program_id(1))
    group = (work.first_range + tl.program_id(1)) // work.group_ranges
    sums, partial = work.sums, work.partial
    column = C.offset + tl.arange(0, C.columns)
    d = tl.arange(0, C.depth)
    inside = (item.first_key + column < item.stop_key)[:, None] & (d < C.head_dim)[None, :]
    alone = item.slot < 0
    sum_place = (item.batch * sums.num_kv_heads + group) * sums.seqlen_k + item.first_key
    place = tl.where(alone, sum_place, item.slot * C.block_size) * C.head_dim
    tile = column[:, None] * C.head_dim + d[None, :]
    # Not `inside & alone`, which the interpreter turns into integers.
    summed = inside & (column < tl.where(alone, C.block_size, 0))[:, None]
    k_tile = tl.where(alone, sums.k, partial.k) + place + tile
    tl.store(k_tile, grad_k + tl.load(k_tile, mask=summed, other=0.0), mask=inside)
    v_tile = tl.where(alone, sums.v, partial.v) + place + tile
    tl.store(v_tile, grad_v + tl.load(v_tile, mask=summed, other=0.0), mask=inside)


@triton.jit
def find_rows(step, begin, stop, C: tl.constexpr):
    """(entry, head as int64, whether it is the work item's) of each row of a step; no row of a step past the last."""
    HEADS: tl.constexpr = C.group_size
    STEPS: tl.constexpr = C.tile_rows // C.rows
    lane = tl.arange(0, C.rows)
    # With one step a tile, heads are known to the compiler.
    inside = lane if STEPS == 1 else (step * C.rows + lane) % C.tile_rows
    first = step // STEPS * C.entries
    live = (inside >= (begin - first) * HEADS) & (inside < tl.minimum(stop - first, C.entries) * HEADS)
    return first + inside // HEADS, (inside % HEADS).to(tl.int64), live


@triton.jit
def gradient_kernel(grad_out, q, k, v, work, scale, C: tl.constexpr):
    """See the module's docstring. Program (i, n) owns work item i of range n, and C.columns of its block's keys.

    If these are not the block's first keys, grad_q is added to the result of the launch for the keys before.
    """
    HEADS: tl.constexpr = C.group_size
    HEAD_DIM: tl.constexpr = C.head_dim
    ROWS: tl.constexpr = C.rows
    COLUMNS: tl.constexpr = C.columns
    DEPTH: tl.constexpr = C.depth
    TILE_ROWS: tl.constexpr = C.tile_rows
    ENTRIES: tl.constexpr = C.entries
    STEPS: tl.constexpr = TILE_ROWS // ROWS
    FILLED: tl.constexpr = ENTRIES * HEADS == ROWS
    MEANS: tl.constexpr = ENTRIES if FILLED else (C.teacher_rows if C.teacher_rows > 16 else 16)
    item, rows, partial = load_item(work.items, work.first_range, tl.program_id(1)), work.rows, work.partial
    begin, stop = item.begin, item.stop
    if begin >= stop:
        return
    group = tl.cast((work.first_range + tl.program_id(1)) // work.group_ranges, tl.int64)

    d = tl.arange(0, DEPTH)
    wide = d.to(tl.int64)[None, :]
    k_tile = load_keys(k, item.batch, group, item.first_key, item.stop_key, C)
    v_tile = load_keys(v, item.batch, group, item.first_key, item.stop_key, C)

    q_base = q.ptr + item.batch * q.stride_b + group * HEADS * q.stride_h
    grad_base = grad_out.ptr + item.batch * grad_out.stride_b + group * HEADS * grad_out.stride_h
    lane = tl.arange(0, ROWS)
    first, last = begin // ENTRIES * STEPS, tl.cdiv(stop, ENTRIES) * STEPS
    # The addresses of the next rows are known one step ahead, so that the copies in flight need not wait for them.
    upcoming = tl.load(rows.queries + first * ROWS + lane, mask=find_rows(first, begin, stop, C)[2], other=0)
    grad_k = tl.zeros([COLUMNS, DEPTH], tl.float32)
    grad_v = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for step in range(first, last):
        query = upcoming.to(tl.int64)
        row = step * ROWS + lane
        upcoming = tl.load(rows.queries + row + ROWS, mask=find_rows(step + 1, begin, stop, C)[2], other=0)
        entry, head, live = find_rows(step, begin, stop, C)
        q_rows = q_base + query * q.stride_s + head * q.stride_h
        grad_rows = grad_base + query * grad_out.stride_s + head * grad_out.stride_h
        mask = live[:, None] if HEAD_DIM == DEPTH else live[:, None] & (d < HEAD_DIM)[None, :]
        q_tile = tl.load(q_rows[:, None] + wide * q.stride_d, mask=mask, other=0.0)
        grad = tl.load(grad_rows[:, None] + wide * grad_out.stride_d, mask=mask, other=0.0)
        lse2 = tl.load(rows.lse2 + row, mask=live, other=float("inf"))
        delta = tl.load(rows.delta + row, mask=live, other=0.0)
        limit = tl.load(rows.limits + entry, mask=live, other=0)
        folded = gradient_tile(
            q_tile, grad, k_tile, v_tile, lse2, delta, limit, grad_k, grad_v, scale, C.offset, C.swap
        )
        if partial.teacher is not None:
            keep_teacher(partial.teacher, folded.weights, step, begin, stop, C, MEANS)
        grad_q, grad_k, grad_v = folded.grad_q, folded.grad_k, folded.grad_v
        tile = step // STEPS
        partial_q = partial.q + tile.to(tl.int64) * (TILE_ROWS * HEAD_DIM)
        place = partial_place((row - tile * TILE_ROWS)[None, :], d[:, None], C)
        mask = live[None, :] if HEAD_DIM == DEPTH else live[None, :] & (d < HEAD_DIM)[:, None]
        if C.offset > 0:
            grad_q += tl.load(partial_q + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_q + place, grad_q.to(partial.q.dtype.element_ty), mask=mask)

    store_key_gradients(work, grad_k * scale, grad_v, C)


@functools.lru_cache
def gradient_constants(config: BackwardConfig, problem: Problem) -> list[GradientConstants]:
    """Constants of `gradient_kernel`, for each part of a block's keys."""
    sizes = vars(tiles(problem, config))
    return [
        GradientConstants(**sizes, rows=config.rows, columns=config.columns, swap=config.swap, offset=offset)
        for offset in range(0, problem.block_size, config.columns)
    ]


def supports(problem: Problem, target: Target, config: BackwardConfig) -> bool:
    """Every problem."""
    return True


@functools.lru_cache
def tiles(problem: Problem, config: BackwardConfig) -> TileSizes:
    """The layout of rows: innermost in dQ, as the products leave them, where `reduce` still reads whole sectors."""
    return TileSizes(**tile_sizes(problem, config.rows, problem.group_size % 8 == 0))


def leaves_teacher(problem: Problem, config: BackwardConfig) -> bool:
    """Whether the kernel can keep the teacher: a step has all rows of its entries."""
    return problem.group_size <= config.rows and config.teacher


def gradient_launches(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, workspace: Workspace, problem: Problem, config: BackwardConfig
) -> list[Launch]:
    """The launches of `gradient_kernel`, but for their grid, `work` and scale: one per part of a block's keys."""
    arguments = {"grad_out": view(grad_out), "q": view(q), "k": view(k), "v": view(v)}
    options = Options(config.num_warps, config.num_stages)
    constants = gradient_constants(config, problem)
    return [Launch(gradient_kernel, (0, 0, 0), arguments, {"C": part}, options) for part in constants]
