"""The index loss's main kernel: the loss of one piece of a block's list, and its gradients on the way.

A program keeps its part of the block of k and index_k, and walks the entries `rows` at a time: the teacher is summed
over the heads in registers, one product [rows, D] x [D, keys] a head, so that no group size wastes rows. It writes its
loss and each entry's share of grad_index_q, and sums grad_index_k. See `index_loss` for the formulas.
"""

import triton
import triton.language as tl

from ..common.primitives import LN_2, LOG2_E, load_tile
from ..common.target import padded
from ..schedule.inverse_index import IndexRecord, find_token_range
from ..schedule.work_items import ItemsRecord, item_entries, load_item
from .config import LossConfig
from .loads import VARYING, load_entries, load_part, load_rows
from .student import lse_constants

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def fast_log2(x):
    """log2 of normal x > 0, off by at most 1.5e-7: x = 2^n (1 + t), |t| <= 1/3, and a polynomial in t.

    tl.log2 takes three times the instructions, and the registers to go with them.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23
    t = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = t * -0.2222205549 + 0.2468628287
    p = p * t - 0.2367866337
    p = p * t + 0.2855819166
    p = p * t - 0.3607895672
    p = p * t + 0.4809655249
    p = p * t - 0.7213465571
    p = p * t + 1.4426947832
    return exponent.to(tl.float32) + p * t


@triton.jit
def sum_teacher(
    q_base,
    lse_rows,
    k,
    query,
    stride_qh,
    stride_qs,
    stride_qd,
    group_size,
    scale,
    HEAD_DIM: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sum over a group's heads of exp2(scale <q, k> - lse log2(e)), [ROWS, COLUMNS]."""
    precision: tl.constexpr = "ieee" if k.dtype == tl.float32 else "tf32"
    teacher = tl.zeros([query.shape[0], k.shape[0]], tl.float32)
    for head in tl.range(0, group_size, num_stages=STAGES):
        lse = tl.load(lse_rows + head) * LOG2_E
        q = load_rows(q_base + tl.cast(head, tl.int64) * stride_qh, query, stride_qs, stride_qd, HEAD_DIM, k.shape[1])
        scores = tl.dot(q, tl.trans(k), input_precision=precision)
        teacher += tl.exp2(scores * scale - lse[:, None])
    return teacher


@triton.jit(do_not_specialize=VARYING)
def index_loss_kernel(
    q_ptr,
    k_ptr,
    index_q_ptr,
    index_k_ptr,
    lse_ptr,
    index_lse_ptr,
    entries_ptr,
    offsets_ptr,
    plan_ptr,
    unit_ptr,
    loss_ptr,
    partial_q_ptr,
    partial_k_ptr,
    grad_k_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_xd,
    stride_yb,
    stride_ys,
    stride_yd,
    num_groups,
    group_size,
    seqlen_q,
    seqlen_k,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    num_blocks,
    num_items,
    topk,
    scale,
    index_scale,
    HEAD_DIM: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    INDEX_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_GRAD: tl.constexpr,
):
    """loss [chunk, item, part], partial_q [entry, part, Di] without its factor, and partial_k, or grad_k added to.

    lse [B*Sq, Hq] natural; index_lse [token in chunk], scale and index_scale in base 2; unit: the gradients' factor.
    """
    batch, first_key, stop_key, shift, begin, stop = load_part(plan_ptr, chunk, num_items, COLUMNS)
    if begin >= stop:
        return
    tokens = find_token_range(IndexRecord(0, 0, 0, 0, first_token, num_tokens, chunk_tokens, 0), chunk, topk)
    group, origin, token0 = tokens.group, tokens.first_entry, tokens.first_token
    q_base = q_ptr + batch * stride_qb + group * group_size * stride_qh
    k_base = k_ptr + batch * stride_kb + group * stride_kh
    x_base = index_q_ptr + batch * stride_xb + group * stride_xh
    y_base = index_k_ptr + batch * stride_yb
    k = load_tile(k_base, first_key, stop_key - first_key, stride_ks, stride_kd, COLUMNS, HEAD_DIM, DEPTH)
    index_k = load_tile(y_base, first_key, stop_key - first_key, stride_ys, stride_yd, COLUMNS, INDEX_DIM, INDEX_DEPTH)
    precision: tl.constexpr = "ieee" if index_k.dtype == tl.float32 else "tf32"
    query0 = (token0 - batch * seqlen_q).to(tl.int32)
    entries_ptr = item_entries(IndexRecord(0, entries_ptr, offsets_ptr, num_blocks, 0, 0, 0, 0), chunk, begin)
    num_entries = stop - begin
    lse_base = lse_ptr + (batch * seqlen_q * num_groups + group) * group_size
    num_keys = stop_key - first_key
    lead = shift + 1 - first_key
    column = tl.arange(0, COLUMNS)
    depth = tl.arange(0, INDEX_DEPTH)
    grad_k = tl.zeros([COLUMNS, INDEX_DEPTH], tl.float32)
    loss = tl.zeros([ROWS], tl.float32)
    for step in range(0, num_entries, ROWS):
        entry = step + tl.arange(0, ROWS)
        local = load_entries(entries_ptr, entry, num_entries, origin)
        query = query0 + local // topk
        index_q = load_rows(x_base, query, stride_xs, stride_xd, INDEX_DIM, INDEX_DEPTH)
        lse_rows = lse_base + query.to(tl.int64) * (num_groups * group_size)
        teacher = sum_teacher(
            q_base, lse_rows, k, query, stride_qh, stride_qs, stride_qd, group_size, scale, HEAD_DIM, STAGES
        )
        log_student = tl.zeros([ROWS, COLUMNS], tl.float32)
        # Always true. Without the branch Triton sees that this product feeds another, and lays it out with whole rows
        # to a warp: with 64 rows for 8 warps, half of the warps would repeat the work of the others.
        if step < num_entries:
            log_student = tl.dot(index_q, tl.trans(index_k), input_precision=precision)
        log_student = log_student * index_scale - tl.load(index_lse_ptr + local // topk)[:, None]
        num_seen = tl.where(entry < num_entries, tl.minimum(query + lead, num_keys), 0)
        seen = column[None, :] < num_seen[:, None]
        teacher = tl.where(seen, teacher * (1.0 / group_size), 0.0)
        ratio = fast_log2(tl.maximum(teacher, TINY)) - log_student
        loss += tl.sum(tl.where(teacher > 0.0, teacher * ratio, 0.0), axis=1)
        if WITH_GRAD:
            grad_scores = (tl.where(seen, tl.exp2(log_student), 0.0) - teacher).to(index_k.dtype)
            grad_k = tl.dot(tl.trans(grad_scores), index_q, grad_k, input_precision=precision)
            grad_q = tl.dot(grad_scores, index_k, input_precision=precision)
            # Read again, so that no registers are held for it over the loop of the teacher.
            local = tl.load(entries_ptr + entry, mask=entry < num_entries, other=origin) - origin
            share = local * tl.num_programs(1) + tl.program_id(1)
            place = partial_q_ptr + share[:, None] * INDEX_DIM + depth[None, :]
            tl.store(place, grad_q, mask=(entry < num_entries)[:, None] & (depth < INDEX_DIM)[None, :])
    item = tl.cast(chunk, tl.int64) * num_items + tl.program_id(0)
    tl.store(loss_ptr + item * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, axis=0) * LN_2)
    if WITH_GRAD:
        # Read again, so that no registers are held for it in the loop.
        batch, first_key, stop_key, _, _, _ = load_part(plan_ptr, chunk, num_items, COLUMNS)
        store_key_grads(
            grad_k * tl.load(unit_ptr),
            grad_k_ptr + (batch * seqlen_k + first_key) * INDEX_DIM,
            stop_key - first_key,
            partial_k_ptr,
            load_item(ItemsRecord(plan_ptr, 0, num_items, 0), chunk).slot,
            INDEX_DIM,
        )


@triton.jit
def store_key_grads(grad_k, grad_k_rows, num_keys, partial_k_ptr, slot, INDEX_DIM: tl.constexpr):
    """Add grad_k [COLUMNS, INDEX_DEPTH] to the gradient, whose only owner this program is if slot < 0; else keep it."""
    column = tl.arange(0, grad_k.shape[0])
    depth = tl.arange(0, grad_k.shape[1])
    offsets = column[:, None] * INDEX_DIM + depth[None, :]
    inside = (column < num_keys)[:, None] & (depth < INDEX_DIM)[None, :]
    if slot < 0:
        grad_k += tl.load(grad_k_rows + offsets, mask=inside, other=0.0)
        tl.store(grad_k_rows + offsets, grad_k, mask=inside)
    else:
        part = slot * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_k_ptr + part * grad_k.shape[0] * INDEX_DIM + offsets, grad_k, mask=inside)


def loss_constants(config: LossConfig, head_dim: int, index_dim: int, with_grad: bool) -> dict[str, int | bool]:
    """The compile-time arguments of `index_loss_kernel`."""
    return {
        **lse_constants(config, index_dim),
        "HEAD_DIM": head_dim,
        "DEPTH": padded(head_dim),
        "STAGES": config.num_stages,
        "WITH_GRAD": with_grad,
    }
