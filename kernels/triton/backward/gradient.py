"""The backward's main kernel: dK and dV of one piece of a block's list, and the share of dQ of each row in it.

One program holds K, V, dK and dV of the block and walks the rows, row r being head r % G of entry r // G. It writes the
rows' own share of dQ, [entries, G, D] in q's dtype (heads innermost if `heads_inside`), and adds dK and dV to the fp32
sums if the list has no other piece; else they are kept apart. If registers cannot hold dK and dV of a whole block,
there is a launch for each part of its keys. See `attention_backward` for the formulas, and `backward_sums` for what
adds up the shares.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ..common.primitives import LOG2_E
from ..common.target import padded
from ..schedule.work_items import ItemsRecord, WorkItems, load_item
from .config import BackwardConfig
from .preprocess import Workspace


@triton.jit
def gradient_tile(q, grad, k, v, lse2, delta, limit, grad_k, grad_v, scale, OFFSET: tl.constexpr, SWAP: tl.constexpr):
    """Fold rows q, grad `[M, D]` into grad_k (without scale), grad_v `[N, D]`; their own grad_q is `[D, M]`.

    Scores are `[N, M]`: as they leave one product, probabilities are an operand of the next. SWAP multiplies grad_q as
    `[M, N] x [N, D]`: where that is not slower, it needs K in shared memory once only.
    """
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    scores = tl.dot(k, tl.trans(q), input_precision=precision)
    probs = tl.exp2(scores * (scale * LOG2_E) - lse2[None, :])
    probs = tl.where(OFFSET + tl.arange(0, k.shape[0])[:, None] < limit[None, :], probs, 0.0)
    grad_probs = tl.dot(v, tl.trans(grad), input_precision=precision)
    grad_scores = (probs * (grad_probs - delta[None, :])).to(q.dtype)
    grad_v = tl.dot(probs.to(grad.dtype), grad, grad_v, input_precision=precision)
    grad_k = tl.dot(grad_scores, q, grad_k, input_precision=precision)
    if SWAP:
        grad_q = tl.trans(tl.dot(tl.trans(grad_scores), k, input_precision=precision))
    else:
        grad_q = tl.dot(tl.trans(k), grad_scores, input_precision=precision)
    return grad_q * scale, grad_k, grad_v


@triton.jit
def partial_offsets(row, depth, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, INSIDE: tl.constexpr):
    """Where element `depth` of row `row` is kept in a partial dQ; INSIDE: heads innermost."""
    if INSIDE:
        return row // HEADS * (HEADS * HEAD_DIM) + row % HEADS + depth * HEADS
    else:
        return row * HEAD_DIM + depth


@triton.jit(do_not_specialize=["chunk", "group", "num_items"])
def gradient_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    plan_ptr,
    queries_ptr,
    limits_ptr,
    row_delta_ptr,
    row_lse2_ptr,
    partial_q_ptr,
    partial_k_ptr,
    partial_v_ptr,
    grad_k_ptr,
    grad_v_ptr,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    chunk,
    group,
    num_items,
    seqlen_k,
    num_kv_heads,
    scale,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWAP: tl.constexpr,
    INSIDE: tl.constexpr,
    OFFSET: tl.constexpr,
):
    """See the module's docstring. Program i owns item i of a chunk's plan, and COLUMNS of its block's keys from OFFSET.

    If that is not the first, grad_q is added to what the launch for the keys before has left.
    """
    KNOWN_HEADS: tl.constexpr = ROWS % HEADS == 0 and ROWS >= 64
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    batch, first_key, stop_key, first, last = item.batch, item.first_key, item.stop_key, item.begin, item.stop
    if first >= last:
        return
    group = tl.cast(group, tl.int64)

    column = OFFSET + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    wide = depth.to(tl.int64)[None, :]
    key = (first_key + column).to(tl.int64)
    inside = (first_key + column < stop_key)[:, None] & (depth < HEAD_DIM)[None, :]
    k_rows = k_ptr + batch * stride_kb + group * stride_kh + key * stride_ks
    v_rows = v_ptr + batch * stride_vb + group * stride_vh + key * stride_vs
    k = tl.load(k_rows[:, None] + wide * stride_kd, mask=inside, other=0.0)
    v = tl.load(v_rows[:, None] + wide * stride_vd, mask=inside, other=0.0)

    q_base = q_ptr + batch * stride_qb + group * HEADS * stride_qh
    grad_base = grad_out_ptr + batch * stride_gb + group * HEADS * stride_gh
    lane = tl.arange(0, ROWS)
    # The addresses of the next rows are known one step ahead, so that the copies in flight need not wait for them.
    upcoming = tl.load(queries_ptr + (first * HEADS + lane) // HEADS, mask=first * HEADS + lane < last * HEADS, other=0)
    grad_k = tl.zeros([COLUMNS, DEPTH], tl.float32)
    grad_v = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for start in range(first * HEADS, last * HEADS, ROWS):
        row = start + lane
        live = row < last * HEADS
        query = upcoming.to(tl.int64)
        # Known when this is compiled, which saves much work on addresses, but where registers are short of it.
        head = (lane if KNOWN_HEADS else row).to(tl.int64) % HEADS
        upcoming = tl.load(queries_ptr + (row + ROWS) // HEADS, mask=row + ROWS < last * HEADS, other=0)
        q_rows = q_base + query * stride_qs + head * stride_qh
        grad_rows = grad_base + query * stride_gs + head * stride_gh
        mask = live[:, None] if HEAD_DIM == DEPTH else live[:, None] & (depth < HEAD_DIM)[None, :]
        q = tl.load(q_rows[:, None] + wide * stride_qd, mask=mask, other=0.0)
        grad = tl.load(grad_rows[:, None] + wide * stride_gd, mask=mask, other=0.0)
        lse2 = tl.load(row_lse2_ptr + row, mask=live, other=0.0)
        delta = tl.load(row_delta_ptr + row, mask=live, other=0.0)
        limit = tl.load(limits_ptr + row // HEADS, mask=live, other=0)
        grad_q, grad_k, grad_v = gradient_tile(q, grad, k, v, lse2, delta, limit, grad_k, grad_v, scale, OFFSET, SWAP)
        entry = start // HEADS
        partial_q = partial_q_ptr + entry.to(tl.int64) * (HEADS * HEAD_DIM)
        place = partial_offsets((row - entry * HEADS)[None, :], depth[:, None], HEADS, HEAD_DIM, INSIDE)
        mask = live[None, :] if HEAD_DIM == DEPTH else live[None, :] & (depth < HEAD_DIM)[:, None]
        if OFFSET > 0:
            grad_q += tl.load(partial_q + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_q + place, grad_q.to(partial_q_ptr.dtype.element_ty), mask=mask)

    # Loaded again: the loop leaves no register to keep them in.
    item = load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk)
    batch, first_key, stop_key = item.batch, item.first_key, item.stop_key
    slot = item.slot
    inside = (first_key + column < stop_key)[:, None] & (depth < HEAD_DIM)[None, :]
    alone = slot < 0
    place = tl.where(alone, (batch * num_kv_heads + group) * seqlen_k + first_key, slot * BLOCK) * HEAD_DIM
    tile = column[:, None] * HEAD_DIM + depth[None, :]
    # Not `inside & alone`, which the interpreter turns into integers.
    summed = inside & (column < tl.where(alone, BLOCK, 0))[:, None]
    k_tile = tl.where(alone, grad_k_ptr, partial_k_ptr) + place + tile
    tl.store(k_tile, grad_k * scale + tl.load(k_tile, mask=summed, other=0.0), mask=inside)
    v_tile = tl.where(alone, grad_v_ptr, partial_v_ptr) + place + tile
    tl.store(v_tile, grad_v + tl.load(v_tile, mask=summed, other=0.0), mask=inside)


def gradient_constants(config: BackwardConfig, group_size: int, head_dim: int, block_size: int) -> dict[str, int]:
    """The compile-time arguments of `gradient_kernel`, but for OFFSET."""
    return {
        "HEADS": group_size,
        "HEAD_DIM": head_dim,
        "BLOCK": block_size,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": padded(head_dim),
        "SWAP": config.swap,
        "INSIDE": heads_inside(group_size),
    }


def heads_inside(group_size: int) -> bool:
    """Whether a partial dQ has its heads innermost: as the products leave them, where that makes whole sectors."""
    return group_size % 8 == 0


def gradient_launcher(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    workspace: Workspace,
    scale: float,
    config: BackwardConfig,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Callable[[WorkItems, int, int], None]:
    """What fills the partial results of a chunk, given its pieces, its number, and its KV head.

    Lists of one piece are added to grad_k and grad_v.
    """
    num_kv_heads, seqlen_k, head_dim = k.shape[1:]
    block_size = workspace.partial_k.shape[1]
    constants = gradient_constants(config, q.shape[1] // num_kv_heads, head_dim, block_size)

    def launch(pieces: WorkItems, chunk: int, group: int) -> None:
        for offset in range(0, block_size, config.columns):
            gradient_kernel[(pieces.num_items,)](
                grad_out,
                q,
                k,
                v,
                pieces.table,
                workspace.queries,
                workspace.limits,
                workspace.row_delta,
                workspace.row_lse2,
                workspace.partial_q,
                workspace.partial_k,
                workspace.partial_v,
                grad_k,
                grad_v,
                *grad_out.stride(),
                *q.stride(),
                *k.stride(),
                *v.stride(),
                chunk,
                group,
                pieces.num_items,
                seqlen_k,
                num_kv_heads,
                scale,
                **constants,
                OFFSET=offset,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )

    return launch
