"""Attention of a few queries over the chosen blocks of a cache, contiguous or paged.

    out[i, h] = sum_j p_j v[j],  p = softmax(scale * <q[i, h], k[j]>)  over the visible keys j of the chosen blocks
    lse[i, h] = log sum_j exp(scale * <q[i, h], k[j]>)                 natural log, fp32

Layouts: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], any strides; block_indices [B, Hkv, Sq, topk] int32, ids relative to
the query's sequence, anything that is no visible block is skipped; out [B, Hq, Sq, D] in q's dtype, lse [B, Hq, Sq]
fp32, contiguous. Hq = G * Hkv, heads of a group being neighbours. Sequences as in `flexmsa.kernels`; keys outside
them, and keys that the query does not see, are never read. With page_table [B, max_pages], k and v are pages
[num_pages, Hkv, block_size, D]. In e4m3 they have scales of their shape but for D, and are brought into q's dtype once
loaded.

One program of the attention owns one query of one group, all G heads of it as the rows of its tile, and a share of
the topk chosen blocks, walked `chunk` keys at a step. With more than one share it writes a normalised partial out and
its lse, [B*Hq*Sq, splits, D] and [B*Hq*Sq, splits] fp32, and a second kernel weighs them together, one program a head.

Cost: 2 Hkv topk block_size D elements of k and v are read per query, 4 MB at M3's shape in bf16, 1 us; scoring before
it reads Sk Di elements, 60 us at 1M keys (see `selection`). What is left is the latency of the launches: append,
select and attend, and a second one of the latter two where their work is split.
"""

import torch
import triton
import triton.language as tl

from .attention import block_sparse_attention_forward
from .configs import AttendConfig, attend_config
from .fp8 import Cache, as_bits, load_vectors
from .primitives import (
    LN_2,
    LOG2_E,
    await_previous,
    find_tile,
    load_sequence,
    locate_block,
    page_arguments,
    softmax_update,
    tile_ends,
)
from .targets import padded, storage_constants, target_of

# With more queries a sequence, and more pairs of a query and a group in all, the tiles of `attention` gain more from
# sharing what neighbours load than their many launches cost: measured on an H200 at M3's shape.
FEW_QUERIES, FEW_ROWS = 16, 8192


@triton.jit
def find_keys(
    ids, ids_ptr, stride_ik, step, visible, page_table_ptr, max_pages, num_pages, batch, k_start,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """The keys of a step: (row of the cache, first key, how many), none if its block is not to be attended to.

    `ids` are all choices of the query: a block that is chosen twice is attended to once.
    """
    CHUNKS: tl.constexpr = (BLOCK + CHUNK - 1) // CHUNK
    slot = step // CHUNKS
    block = tl.load(ids_ptr + slot * stride_ik)
    earlier = (ids == block) & (tl.arange(0, ids.shape[0]) < slot)
    fresh = tl.max(earlier.to(tl.int32), axis=0) == 0
    chosen = fresh & (block >= 0) & (block < tl.cdiv(visible, BLOCK))
    block = tl.where(chosen, block, 0).to(tl.int32)
    first = step % CHUNKS * CHUNK
    count = tl.where(chosen, tl.minimum(visible - block * BLOCK, BLOCK) - first, 0)
    row, key = locate_block(page_table_ptr, max_pages, batch, k_start, block, num_pages, BLOCK, PAGED)
    return row, (key + first).to(tl.int64), count


@triton.jit(do_not_specialize=["num_sequences", "seqlen_q", "seqlen_k", "max_pages", "num_pages", "num_splits"])
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    block_indices_ptr,
    sequences_ptr,
    tile_ends_ptr,
    page_table_ptr,
    out_ptr,
    lse_ptr,
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
    stride_ib,
    stride_ih,
    stride_is,
    stride_ik,
    num_sequences,
    seqlen_q,
    seqlen_k,
    max_pages,
    num_pages,
    num_splits,
    scale,
    GROUPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOPK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    DEPTH: tl.constexpr,
    TABLE: tl.constexpr,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """See the module's docstring. Grid (queries, GROUPS, splits); HEADS is G, and out and lse [B*Hq*Sq, splits, ..]."""
    await_previous(OVERLAP)
    sequence, offset = find_tile(tl.program_id(0), tile_ends_ptr, num_sequences, seqlen_q, 1, TABLE)
    if sequence >= num_sequences:
        return
    batch, q_start, q_end, k_start, k_end = load_sequence(sequences_ptr, sequence)
    token = q_start + offset
    if token >= q_end:
        return
    group = tl.program_id(1).to(tl.int64)
    visible = k_end - k_start - q_end + token + 1
    token = token.to(tl.int64)

    head = tl.arange(0, ROWS)
    depth = tl.arange(0, DEPTH)
    live = (head < HEADS)[:, None] & (depth < HEAD_DIM)[None, :]
    q_heads = (group * HEADS + head)[:, None] * stride_qh + depth.to(tl.int64)[None, :] * stride_qd
    q = tl.load(q_ptr + batch * stride_qb + token * stride_qs + q_heads, mask=live, other=0.0)
    ids_ptr = block_indices_ptr + batch * stride_ib + group * stride_ih + token * stride_is

    CHUNKS: tl.constexpr = (BLOCK + CHUNK - 1) // CHUNK
    share = tl.cdiv(TOPK * CHUNKS, num_splits)
    begin = tl.program_id(2) * share
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    acc = tl.zeros([ROWS, DEPTH], tl.float32)
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    end = tl.where(visible > 0, tl.minimum(begin + share, TOPK * CHUNKS), begin)
    slot = tl.arange(0, SLOTS)
    ids = tl.load(ids_ptr + slot * stride_ik, mask=slot < TOPK, other=-1)
    # Found a step ahead: what an address waits for would keep the loads of keys from running ahead.
    row, key, count = find_keys(
        ids, ids_ptr, stride_ik, tl.minimum(begin, end - 1), visible, page_table_ptr, max_pages, num_pages, batch,
        k_start, BLOCK, CHUNK, PAGED,
    )  # fmt: skip
    for step in range(begin, end):
        vector = (row * GROUPS + group) * seqlen_k + key
        k = load_vectors(
            k_ptr + row * stride_kb + group * stride_kh + key * stride_ks, k_scale_ptr + vector, count,
            stride_ks, stride_kd, q.dtype, CHUNK, HEAD_DIM, DEPTH, SCALED, NATIVE,
        )  # fmt: skip
        v = load_vectors(
            v_ptr + row * stride_vb + group * stride_vh + key * stride_vs, v_scale_ptr + vector, count,
            stride_vs, stride_vd, q.dtype, CHUNK, HEAD_DIM, DEPTH, SCALED, NATIVE,
        )  # fmt: skip
        scores = tl.dot(q, tl.trans(k), input_precision=precision) * (scale * LOG2_E)
        scores = tl.where((tl.arange(0, CHUNK) < count)[None, :], scores, float("-inf"))
        acc, row_max, row_sum = softmax_update(acc, row_max, row_sum, scores, v)
        row, key, count = find_keys(
            ids, ids_ptr, stride_ik, tl.minimum(step + 1, end - 1), visible, page_table_ptr, max_pages, num_pages,
            batch, k_start, BLOCK, CHUNK, PAGED,
        )  # fmt: skip

    seen = row_sum > 0.0
    total = tl.where(seen, row_sum, 1.0)
    lse = tl.where(seen, (row_max + tl.log2(total)) * LN_2, float("-inf"))
    query = (batch * GROUPS * HEADS + group * HEADS + head) * seqlen_q + token
    place = query * num_splits + tl.program_id(2)
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place[:, None] * HEAD_DIM + depth[None, :], out, mask=live)
    tl.store(lse_ptr + place, lse, mask=head < HEADS)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out and lse of one query row from partials: lse = log sum_s exp(lse_s), out = sum_s exp(lse_s - lse) out_s."""
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    depth = tl.arange(0, DEPTH)
    place = row * num_splits + split
    lse = tl.load(partial_lse_ptr + place, mask=split < num_splits, other=float("-inf"))
    live = (split < num_splits)[:, None] & (depth < HEAD_DIM)[None, :]
    partial = tl.load(partial_out_ptr + place[:, None] * HEAD_DIM + depth[None, :], mask=live, other=0.0)
    largest = tl.max(lse, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2((lse - shift) * LOG2_E)
    total = tl.sum(weights, axis=0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + depth, out.to(out_ptr.dtype.element_ty), mask=depth < HEAD_DIM)
    tl.store(lse_ptr + row, tl.where(total > 0.0, shift + tl.log2(total) * LN_2, float("-inf")))


def attend_constants(
    config: AttendConfig,
    num_kv_heads: int,
    group_size: int,
    head_dim: int,
    block_size: int,
    topk: int,
    table: bool,
) -> dict[str, int | bool]:
    """The compile-time arguments of `attend_kernel`, beside those of `storage_constants`."""
    return {
        "GROUPS": num_kv_heads,
        "HEADS": group_size,
        "HEAD_DIM": head_dim,
        "TOPK": topk,
        "SLOTS": triton.next_power_of_2(topk),
        "BLOCK": block_size,
        "ROWS": padded(group_size),
        "CHUNK": config.chunk,
        "DEPTH": padded(head_dim),
        "TABLE": table,
    }


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor | None,
    sequences: torch.Tensor,
    block_size: int,
    scale: float,
    page_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    config: AttendConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention over the given blocks, or all visible ones; ids that are no visible block are skipped.

    A few queries are taken one by one, more in the tiles of `attention`. `config` overrides the choice of tiles of
    the former, for tests and tuning.
    """
    many = q.shape[2] > FEW_QUERIES and q.shape[0] * q.shape[2] * k.shape[1] > FEW_ROWS
    if block_indices is None or many:
        cache = Cache(page_table, k_scale, v_scale)
        return block_sparse_attention_forward(q, k, v, block_indices, sequences, block_size, scale, cache=cache)
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, topk = k.shape[1], block_indices.shape[3]
    out = torch.empty(batch, num_heads, seqlen_q, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    target = target_of(q.device)
    config = config or attend_config(
        target,
        num_rows=batch * seqlen_q * num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        topk=topk,
        element_size=q.element_size(),
    )
    splits = config.num_splits
    partial_out, partial_lse = out, lse
    if splits > 1:
        partial_out = lse.new_empty(lse.numel(), splits, head_dim)
        partial_lse = lse.new_empty(lse.numel(), splits)
    ends, num_queries, table = tile_ends(sequences, batch, seqlen_q, 1)
    pages, max_pages, num_pages = page_arguments(page_table, sequences, k)
    attend_kernel[(num_queries, num_kv_heads, splits)](
        q,
        as_bits(k),
        as_bits(v),
        lse if k_scale is None else k_scale,
        lse if v_scale is None else v_scale,
        block_indices,
        sequences,
        ends,
        pages,
        partial_out,
        partial_lse,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *block_indices.stride(),
        sequences.shape[0],
        seqlen_q,
        k.shape[2],
        max_pages,
        num_pages,
        splits,
        scale,
        **attend_constants(config, num_kv_heads, num_heads // num_kv_heads, head_dim, block_size, topk, table),
        **storage_constants(target, page_table is not None, k_scale is not None),
        **target.overlap(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        combine_kernel[(lse.numel(),)](
            partial_out,
            partial_lse,
            out,
            lse,
            splits,
            HEAD_DIM=head_dim,
            SPLITS=triton.next_power_of_2(splits),
            DEPTH=padded(head_dim),
            **target.overlap(),
            num_warps=4,
        )
    return out, lse
