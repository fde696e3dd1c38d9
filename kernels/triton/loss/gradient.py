"""The index loss's main kernel: the loss of one work item, and its gradients on the way.

Program (i, part, n) owns work item i of range n of a pass, and one part of its block. It keeps its part of k and
index_k, and takes the entries `rows` at a time. The teacher is summed over the heads in registers: one product
[rows, D] x [D, keys] per head, so that no group size wastes rows. The program writes its loss and each entry's share of
grad_index_q, and sums grad_index_k. See `launch` for the formulas and the cost, and `given_teacher` for the case that
the backward leaves the teacher.
"""

import triton
import triton.language as tl

from ..common.launch import Launch, Options
from ..common.softmax import LN_2, LOG2_E
from ..common.tiles import load_tile
from ..schedule.inverse_index import count_seen
from .loads import LossCall, find_entries, load_entries, load_index_keys, load_part, load_rows

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def fast_log2(x):
    """log2 of normal x > 0, off by at most 1.5e-7: x = 2^n (1 + t), |t| <= 1/3, and a polynomial in t.

    tl.log2 takes three times the instructions, and more registers.
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
def sum_teacher(q, q_base, lse_rows, k, query, group_size, scale, head_dim: tl.constexpr, stages: tl.constexpr):
    """Sum over a group's heads of exp2(scale <q, k> - lse log2(e)), [ROWS, COLUMNS]; q_base: the first head's rows."""
    precision: tl.constexpr = "ieee" if k.dtype == tl.float32 else "tf32"
    teacher = tl.zeros([query.shape[0], k.shape[0]], tl.float32)
    for head in tl.range(0, group_size, num_stages=stages):
        lse = tl.load(lse_rows + head) * LOG2_E
        base = q_base + tl.cast(head, tl.int64) * q.stride_h
        rows = load_rows(base, query, q.stride_s, q.stride_d, head_dim, k.shape[1])
        scores = tl.dot(rows, tl.trans(k), input_precision=precision)
        teacher += tl.exp2(scores * scale - lse[:, None])
    return teacher


@triton.jit
def store_key_gradients(grad_k, part, gradients, sizes, index_head_dim: tl.constexpr):
    """Add grad_k [COLUMNS, DEPTH] to the gradient if the part's list has no other work item; else keep it apart."""
    column = tl.arange(0, grad_k.shape[0])
    depth = tl.arange(0, grad_k.shape[1])
    offsets = column[:, None] * index_head_dim + depth[None, :]
    inside = (column < part.stop_key - part.first_key)[:, None] & (depth < index_head_dim)[None, :]
    if part.slot < 0:
        row = (tl.program_id(2) * sizes.batch + part.batch) * sizes.seqlen_k + part.first_key
        rows = gradients.grad_k + row * index_head_dim
        grad_k += tl.load(rows + offsets, mask=inside, other=0.0)
        tl.store(rows + offsets, grad_k, mask=inside)
    else:
        number = part.slot * tl.num_programs(1) + tl.program_id(1)
        tl.store(gradients.partial_k + number * grad_k.shape[0] * index_head_dim + offsets, grad_k, mask=inside)


@triton.jit
def index_loss_kernel(q, k, index_q, index_k, buffers, index, items, gradients, sizes, first_range, C: tl.constexpr):
    """losses; partial_q without its factor; partial_k, or an addition to grad_k. Gradients may be None."""
    COLUMNS: tl.constexpr = C.columns
    ROWS: tl.constexpr = C.rows
    INDEX_DEPTH: tl.constexpr = C.index_depth
    part = load_part(items, first_range, COLUMNS)
    if part.begin >= part.stop:
        return
    own = find_entries(part, index_q, index, items, sizes, first_range)
    num_entries, num_keys = own.number, part.stop_key - part.first_key
    y = load_index_keys(index_k, part, C)
    precision: tl.constexpr = "ieee" if y.dtype == tl.float32 else "tf32"
    q_base = q.ptr + part.batch * q.stride_b + own.group * sizes.group_size * q.stride_h
    k_base = k.ptr + part.batch * k.stride_b + own.group * k.stride_h
    keys = load_tile(k_base, part.first_key, num_keys, k.stride_s, k.stride_d, COLUMNS, C.head_dim, C.depth)
    lse_base = buffers.lse + (part.batch * sizes.seqlen_q * sizes.num_kv_heads + own.group) * sizes.group_size
    lead = part.shift + 1 - part.first_key
    column = tl.arange(0, COLUMNS)
    depth = tl.arange(0, INDEX_DEPTH)
    grad_k = tl.zeros([COLUMNS, INDEX_DEPTH], tl.float32)
    loss = tl.zeros([ROWS], tl.float32)
    for step in range(0, num_entries, ROWS):
        number = step + tl.arange(0, ROWS)
        entry = load_entries(own.entries_ptr, number, num_entries, own.first_entry)
        query = own.first_query + entry // index.topk
        x = load_rows(own.x_base, query, index_q.stride_s, index_q.stride_d, C.index_head_dim, INDEX_DEPTH)
        lse_rows = lse_base + query.to(tl.int64) * (sizes.num_kv_heads * sizes.group_size)
        teacher = sum_teacher(q, q_base, lse_rows, keys, query, sizes.group_size, sizes.scale, C.head_dim, C.stages)
        log_student = tl.zeros([ROWS, COLUMNS], tl.float32)
        # Always true. Without the branch Triton sees that this product feeds another, and gives each warp whole rows:
        # with 64 rows for 8 warps, half of the warps would repeat the work of the others.
        if step < num_entries:
            log_student = tl.dot(x, tl.trans(y), input_precision=precision)
        log_student = log_student * sizes.index_scale - tl.load(buffers.index_lse + entry // index.topk)[:, None]
        num_seen = count_seen(index, query + lead, part.batch, query, part.first_key, sizes.seqlen_q)
        num_seen = tl.where(number < num_entries, tl.minimum(num_seen, num_keys), 0)
        seen = column[None, :] < num_seen[:, None]
        teacher = tl.where(seen, teacher * (1.0 / sizes.group_size), 0.0)
        ratio = fast_log2(tl.maximum(teacher, TINY)) - log_student
        loss += tl.sum(tl.where(teacher > 0.0, teacher * ratio, 0.0), axis=1)
        if gradients is not None:
            grad_scores = (tl.where(seen, tl.exp2(log_student), 0.0) - teacher).to(y.dtype)
            grad_k = tl.dot(tl.trans(grad_scores), x, grad_k, input_precision=precision)
            grad_q = tl.dot(grad_scores, y, input_precision=precision)
            # Loaded again, so that no registers are held for it over the loop of the teacher.
            entry = tl.load(own.entries_ptr + number, mask=number < num_entries, other=own.first_entry)
            share = (entry - own.first_entry) * tl.num_programs(1) + tl.program_id(1)
            place = gradients.partial_q + share[:, None] * C.index_head_dim + depth[None, :]
            tl.store(place, grad_q, mask=(number < num_entries)[:, None] & (depth < C.index_head_dim)[None, :])
    item = tl.cast(first_range + tl.program_id(2), tl.int64) * items.num_items + tl.program_id(0)
    tl.store(buffers.losses + item * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, axis=0) * LN_2)
    if gradients is not None:
        # Loaded again, so that no registers are held for it in the loop.
        part = load_part(items, first_range, COLUMNS)
        store_key_gradients(grad_k * tl.load(gradients.unit), part, gradients, sizes, C.index_head_dim)


def loss_and_gradients(x: LossCall) -> Launch:
    """Fills the losses and partial gradients of a pass."""
    grid = x.items.num_items, x.constants.parts, 1
    arguments = x.arguments(index_loss_kernel)
    options = Options(x.config.num_warps, x.config.num_stages)
    return Launch(index_loss_kernel, grid, arguments, {"C": x.constants}, options)
