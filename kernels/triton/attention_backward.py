"""Backward of block-sparse attention: one pass over the key/value blocks and the queries that chose them.

    P = exp(scale Q K^T - lse),  dS = P * (dO V^T - delta),  delta = rowsum(dO * O) - dlse
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO        a query that sees no key gets 0

Layouts: q, out, grad_out [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], lse, grad_lse [B, Hq, Sq] fp32, any strides;
block_indices [B, Hkv, Sq, topk], or None for every visible block; sequences as in `flexmsa.kernels`. The gradients are
contiguous. Nothing is accumulated across programs, so that the results are the same bits every time.

The work goes chunk by chunk (see `reverse_index`), four launches each:

- `gather_kernel` writes, in the order of the lists, what is needed of each entry and of its G rows;
- `gradient_kernel`: one program owns one piece of a block's list. It holds K, V, dK and dV of the block and walks the
  rows, row r being head r % G of entry r // G. It writes the rows' own share of dQ, [entries, G, D] in q's dtype (heads
  innermost if G is a multiple of 8: that is how the products leave them), and adds dK and dV to the fp32 sums if the
  list has no other piece; else they are kept apart. If registers cannot hold dK and dV of a whole block, there is a
  launch for each part of its keys;
- `sum_pieces_kernel`: one program owns some keys of a block whose list has several pieces, and adds them in order;
- `sum_slots_kernel`: one program owns some heads of one token, and sums dQ over its slots in order.

For E = B Hkv Sq topk entries and R = E G rows: 10 R block_size D FLOPs; 2 R D elements of q and dO are gathered, R D of
dQ written and read again. At M3's shape and 128K tokens, bf16: 22 TFLOP, 28 ms, beside 68 + 69 GB, 32 ms, of which the
reading of dQ, 8 ms, does not overlap with the products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..workspace import chunk_tokens
from .configs import BackwardConfig, backward_config, padded, target_of
from .primitives import LOG2_E
from .reverse_index import Pieces, ReverseIndex, chunk_origin, chunked_indexes, load_block


@triton.jit
def statistics_kernel(
    grad_out_ptr,
    grad_lse_ptr,
    out_ptr,
    lse_ptr,
    delta_ptr,
    lse2_ptr,
    stride_gb,
    stride_gh,
    stride_gs,
    stride_gd,
    stride_mb,
    stride_mh,
    stride_ms,
    stride_ob,
    stride_oh,
    stride_os,
    stride_od,
    stride_lb,
    stride_lh,
    stride_ls,
    seqlen_q,
    num_kv_heads,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    GRAD_LSE: tl.constexpr,
):
    """delta, and lse in base 2, [B, Hkv, Sq, G]: program (i, b * Hkv + group) owns ROWS neighbouring numbers."""
    pair = tl.program_id(1).to(tl.int64)
    batch, group = pair // num_kv_heads, pair % num_kv_heads
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < tl.cast(seqlen_q, tl.int64) * HEADS
    query, head = row // HEADS, group * HEADS + row % HEADS
    depth = tl.arange(0, DEPTH)[None, :]
    mask = live[:, None] & (depth < HEAD_DIM)
    depth = depth.to(tl.int64)
    grad_rows = grad_out_ptr + batch * stride_gb + head * stride_gh + query * stride_gs
    out_rows = out_ptr + batch * stride_ob + head * stride_oh + query * stride_os
    grad = tl.load(grad_rows[:, None] + depth * stride_gd, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_rows[:, None] + depth * stride_od, mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, axis=1)
    if GRAD_LSE:
        grad_lse = grad_lse_ptr + batch * stride_mb + head * stride_mh + query * stride_ms
        delta -= tl.load(grad_lse, mask=live, other=0.0)
    lse = tl.load(lse_ptr + batch * stride_lb + head * stride_lh + query * stride_ls, mask=live, other=0.0)
    place = pair * seqlen_q * HEADS + row
    tl.store(delta_ptr + place, delta, mask=live)
    # +inf makes every probability of a row that sees no key 0.
    tl.store(lse2_ptr + place, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), mask=live)


@triton.jit(do_not_specialize=["chunk", "first_token", "num_tokens", "chunk_tokens"])
def gather_kernel(
    blocks_ptr,
    numbers_ptr,
    entries_ptr,
    offsets_ptr,
    delta_ptr,
    lse2_ptr,
    queries_ptr,
    limits_ptr,
    places_ptr,
    row_delta_ptr,
    row_lse2_ptr,
    chunk,
    first_token,
    num_tokens,
    chunk_tokens,
    num_blocks,
    topk,
    seqlen_q,
    num_kv_heads,
    HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    LANES: tl.constexpr,
):
    """The query of each entry of the chunk, how many keys of its block it sees, and its rows' delta and lse.

    All in the order of the lists; places[token of the chunk, slot] is where in that order an entry went. Program i owns
    ENTRIES of them.
    """
    chunk = tl.cast(chunk, tl.int64)
    begin = tl.load(offsets_ptr + chunk * num_blocks)
    count = tl.load(offsets_ptr + (chunk + 1) * num_blocks) - begin
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    live = place < count
    entry = tl.load(entries_ptr + begin + place, mask=live, other=0)
    block = tl.load(numbers_ptr + entry, mask=live, other=0) - chunk * num_blocks
    group, origin, token0 = chunk_origin(chunk, first_token, num_tokens, chunk_tokens, topk)
    # Tokens, and entries of a chunk, are numbered in 32 bits, and divided much faster so.
    local = tl.where(live, entry - origin, 0).to(tl.int32)
    token = token0.to(tl.int32) + local // topk
    batch, query = (token // seqlen_q).to(tl.int64), token % seqlen_q
    first_key = tl.load(blocks_ptr + block * 4 + 1, mask=live, other=0)
    stop_key = tl.load(blocks_ptr + block * 4 + 2, mask=live, other=0)
    shift = tl.load(blocks_ptr + block * 4 + 3, mask=live, other=0)
    limit = tl.minimum(stop_key, query + shift + 1) - first_key
    tl.store(queries_ptr + place, query, mask=live)
    tl.store(limits_ptr + place, limit, mask=live)
    tl.store(places_ptr + local, place.to(tl.int32), mask=live)

    head = tl.arange(0, LANES)[None, :]
    mask = live[:, None] & (head < HEADS)
    source = (((batch * num_kv_heads + group) * seqlen_q + query) * HEADS)[:, None] + head
    row = place[:, None] * HEADS + head
    tl.store(row_delta_ptr + row, tl.load(delta_ptr + source, mask=mask), mask=mask)
    tl.store(row_lse2_ptr + row, tl.load(lse2_ptr + source, mask=mask), mask=mask)


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
def partial_offsets(row, depth, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where element `depth` of row `row` is kept in a partial dQ."""
    if HEADS % 8 == 0:
        return row // HEADS * (HEADS * HEAD_DIM) + row % HEADS + depth * HEADS
    else:
        return row * HEAD_DIM + depth


@triton.jit(do_not_specialize=["group"])
def gradient_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    blocks_ptr,
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
    group,
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
    OFFSET: tl.constexpr,
):
    """See the module's docstring. Program i owns item i of `plan_pieces`, and COLUMNS of its block's keys from OFFSET.

    If that is not the first, grad_q is added to what the launch for the keys before has left.
    """
    item = plan_ptr + tl.program_id(0) * 4
    first, last = tl.load(item + 1), tl.load(item + 2)
    if first >= last:
        return
    batch, first_key, stop_key, _ = load_block(blocks_ptr, tl.load(item))
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
        head = (row % HEADS).to(tl.int64)
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
        place = partial_offsets((row - entry * HEADS)[None, :], depth[:, None], HEADS, HEAD_DIM)
        mask = live[None, :] if HEAD_DIM == DEPTH else live[None, :] & (depth < HEAD_DIM)[:, None]
        if OFFSET > 0:
            grad_q += tl.load(partial_q + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(partial_q + place, grad_q.to(partial_q_ptr.dtype.element_ty), mask=mask)

    # Loaded again: the loop leaves no register to keep them in.
    item = plan_ptr + tl.program_id(0) * 4
    batch, first_key, stop_key, _ = load_block(blocks_ptr, tl.load(item))
    inside = (first_key + column < stop_key)[:, None] & (depth < HEAD_DIM)[None, :]
    slot = tl.load(item + 3).to(tl.int64)
    alone = slot < 0
    place = tl.where(alone, (batch * num_kv_heads + group) * seqlen_k + first_key, slot * BLOCK) * HEAD_DIM
    tile = column[:, None] * HEAD_DIM + depth[None, :]
    # Not `inside & alone`, which the interpreter turns into integers.
    summed = inside & (column < tl.where(alone, BLOCK, 0))[:, None]
    k_tile = tl.where(alone, grad_k_ptr, partial_k_ptr) + place + tile
    tl.store(k_tile, grad_k * scale + tl.load(k_tile, mask=summed, other=0.0), mask=inside)
    v_tile = tl.where(alone, grad_v_ptr, partial_v_ptr) + place + tile
    tl.store(v_tile, grad_v + tl.load(v_tile, mask=summed, other=0.0), mask=inside)


@triton.jit(do_not_specialize=["chunk", "group"])
def sum_pieces_kernel(
    blocks_ptr,
    plan_ptr,
    ends_ptr,
    partial_k_ptr,
    partial_v_ptr,
    grad_k_ptr,
    grad_v_ptr,
    chunk,
    group,
    seqlen_k,
    num_kv_heads,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Add the pieces of block program_id(0)'s list, if there are several, to KEYS of its keys' gradients."""
    block = tl.program_id(0)
    place = tl.cast(chunk, tl.int64) * tl.num_programs(0) + block
    before = tl.load(ends_ptr + place - 1, mask=block > 0, other=0)
    pieces = tl.load(ends_ptr + place) - before
    if pieces < 2:
        return
    slot = tl.load(plan_ptr + before * 4 + 3).to(tl.int64)
    batch, first_key, stop_key, _ = load_block(blocks_ptr, block)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)[:, None]
    depth = tl.arange(0, DEPTH)[None, :]
    mask = (first_key + key < stop_key) & (key < BLOCK) & (depth < HEAD_DIM)
    tile = key * HEAD_DIM + depth
    place = ((batch * num_kv_heads + group) * seqlen_k + first_key) * HEAD_DIM + tile
    grad_k = tl.load(grad_k_ptr + place, mask=mask, other=0.0)
    grad_v = tl.load(grad_v_ptr + place, mask=mask, other=0.0)
    for piece in range(0, pieces):
        partial = (slot + piece) * BLOCK * HEAD_DIM + tile
        grad_k += tl.load(partial_k_ptr + partial, mask=mask, other=0.0)
        grad_v += tl.load(partial_v_ptr + partial, mask=mask, other=0.0)
    tl.store(grad_k_ptr + place, grad_k, mask=mask)
    tl.store(grad_v_ptr + place, grad_v, mask=mask)


@triton.jit(do_not_specialize=["group", "token0"])
def sum_slots_kernel(
    places_ptr,
    partial_q_ptr,
    grad_q_ptr,
    group,
    token0,
    seqlen_q,
    num_kv_heads,
    topk,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """grad_q [B, Hq, Sq, D] of TILE heads of token `token0 + program_id(0)`; a slot of no list has place -1."""
    local = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    depth = tl.arange(0, DEPTH)[None, :]
    mask = (head < HEADS) & (depth < HEAD_DIM)
    offsets = partial_offsets(head, depth, HEADS, HEAD_DIM)
    grad_q = tl.zeros([TILE, DEPTH], tl.float32)
    for first_slot in range(0, topk, SLOTS):
        slot = first_slot + tl.arange(0, SLOTS)
        place = tl.load(places_ptr + local * topk + slot, mask=slot < topk, other=-1).to(tl.int64)[:, None, None]
        partial = partial_q_ptr + place * (HEADS * HEAD_DIM) + offsets[None, :, :]
        partial = tl.load(partial, mask=(place >= 0) & mask[None, :, :], other=0.0)
        grad_q += tl.sum(partial.to(tl.float32), axis=0)
    token = tl.cast(token0, tl.int64) + local
    batch, query = token // seqlen_q, token % seqlen_q
    row = ((batch * num_kv_heads + group) * HEADS + head) * seqlen_q + query
    tl.store(grad_q_ptr + row * HEAD_DIM + depth, grad_q.to(grad_q_ptr.dtype.element_ty), mask=mask)


def plan_pieces(index: ReverseIndex, pieces: Pieces) -> Tensor:
    """[num_chunks, num_items, 4] int32: (block, first entry, last entry + 1, slot) of each piece.

    Entries count from the chunk's first; slot as in `Pieces.slots`. Items beyond the last piece own no entry.
    """
    starts = index.offsets[:-1].view(index.num_chunks, index.num_blocks)
    stops = index.offsets[1:].view(index.num_chunks, index.num_blocks)
    block = pieces.items.clamp(max=index.num_blocks - 1).long()
    before = torch.nn.functional.pad(pieces.ends, (1, -1))
    item = torch.arange(pieces.num_items, dtype=torch.int32, device=block.device)
    first = (starts - starts[:, :1]).gather(1, block) + (item - before.gather(1, block)) * pieces.length
    last = torch.minimum((stops - starts[:, :1]).gather(1, block), first + pieces.length)
    last = torch.where(pieces.items < index.num_blocks, last, first)
    return torch.stack([block, first, last, pieces.slots()], 2).int()


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
    }


def row_statistics(
    grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, num_kv_heads: int
) -> tuple[Tensor, Tensor]:
    """delta and the lse in base 2, [B, Hkv, Sq, G] fp32."""
    batch, num_heads, seqlen_q, head_dim = out.shape
    group_size = num_heads // num_kv_heads
    delta, lse2 = (lse.new_empty(batch, num_kv_heads, seqlen_q, group_size) for _ in range(2))
    depth = padded(head_dim)
    rows = max(16, 4096 // depth)
    given = lse if grad_lse is None else grad_lse
    statistics_kernel[(triton.cdiv(seqlen_q * group_size, rows), batch * num_kv_heads)](
        grad_out,
        given,
        out,
        lse,
        delta,
        lse2,
        *grad_out.stride(),
        *given.stride(),
        *out.stride(),
        *lse.stride(),
        seqlen_q,
        num_kv_heads,
        HEADS=group_size,
        HEAD_DIM=head_dim,
        ROWS=rows,
        DEPTH=depth,
        GRAD_LSE=grad_lse is not None,
        num_warps=4,
    )
    return delta, lse2


def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor | None,
    sequences: Tensor,
    block_size: int,
    scale: float,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v from the gradients of out and lse (None for zero).

    `config` overrides the choice of tiles, for tests and tuning.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1:3]
    group_size = num_heads // num_kv_heads
    topk = triton.cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    grad_k, grad_v = (lse.new_zeros(k.shape) for _ in range(2))
    if q.numel() * topk * seqlen_k == 0:
        return q.new_zeros(q.shape), grad_k.to(k.dtype), grad_v.to(v.dtype)
    grad_q = q.new_empty(q.shape)
    config = config or backward_config(
        target_of(q.device),
        group_size=group_size,
        head_dim=head_dim,
        block_size=block_size,
        element_size=q.element_size(),
    )
    delta, lse2 = row_statistics(grad_out, grad_lse, out, lse, num_kv_heads)

    step = chunk_tokens(batch * seqlen_q, topk * group_size * head_dim * q.element_size())
    # Rows of a chunk are numbered in 32 bits.
    step = max(1, min(step, (2**31 - 1) // (topk * group_size) - 2 * config.rows))
    num_entries = min(step, batch * seqlen_q) * topk
    num_slots = 2 * num_entries // config.length if num_entries > config.length else 0
    partial_q = q.new_empty(num_entries, group_size, head_dim)
    partial_k, partial_v = (lse.new_empty(num_slots, block_size, head_dim) for _ in range(2))
    queries, limits, places = (sequences.new_empty(num_entries) for _ in range(3))
    row_delta, row_lse2 = (lse.new_empty(num_entries, group_size) for _ in range(2))

    lanes = triton.next_power_of_2(group_size)
    entries = max(1, 1024 // lanes)
    constants = gradient_constants(config, group_size, head_dim, block_size)
    depth = constants["DEPTH"]
    heads = min(lanes, max(1, 2048 // depth))
    for index in chunked_indexes(block_indices, sequences, q, k, block_size, step):
        pieces = index.pieces(config.length)
        plans = plan_pieces(index, pieces)
        for chunk, plan in enumerate(plans):
            chunks = index.num_chunks // num_kv_heads
            group, first_token = chunk // chunks, chunk % chunks * index.chunk_tokens
            tokens = min(index.chunk_tokens, index.num_tokens - first_token)
            places.fill_(-1)
            gather_kernel[(triton.cdiv(tokens * topk, entries),)](
                index.blocks,
                index.numbers,
                index.entries,
                index.offsets,
                delta,
                lse2,
                queries,
                limits,
                places,
                row_delta,
                row_lse2,
                chunk,
                index.first_token,
                index.num_tokens,
                index.chunk_tokens,
                index.num_blocks,
                topk,
                seqlen_q,
                num_kv_heads,
                HEADS=group_size,
                ENTRIES=entries,
                LANES=lanes,
                num_warps=4,
            )
            for offset in range(0, block_size, config.columns):
                gradient_kernel[(pieces.num_items,)](
                    grad_out,
                    q,
                    k,
                    v,
                    index.blocks,
                    plan,
                    queries,
                    limits,
                    row_delta,
                    row_lse2,
                    partial_q,
                    partial_k,
                    partial_v,
                    grad_k,
                    grad_v,
                    *grad_out.stride(),
                    *q.stride(),
                    *k.stride(),
                    *v.stride(),
                    group,
                    seqlen_k,
                    num_kv_heads,
                    scale,
                    **constants,
                    OFFSET=offset,
                    num_warps=config.num_warps,
                    num_stages=config.num_stages,
                )
            if num_slots > 0:
                sum_pieces_kernel[(index.num_blocks, triton.cdiv(block_size, 16))](
                    index.blocks,
                    plan,
                    pieces.ends,
                    partial_k,
                    partial_v,
                    grad_k,
                    grad_v,
                    chunk,
                    group,
                    seqlen_k,
                    num_kv_heads,
                    HEAD_DIM=head_dim,
                    BLOCK=block_size,
                    KEYS=16,
                    DEPTH=depth,
                    num_warps=4,
                )
            sum_slots_kernel[(tokens, triton.cdiv(group_size, heads))](
                places,
                partial_q,
                grad_q,
                group,
                index.first_token + first_token,
                seqlen_q,
                num_kv_heads,
                topk,
                HEADS=group_size,
                HEAD_DIM=head_dim,
                SLOTS=4,
                TILE=heads,
                DEPTH=depth,
                num_warps=max(1, min(8, heads * depth // 256)),
            )
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)
