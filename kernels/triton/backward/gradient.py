"""The backward's main kernel: dK and dV of one work item, and the share of dQ of each row in it.

One program holds K, V, dK and dV of the work item's block, and loops over the rows; row r is head r % G of entry
r // G. It writes each row's own share of dQ, [entries, G, D] in q's dtype (heads innermost if `heads_inside`). If the
list has no other work item, the program adds dK and dV to the fp32 sums; else it writes them to its slot. If registers
cannot hold dK and dV of a whole block, each part of the block's keys takes a launch of its own. See `launch` for the
formulas, and `reduce` for the sums of the shares.
"""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ..common.launch import Launch, Options, view
from ..common.softmax import LOG2_E
from ..common.target import Target, padded
from ..schedule.work_items import WorkItems, load_item
from .config import BackwardConfig
from .workspace import KeyGradients, Launcher, Workspace, heads_fill_lines, partial_place


@dataclass(frozen=True)
class GradientConstants:
    """Constants of `gradient_kernel`.

    rows: query rows per step; columns: keys that a program holds, from key `offset` of its block on; depth: D, padded;
    swap: see `gradient_tile`; heads_inside: see `Workspace`.
    """

    group_size: int
    head_dim: int
    block_size: int
    rows: int
    columns: int
    depth: int
    swap: bool
    heads_inside: bool
    offset: int


@triton.jit
def gradient_tile(q, grad, k, v, lse2, delta, limit, grad_k, grad_v, scale, offset: tl.constexpr, swap: tl.constexpr):
    """Fold rows q, grad `[M, D]` into grad_k (without scale), grad_v `[N, D]`; their own grad_q is `[D, M]`.

    Scores are `[N, M]`: probabilities leave one product in the layout of the next one's operand. `swap` multiplies
    grad_q as `[M, N] x [N, D]`: where that is not slower, it needs K in shared memory only once.
    """
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    scores = tl.dot(k, tl.trans(q), input_precision=precision)
    probs = tl.exp2(scores * (scale * LOG2_E) - lse2[None, :])
    probs = tl.where(offset + tl.arange(0, k.shape[0])[:, None] < limit[None, :], probs, 0.0)
    grad_probs = tl.dot(v, tl.trans(grad), input_precision=precision)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(q.dtype)
    grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v, input_precision=precision)
    grad_k = tl.dot(grad_scores, q, grad_k, input_precision=precision)
    if swap:
        grad_q = tl.trans(tl.dot(tl.trans(grad_scores), k, input_precision=precision))
    else:
        grad_q = tl.dot(tl.trans(k), grad_scores, input_precision=precision)
    return grad_q * scale, grad_k, grad_v


@triton.jit
def load_keys(x, batch, group, first_key, stop_key, C: tl.constexpr):
    """C.columns keys or values of a block, from C.offset on, zero from stop_key on: `[N, D]`."""
    column = C.offset + tl.arange(0, C.columns)
    d = tl.arange(0, C.depth)
    inside = (first_key + column < stop_key)[:, None] & (d < C.head_dim)[None, :]
    rows = x.ptr + batch * x.stride_b + group * x.stride_h + (first_key + column).to(tl.int64) * x.stride_s
    return tl.load(rows[:, None] + d.to(tl.int64)[None, :] * x.stride_d, mask=inside, other=0.0)


@triton.jit
def store_key_gradients(items, partial, sums, range_number, group, grad_k, grad_v, C: tl.constexpr):
    """Add a program's grad_k and grad_v `[N, D]` to the sums if its list has no other work item; else keep them."""
    # Loaded again: the loop before leaves no register to keep them in.
    item = load_item(items, range_number)
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
def gradient_kernel(grad_out, q, k, v, items, rows, partial, sums, range_number, group, scale, C: tl.constexpr):
    """See the module's docstring. Program i owns work item i of a token range, and C.columns of its block's keys.

    If these are not the block's first keys, grad_q is added to the result of the launch for the keys before.
    """
    HEADS: tl.constexpr = C.group_size
    HEAD_DIM: tl.constexpr = C.head_dim
    ROWS: tl.constexpr = C.rows
    COLUMNS: tl.constexpr = C.columns
    DEPTH: tl.constexpr = C.depth
    KNOWN_HEADS: tl.constexpr = ROWS % HEADS == 0 and ROWS >= 64
    item = load_item(items, range_number)
    if item.begin >= item.stop:
        return
    first, last = item.begin * HEADS, item.stop * HEADS
    group = tl.cast(group, tl.int64)

    d = tl.arange(0, DEPTH)
    wide = d.to(tl.int64)[None, :]
    k_tile = load_keys(k, item.batch, group, item.first_key, item.stop_key, C)
    v_tile = load_keys(v, item.batch, group, item.first_key, item.stop_key, C)

    q_base = q.ptr + item.batch * q.stride_b + group * HEADS * q.stride_h
    grad_base = grad_out.ptr + item.batch * grad_out.stride_b + group * HEADS * grad_out.stride_h
    lane = tl.arange(0, ROWS)
    # The addresses of the next rows are known one step ahead, so that the copies in flight need not wait for them.
    upcoming = tl.load(rows.queries + (first + lane) // HEADS, mask=first + lane < last, other=0)
    grad_k = tl.zeros([COLUMNS, DEPTH], tl.float32)
    grad_v = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in range(first, last, ROWS):
        row = start + lane
        live = row < last
        query = upcoming.to(tl.int64)
        # From `lane`, heads are known to the compiler, which saves much work on addresses, except where registers are
        # short.
        head = (lane if KNOWN_HEADS else row).to(tl.int64) % HEADS
        upcoming = tl.load(rows.queries + (row + ROWS) // HEADS, mask=row + ROWS < last, other=0)
        q_rows = q_base + query * q.stride_s + head * q.stride_h
        grad_rows = grad_base + query * grad_out.stride_s + head * grad_out.stride_h
        mask = live[:, None] if HEAD_DIM == DEPTH else live[:, None] & (d < HEAD_DIM)[None, :]
        q_tile = tl.load(q_rows[:, None] + wide * q.stride_d, mask=mask, other=0.0)
        grad = tl.load(grad_rows[:, None] + wide * grad_out.stride_d, mask=mask, other=0.0)
        lse2 = tl.load(rows.lse2 + row, mask=live, other=0.0)
        delta = tl.load(rows.delta + row, mask=live, other=0.0)
        limit = tl.load(rows.limits + row // HEADS, mask=live, other=0)
        grad_q, grad_k, grad_v = gradient_tile(
            q_tile, grad, k_tile, v_tile, lse2, delta, limit, grad_k, grad_v, scale, C.offset, C.swap
        )
        entry = start // HEADS
        partial_q = partial.q + entry.to(tl.int64) * (HEADS * HEAD_DIM)
        place = partial_place((row - entry * HEADS)[None, :], d[:, None], HEADS, HEAD_DIM, C.heads_inside)
        mask = live[None, :] if HEAD_DIM == DEPTH else live[None, :] & (d < HEAD_DIM)[:, None]
        if C.offset > 0:
            grad_q += tl.load(partial_q + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_q + place, grad_q.to(partial.q.dtype.element_ty), mask=mask)

    store_key_gradients(items, partial, sums, range_number, group, grad_k * scale, grad_v, C)


@functools.lru_cache
def gradient_constants(config: BackwardConfig, problem: Problem, heads_inside: bool) -> list[GradientConstants]:
    """Constants of `gradient_kernel`, for each part of a block's keys."""
    return [
        GradientConstants(
            problem.group_size,
            problem.head_dim,
            problem.block_size,
            config.rows,
            config.columns,
            padded(problem.head_dim),
            config.swap,
            heads_inside,
            offset,
        )
        for offset in range(0, problem.block_size, config.columns)
    ]


def supports(problem: Problem, target: Target, config: BackwardConfig) -> bool:
    """Every problem."""
    return True


def puts_heads_inside(problem: Problem) -> bool:
    """Whether a row's share of dQ lies with the heads innermost: see `Workspace`."""
    return heads_fill_lines(problem.group_size)


def gradient_launcher(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    workspace: Workspace,
    sums: KeyGradients,
    scale: float,
    problem: Problem,
    config: BackwardConfig,
) -> Launcher:
    """The Launcher of `gradient_kernel`: it fills the partial results, and adds lists of one work item to the sums."""
    views = {"grad_out": view(grad_out), "q": view(q), "k": view(k), "v": view(v)}
    options = Options(config.num_warps, config.num_stages)

    def launch(items: WorkItems, range_number: int, group: int) -> None:
        arguments = views | {
            "items": items,
            "rows": workspace.rows,
            "partial": workspace.partial,
            "sums": sums,
            "range_number": range_number,
            "group": group,
            "scale": scale,
        }
        for constants in gradient_constants(config, problem, workspace.heads_inside):
            Launch(gradient_kernel, (items.num_items, 1, 1), arguments, {"C": constants}, options).run()

    return launch
