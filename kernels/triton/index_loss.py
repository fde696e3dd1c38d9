"""The KL divergence that trains the index branch, fused with its closed-form gradient, key blocks in the outer loop.

For each query i and group, over the visible tokens j of its selected blocks, G heads to a group:

    P_j = mean over the heads of exp(scale <q, k_j> - lse)                       teacher
    L_j = index_scale <index_q, index_k_j> - index_lse,  exp(L_j)                student
    loss = sum_j P_j (log P_j - L_j) / count,   dS_j = exp(L_j) - P_j,   unit = index_scale / count
    grad_index_q = unit sum_j dS_j index_k_j,   grad_index_k_j = unit sum_i dS_ij index_q_i

count: the (batch, group, query) that see a key. Layouts: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], index_q [B, Hkv, Sq, Di],
index_k [B, 1, Sk, Di], any strides; the gradients fp32, contiguous, of the shapes of index_q and index_k.

Tokens are worked through in chunks of one group (see `reverse_index`), each in up to five launches:

1. block_lse: a program owns a piece of one block's list, and writes each entry's logsumexp over the block;
2. index_lse: that of each token, over its slots;
3. index_loss: a program owns a piece again. It keeps its block of k and index_k, and walks the entries `rows` at a
   time: the teacher is summed over the heads in registers, one product [rows, D] x [D, keys] a head, so that no
   group size wastes rows. It writes its loss and each entry's share of grad_index_q, and sums grad_index_k;
4. sum_pieces: adds up grad_index_k of the blocks whose lists were cut into several pieces;
5. sum_slots: adds up grad_index_q of each token.

A block too large for the registers is cut into `parts` of `columns` keys, which are programs and partial results of
their own. Every sum has a fixed order, and no two programs write one address: results repeat bit by bit.

Cost for E entries (topk a token and group), block size n: 2 G D n E FLOPs for the teacher and 8 Di n E for the student,
4.4 + 1.1 TFLOP at 128K tokens of M3's shape, 7 ms at 783 TFLOP/s; the G n E exponentials take 5 ms more. Bytes, in
bf16: 2 G D E of q gathered, 34 GB, 8 ms if none of it stays in L2; 2 * 2 Di E of index_q gathered twice, and 2 * 4 Di E
of partial results written and read back, 13 GB, 3 ms. 15 to 20 ms are expected. Memory beside inputs and outputs: the
workspace, the reverse index, and a copy of lse.
"""

import torch
import triton
import triton.language as tl

from ..sequences import key_ranges
from ..workspace import chunk_tokens
from .configs import LossConfig, loss_config, padded, target_of
from .primitives import LN_2, LOG2_E, load_tile
from .reverse_index import ReverseIndex, chunk_origin, chunked_indexes, load_block, load_piece

TINY = tl.constexpr(1.1754943508222875e-38)
# Never worth a kernel of its own: lengths, counts, and what changes from launch to launch.
VARYING = [
    "num_groups",
    "group_size",
    "seqlen_q",
    "seqlen_k",
    "chunk",
    "first_token",
    "num_tokens",
    "chunk_tokens",
    "num_blocks",
    "num_items",
    "num_lists",
    "topk",
]


@triton.jit
def load_part(blocks_ptr, block, COLUMNS: tl.constexpr):
    """(batch, first key, last key + 1, shift) of program_id(1)'s share of a block; of no keys past its end."""
    batch, first_key, stop_key, shift = load_block(blocks_ptr, block)
    first_key += tl.program_id(1) * COLUMNS
    return batch, first_key, tl.minimum(stop_key, first_key + COLUMNS), shift


@triton.jit
def load_rows(base, query, stride_s, stride_d, DIM: tl.constexpr, DEPTH: tl.constexpr):
    """The vectors of the queries [ROWS] as a tile [ROWS, DEPTH]."""
    depth = tl.arange(0, DEPTH)
    rows = base + query.to(tl.int64)[:, None] * stride_s + depth.to(tl.int64)[None, :] * stride_d
    if DIM == DEPTH:
        return tl.load(rows)
    else:
        return tl.load(rows, mask=(depth < DIM)[None, :], other=0.0)


@triton.jit
def load_entries(entries_ptr, begin, entry, num_entries, origin):
    """int32: which of the chunk's entries are those of a piece; the last one again past its end."""
    place = entries_ptr + begin + tl.minimum(entry, num_entries - 1)
    # The low halves suffice, because the difference fits.
    return tl.load(place).to(tl.int32) - origin.to(tl.int32)


@triton.jit(do_not_specialize=VARYING)
def block_lse_kernel(
    index_q_ptr,
    index_k_ptr,
    blocks_ptr,
    entries_ptr,
    offsets_ptr,
    ends_ptr,
    items_ptr,
    partial_lse_ptr,
    stride_xb,
    stride_xh,
    stride_xs,
    stride_xd,
    stride_yb,
    stride_ys,
    stride_yd,
    seqlen_q,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    num_blocks,
    num_items,
    topk,
    index_scale,
    INDEX_DIM: tl.constexpr,
    INDEX_DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """partial_lse [entry, part] of the student's scores, base 2; index_scale is in base 2 as well."""
    block, begin, stop = load_piece(offsets_ptr, ends_ptr, items_ptr, chunk, num_blocks, num_items, LENGTH)
    if block >= num_blocks:
        return
    batch, first_key, stop_key, shift = load_part(blocks_ptr, block, COLUMNS)
    group, origin, token0 = chunk_origin(chunk, first_token, num_tokens, chunk_tokens, topk)
    x_base = index_q_ptr + batch * stride_xb + group * stride_xh
    y_base = index_k_ptr + batch * stride_yb
    index_k = load_tile(y_base, first_key, stop_key - first_key, stride_ys, stride_yd, COLUMNS, INDEX_DIM, INDEX_DEPTH)
    precision: tl.constexpr = "ieee" if index_k.dtype == tl.float32 else "tf32"
    query0 = (token0 - batch * seqlen_q).to(tl.int32)
    num_entries = (stop - begin).to(tl.int32)
    key = first_key + tl.arange(0, COLUMNS)
    for step in range(0, num_entries, ROWS):
        entry = step + tl.arange(0, ROWS)
        local = load_entries(entries_ptr, begin, entry, num_entries, origin)
        query = query0 + local // topk
        index_q = load_rows(x_base, query, stride_xs, stride_xd, INDEX_DIM, INDEX_DEPTH)
        scores = tl.dot(index_q, tl.trans(index_k), input_precision=precision) * index_scale
        seen = key[None, :] < tl.minimum(query + shift + 1, stop_key)[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        largest = tl.max(scores, axis=1)
        offset = tl.where(largest == float("-inf"), 0.0, largest)
        lse = offset + tl.log2(tl.sum(tl.exp2(scores - offset[:, None]), axis=1))
        share = local.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_lse_ptr + share, lse, mask=entry < num_entries)


@triton.jit(do_not_specialize=VARYING)
def index_lse_kernel(
    partial_lse_ptr,
    numbers_ptr,
    index_lse_ptr,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    num_lists,
    topk,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    SHARES: tl.constexpr,
):
    """index_lse [token in chunk], base 2: the logsumexp of partial_lse [token in chunk, slot, part]."""
    _, origin, token0 = chunk_origin(chunk, first_token, num_tokens, chunk_tokens, topk)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.minimum(chunk_tokens, first_token + num_tokens - token0)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in range(0, topk * PARTS, SHARES):
        share = first + tl.arange(0, SHARES)
        inside = live[:, None] & (share < topk * PARTS)[None, :]
        local = row[:, None] * topk + (share // PARTS)[None, :]
        used = tl.load(numbers_ptr + origin + local, mask=inside, other=num_lists) < num_lists
        lse = tl.load(partial_lse_ptr + local * PARTS + (share % PARTS)[None, :], mask=used, other=float("-inf"))
        new_largest = tl.maximum(largest, tl.max(lse, axis=1))
        offset = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        total = total * tl.exp2(largest - offset) + tl.sum(tl.exp2(lse - offset[:, None]), axis=1)
        largest = new_largest
    tl.store(index_lse_ptr + row, largest + tl.log2(total), mask=live)


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
    blocks_ptr,
    entries_ptr,
    offsets_ptr,
    ends_ptr,
    items_ptr,
    slots_ptr,
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
    LENGTH: tl.constexpr,
    STAGES: tl.constexpr,
    WITH_GRAD: tl.constexpr,
):
    """loss [chunk, item, part], partial_q [entry, part, Di] without its factor, and partial_k, or grad_k added to.

    lse [B*Sq, Hq] natural; index_lse [token in chunk], scale and index_scale in base 2; unit: the gradients' factor.
    """
    block, begin, stop = load_piece(offsets_ptr, ends_ptr, items_ptr, chunk, num_blocks, num_items, LENGTH)
    if block >= num_blocks:
        return
    batch, first_key, stop_key, shift = load_part(blocks_ptr, block, COLUMNS)
    group, origin, token0 = chunk_origin(chunk, first_token, num_tokens, chunk_tokens, topk)
    q_base = q_ptr + batch * stride_qb + group * group_size * stride_qh
    k_base = k_ptr + batch * stride_kb + group * stride_kh
    x_base = index_q_ptr + batch * stride_xb + group * stride_xh
    y_base = index_k_ptr + batch * stride_yb
    k = load_tile(k_base, first_key, stop_key - first_key, stride_ks, stride_kd, COLUMNS, HEAD_DIM, DEPTH)
    index_k = load_tile(y_base, first_key, stop_key - first_key, stride_ys, stride_yd, COLUMNS, INDEX_DIM, INDEX_DEPTH)
    precision: tl.constexpr = "ieee" if index_k.dtype == tl.float32 else "tf32"
    query0 = (token0 - batch * seqlen_q).to(tl.int32)
    num_entries = (stop - begin).to(tl.int32)
    lse_base = lse_ptr + (batch * seqlen_q * num_groups + group) * group_size
    num_keys = stop_key - first_key
    lead = shift + 1 - first_key
    column = tl.arange(0, COLUMNS)
    depth = tl.arange(0, INDEX_DEPTH)
    grad_k = tl.zeros([COLUMNS, INDEX_DEPTH], tl.float32)
    loss = tl.zeros([ROWS], tl.float32)
    for step in range(0, num_entries, ROWS):
        entry = step + tl.arange(0, ROWS)
        local = load_entries(entries_ptr, begin, entry, num_entries, origin)
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
            local = tl.load(entries_ptr + begin + entry, mask=entry < num_entries, other=origin) - origin
            share = local * tl.num_programs(1) + tl.program_id(1)
            place = partial_q_ptr + share[:, None] * INDEX_DIM + depth[None, :]
            tl.store(place, grad_q, mask=(entry < num_entries)[:, None] & (depth < INDEX_DIM)[None, :])
    item = tl.cast(chunk, tl.int64) * num_items + tl.program_id(0)
    tl.store(loss_ptr + item * tl.num_programs(1) + tl.program_id(1), tl.sum(loss, axis=0) * LN_2)
    if WITH_GRAD:
        # Read again, so that no registers are held for it in the loop.
        batch, first_key, stop_key, _ = load_part(blocks_ptr, block, COLUMNS)
        store_key_grads(
            grad_k * tl.load(unit_ptr),
            grad_k_ptr + (batch * seqlen_k + first_key) * INDEX_DIM,
            stop_key - first_key,
            partial_k_ptr,
            tl.load(slots_ptr + item),
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
        part = slot.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(partial_k_ptr + part * grad_k.shape[0] * INDEX_DIM + offsets, grad_k, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def sum_pieces_kernel(
    blocks_ptr,
    ends_ptr,
    slots_ptr,
    partial_k_ptr,
    grad_k_ptr,
    seqlen_k,
    chunk,
    num_blocks,
    num_items,
    INDEX_DIM: tl.constexpr,
    INDEX_DEPTH: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad_k += the sum of partial_k [slot, SIZE, Di] over the pieces of a block's list, if it has several.

    Program (block, i) owns ROWS of its keys; SIZE: keys of all its parts.
    """
    block = tl.program_id(0)
    chunk = tl.cast(chunk, tl.int64)
    ends = ends_ptr + chunk * num_blocks + block
    before = tl.load(ends - 1, mask=block > 0, other=0)
    pieces = tl.load(ends) - before
    if pieces < 2:
        return
    batch, first_key, stop_key, _ = load_block(blocks_ptr, block)
    column = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    depth = tl.arange(0, INDEX_DEPTH)
    inside = (first_key + column < stop_key)[:, None] & (depth < INDEX_DIM)[None, :]
    offsets = column[:, None] * INDEX_DIM + depth[None, :]
    slot = tl.load(slots_ptr + chunk * num_items + before).to(tl.int64)
    total = tl.zeros([ROWS, INDEX_DEPTH], tl.float32)
    for piece in range(0, pieces):
        total += tl.load(partial_k_ptr + (slot + piece) * SIZE * INDEX_DIM + offsets, mask=inside, other=0.0)
    place = grad_k_ptr + (batch * seqlen_k + first_key) * INDEX_DIM + offsets
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def sum_slots_kernel(
    numbers_ptr,
    unit_ptr,
    partial_q_ptr,
    grad_q_ptr,
    num_groups,
    seqlen_q,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    num_lists,
    topk,
    INDEX_DIM: tl.constexpr,
    INDEX_DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """grad_q [B, Hkv, Sq, Di] of ROWS tokens: the sums of partial_q over their used slots, in order."""
    group, origin, token0 = chunk_origin(chunk, first_token, num_tokens, chunk_tokens, topk)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.minimum(chunk_tokens, first_token + num_tokens - token0)
    depth = tl.arange(0, INDEX_DEPTH)
    deep = (depth < INDEX_DIM)[None, :]
    grad_q = tl.zeros([ROWS, INDEX_DEPTH], tl.float32)
    for slot in range(0, topk):
        local = row * topk + slot
        used = tl.load(numbers_ptr + origin + local, mask=live, other=num_lists) < num_lists
        for part in tl.static_range(PARTS):
            place = partial_q_ptr + (local * PARTS + part)[:, None] * INDEX_DIM + depth[None, :]
            grad_q += tl.load(place, mask=used[:, None] & deep, other=0.0)
    token = token0 + row
    place = ((token // seqlen_q * num_groups + group) * seqlen_q + token % seqlen_q) * INDEX_DIM
    tl.store(grad_q_ptr + place[:, None] + depth[None, :], grad_q * tl.load(unit_ptr), mask=live[:, None] & deep)


def lse_constants(config: LossConfig, index_dim: int) -> dict[str, int]:
    """The compile-time arguments of `block_lse_kernel`."""
    return {
        "INDEX_DIM": index_dim,
        "INDEX_DEPTH": padded(index_dim),
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "LENGTH": config.length,
    }


def loss_constants(config: LossConfig, head_dim: int, index_dim: int, with_grad: bool) -> dict[str, int | bool]:
    """The compile-time arguments of `index_loss_kernel`."""
    return {
        **lse_constants(config, index_dim),
        "HEAD_DIM": head_dim,
        "DEPTH": padded(head_dim),
        "STAGES": config.num_stages,
        "WITH_GRAD": with_grad,
    }


def slot_bytes(config: LossConfig, parts: int, index_dim: int, with_grad: bool, index_groups: int) -> int:
    """Bytes that one slot of one token takes: partial results, and the reverse index of `index_groups` groups.

    At most two pieces for every `length` entries keep a grad_index_k; the index is taken with what sorting it takes.
    """
    partial = 4 * parts
    if with_grad:
        partial += 4 * parts * index_dim * (config.length + 2 * config.columns) // config.length
    return partial + 32 * index_groups


def run_chunks(
    index: ReverseIndex,
    q: torch.Tensor,
    k: torch.Tensor,
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    lse_rows: torch.Tensor,
    unit: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    block_size: int,
    scale: float,
    index_scale: float,
    with_grad: bool,
    config: LossConfig,
) -> torch.Tensor:
    """The loss of each piece of an index; fills grad_q for the tokens of the index, and adds to grad_k."""
    num_kv_heads, seqlen_q, index_dim = index_q.shape[1:]
    seqlen_k, topk, size = k.shape[2], index.topk, index.chunk_tokens
    parts = triton.cdiv(block_size, config.columns)
    pieces = index.pieces(config.length)
    slots = pieces.slots()
    losses = lse_rows.new_zeros(index.num_chunks, pieces.num_items, parts)
    partial_lse = lse_rows.new_empty(size, topk, parts)
    index_lse = lse_rows.new_empty(size)
    partial_q = lse_rows.new_empty(size if with_grad else 0, topk, parts, index_dim)
    num_slots = min(pieces.num_items, 2 * (size * topk // config.length)) if with_grad else 0
    partial_k = lse_rows.new_empty(num_slots, parts, config.columns, index_dim)
    lists = (index.blocks, index.entries, index.offsets, pieces.ends, pieces.items)
    shares = min(64, triton.next_power_of_2(topk * parts))
    rows = max(16, 1024 // shares)
    dims = {"INDEX_DIM": index_dim, "INDEX_DEPTH": padded(index_dim)}
    for chunk in range(index.num_chunks):
        tokens = (chunk, index.first_token, index.num_tokens, size)
        items = (*tokens, index.num_blocks, pieces.num_items, topk)
        entries = (*tokens, index.num_chunks * index.num_blocks, topk)
        block_lse_kernel[(pieces.num_items, parts)](
            index_q,
            index_k,
            *lists,
            partial_lse,
            *index_q.stride(),
            index_k.stride(0),
            *index_k.stride()[2:],
            seqlen_q,
            *items,
            index_scale * LOG2_E.value,
            **lse_constants(config, index_dim),
            num_warps=4,
            num_stages=config.num_stages,
        )
        index_lse_kernel[(triton.cdiv(size, rows),)](
            partial_lse, index.numbers, index_lse, *entries, PARTS=parts, ROWS=rows, SHARES=shares, num_warps=4
        )
        index_loss_kernel[(pieces.num_items, parts)](
            q,
            k,
            index_q,
            index_k,
            lse_rows,
            index_lse,
            *lists,
            slots,
            unit,
            losses,
            partial_q,
            partial_k,
            grad_k,
            *q.stride(),
            *k.stride(),
            *index_q.stride(),
            index_k.stride(0),
            *index_k.stride()[2:],
            num_kv_heads,
            q.shape[1] // num_kv_heads,
            seqlen_q,
            seqlen_k,
            *items,
            scale * LOG2_E.value,
            index_scale * LOG2_E.value,
            **loss_constants(config, q.shape[3], index_dim, with_grad),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if num_slots > 0:
            sum_pieces_kernel[(index.num_blocks, triton.cdiv(block_size, 16))](
                index.blocks,
                pieces.ends,
                slots,
                partial_k,
                grad_k,
                seqlen_k,
                chunk,
                index.num_blocks,
                pieces.num_items,
                **dims,
                SIZE=parts * config.columns,
                ROWS=16,
                num_warps=4,
            )
        if with_grad:
            sum_slots_kernel[(triton.cdiv(size, 16),)](
                index.numbers,
                unit,
                partial_q,
                grad_q,
                num_kv_heads,
                seqlen_q,
                *entries,
                **dims,
                PARTS=parts,
                ROWS=16,
                num_warps=4,
            )
    return losses


def index_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    block_indices: torch.Tensor | None,
    lse: torch.Tensor,
    sequences: torch.Tensor,
    block_size: int,
    scale: float,
    index_scale: float,
    with_grad: bool,
    config: LossConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, grad_index_q, grad_index_k), as the module's docstring defines them; no gradients unless `with_grad`.

    lse [B, Hq, Sq] is the main branch's, of the same blocks. block_indices [B, Hkv, Sq, topk] may be in any order and
    hold -1, repeats, ids out of range and blocks that the query does not see; None stands for every visible block.
    `config` overrides the choice of tiles.
    """
    loss = torch.zeros((), dtype=torch.float64, device=q.device)
    grad_q = torch.zeros(index_q.shape if with_grad else 0, dtype=torch.float32, device=q.device)
    grad_k = torch.zeros(index_k.shape if with_grad else 0, dtype=torch.float32, device=q.device)
    batch, _, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k, index_dim = k.shape[1], k.shape[2], index_q.shape[3]
    topk = triton.cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    if q.numel() == 0 or topk == 0 or seqlen_k == 0:
        return loss.float(), grad_q, grad_k
    config = config or loss_config(
        target_of(q.device),
        head_dim=head_dim,
        index_head_dim=index_dim,
        block_size=block_size,
        element_size=q.element_size(),
    )
    start, end = key_ranges(sequences, batch, seqlen_q)
    count = ((end > start).sum() * num_kv_heads).clamp(min=1)
    unit = (index_scale / count).float()
    lse_rows = lse.transpose(1, 2).contiguous()
    parts = triton.cdiv(block_size, config.columns)
    index_groups = num_kv_heads if block_indices is None else 0
    size = chunk_tokens(batch * seqlen_q, topk * slot_bytes(config, parts, index_dim, with_grad, index_groups))
    for index in chunked_indexes(block_indices, sequences, q, k, block_size, size):
        losses = run_chunks(
            index,
            q,
            k,
            index_q,
            index_k,
            lse_rows,
            unit,
            grad_q,
            grad_k,
            block_size,
            scale,
            index_scale,
            with_grad,
            config,
        )
        loss += losses.sum(dtype=torch.float64)
    return (loss / count).float(), grad_q, grad_k
