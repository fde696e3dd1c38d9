"""Backward of block-sparse attention: one pass over the key/value blocks and the queries that chose them.

    P = exp(scale Q K^T - lse),  dS = P * (dO V^T - delta),  delta = rowsum(dO * O) - dlse
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO        a query that sees no key gets 0

Layouts: q, out, grad_out [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], lse, grad_lse [B, Hq, Sq] fp32, any strides;
block_indices [B, Hkv, Sq, topk], or None for every visible block; sequences as in `flexmsa.kernels`. The gradients are
contiguous. Nothing is accumulated across programs, so that the results are the same bits every time.

The work goes chunk by chunk (see `inverse_index`), four launches each:

- `gather_kernel` writes, in the order of the lists, what is needed of each entry and of its G rows (`backward_rows`);
- `gradient_kernel`: one program owns one piece of a block's list, and makes its dK, dV and dQ (`backward_gradient`, and
  for Hopper `backward_hopper`);
- `sum_pieces_kernel`: one program owns some keys of a block whose list has several pieces, and adds them in order;
- `sum_slots_kernel`: one program owns some heads of one token, and sums dQ over its slots in order (`backward_sums`).

For E = B Hkv Sq topk entries and R = E G rows: 10 R block_size D FLOPs; 2 R D elements of q and dO are gathered, R D of
dQ written and read again. At M3's shape and 128K tokens, bf16: 22 TFLOP, 28 ms, beside 68 + 69 GB, 32 ms, of which the
reading of dQ, 8 ms, does not overlap with the products.
"""

import triton
from torch import Tensor

from ...tuning import tuned
from ...workspace import chunk_tokens
from ..common.primitives import tma_ready
from ..common.target import padded, target_of
from ..schedule.inverse_index import inverse_indexes
from ..schedule.work_items import cut_into_items
from .config import BackwardConfig, backward_config
from .gradient import heads_inside
from .preprocess import Workspace, gather_kernel, row_statistics
from .reduce import sum_pieces_kernel, sum_slots_kernel


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
    config = config or tuned(
        "backward",
        backward_config,
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
    workspace = Workspace(
        queries=sequences.new_empty(num_entries),
        limits=sequences.new_empty(num_entries),
        places=sequences.new_empty(num_entries),
        row_delta=lse.new_empty(num_entries, group_size),
        row_lse2=lse.new_empty(num_entries, group_size),
        partial_q=q.new_empty(num_entries, group_size, head_dim),
        partial_k=lse.new_empty(num_slots, block_size, head_dim),
        partial_v=lse.new_empty(num_slots, block_size, head_dim),
    )
    hopper = hopper_takes(grad_out, q, k, v, config)
    if hopper:
        # Imported where it is launched: another version of Triton may not have what it needs.
        from .gradient_sm90 import gradient_launcher
    else:
        from .gradient import gradient_launcher
    add_gradients = gradient_launcher(grad_out, q, k, v, workspace, scale, config, grad_k, grad_v)

    lanes = triton.next_power_of_2(group_size)
    entries = max(1, 1024 // lanes)
    depth = padded(head_dim)
    heads = min(lanes, max(1, 2048 // depth))
    for index in inverse_indexes(block_indices, sequences, q, k, block_size, step):
        pieces = cut_into_items(index, config.length)
        chunks = index.num_ranges // num_kv_heads
        for chunk in range(index.num_ranges):
            group, first_token = chunk // chunks, chunk % chunks * index.range_tokens
            tokens = min(index.range_tokens, index.num_tokens - first_token)
            workspace.places.fill_(-1)
            gather_kernel[(triton.cdiv(tokens * topk, entries),)](
                index.blocks,
                index.numbers,
                index.entries,
                index.offsets,
                delta,
                lse2,
                workspace.queries,
                workspace.limits,
                workspace.places,
                workspace.row_delta,
                workspace.row_lse2,
                chunk,
                index.first_token,
                index.num_tokens,
                index.range_tokens,
                index.num_blocks,
                index.lowest,
                topk,
                seqlen_q,
                num_kv_heads,
                HEADS=group_size,
                ENTRIES=entries,
                LANES=lanes,
                num_warps=4,
            )
            add_gradients(pieces, chunk, group)
            if num_slots > 0:
                sum_pieces_kernel[(index.num_blocks, triton.cdiv(block_size, 16))](
                    index.blocks,
                    pieces.shares,
                    workspace.partial_k,
                    workspace.partial_v,
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
                workspace.places,
                workspace.partial_q,
                grad_q,
                group,
                index.first_token + first_token,
                seqlen_q,
                num_kv_heads,
                topk,
                HEADS=group_size,
                HEAD_DIM=head_dim,
                INSIDE=heads_inside(group_size) and not hopper,
                TILE=heads,
                DEPTH=depth,
                num_warps=max(1, min(8, heads * depth // 256)),
            )
    return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)


def hopper_takes(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, config: BackwardConfig) -> bool:
    """Whether `backward_hopper` takes the tensors: the bulk copy engine has to read them."""
    return config.hopper and all(tma_ready(x) for x in (grad_out, q, k, v))
