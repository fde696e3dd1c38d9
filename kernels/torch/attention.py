"""Block-sparse attention, forward and backward, in key-major order: one batched product per block and its queries.

Forward, for each block and the rows that chose it, S = scale Q K^T:

    out <- out + exp(S) V,  sum <- sum + rowsum exp(S),  and in the end  out / sum,  lse = log sum

Rows whose sums leave the range of float32 are computed again with a running logsumexp (see ``softmax``). Every row is
checked by itself, so its result depends on its own keys alone, to the last bit.

Only one tile of S exists at a time, in the backward too.
"""

import math

import torch
from torch import Tensor

from flexmsa.kernels.torch.inverse_index import InverseIndex
from flexmsa.kernels.torch.packing import Scratch, compute_dtype
from flexmsa.kernels.torch.softmax import OnlineAttention, PlainAttention
from flexmsa.kernels.torch.tile import max_tokens


def block_sparse_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor | None,
    sequences: Tensor,
    block_size: int,
    scale: float,
    page_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q [B,Hq,Sq,D] to the visible keys of the blocks block_indices [B,Hkv,Sq,K] of k, v [B,Hkv,Sk,D].

    block_indices may be unsorted and may hold -1, repeats and blocks that the query does not see; None means every
    visible block. With page_table [B,max_pages], k and v are pages [num_pages,Hkv,block_size,D]. If they are e4m3,
    k_scale and v_scale have their shape without D. Returns out [B,Hq,Sq,D] of q's dtype and lse [B,Hq,Sq], float32
    (float64 for float64).
    """
    batch, num_heads, seqlen_q, _ = q.shape
    num_kv_heads = k.shape[1]
    group_size = num_heads // num_kv_heads
    index = InverseIndex(sequences, block_indices, block_size, batch, num_kv_heads, seqlen_q, page_table)
    # The dtype of e4m3 keys does not determine the compute dtype.
    dtype = compute_dtype(q.dtype)
    k_blocks = index.blocks.pack(k, scale * math.log2(math.e), k_scale, dtype)
    v_blocks = index.blocks.pack(v, 1.0, v_scale, dtype)
    out, lse = _attend(PlainAttention, index, q, k_blocks, v_blocks)
    exact = PlainAttention.is_exact(out, lse).unflatten(1, (num_kv_heads, group_size)).all(2) | ~index.sees_keys
    if not bool(exact.all()):
        again = _attend(OnlineAttention, index.without(exact), q, k_blocks.mul_(math.log(2)), v_blocks)
        for x, replacement in zip((out, lse), again, strict=True):
            inexact = ~exact[:, :, None].expand(-1, -1, group_size, -1).flatten(1, 2)
            x[inexact] = replacement[inexact]
    return out, lse


def _attend(
    attention: type[PlainAttention] | type[OnlineAttention],
    index: InverseIndex,
    q: Tensor,
    k_blocks: Tensor,
    v_blocks: Tensor,
) -> tuple[Tensor, Tensor]:
    """out and lse of q [B,Hq,Sq,D]. k_blocks include the factor scale, and log2(e) for ``PlainAttention``."""
    group_size, head_dim, scratch = q.shape[1] // index.num_kv_heads, q.shape[3], Scratch(k_blocks.dtype)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:-1], dtype=scratch.dtype)
    for tokens in index.token_ranges(group_size, head_dim):
        q_rows = tokens.pack(q, scratch, "q_rows")
        result = attention(tokens.num_rows, group_size, head_dim, scratch)
        for tile in index.tiles(tokens, max_tokens(group_size, head_dim, index.block_size)):
            scores = tile.score(tile.gather(q_rows, scratch, "q", group_size), k_blocks, scratch, "scores")
            result.add(tile, tile.hide_future(scores, -torch.inf), v_blocks)
        out_rows, lse_rows = result.finish()
        tokens.unpack(out_rows, out)
        tokens.unpack(lse_rows, lse)
    return out, lse


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from those of out and lse; grad_lse [B,Hq,Sq], or None for zero.

    With the saved lse, and delta = rowsum(dO * out) - dlse:

        P = exp(S - lse),  dS = P * (dO V^T - delta)
        dQ += scale dS K,  dK += scale dS^T Q,  dV += P^T dO
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group_size = num_heads // num_kv_heads
    index = InverseIndex(sequences, block_indices, block_size, batch, num_kv_heads, seqlen_q)
    k_blocks, v_blocks = index.blocks.pack(k, scale), index.blocks.pack(v)
    k_grads, v_grads = torch.zeros_like(k_blocks), torch.zeros_like(v_blocks)
    grad_q = torch.empty(q.shape, dtype=q.dtype)
    scratch = Scratch(compute_dtype(q.dtype))
    for tokens in index.token_ranges(group_size, head_dim):
        q_rows, grad_rows = tokens.pack(q, scratch, "q_rows"), tokens.pack(grad_out, scratch, "grad_rows")
        lse_rows, delta_rows = tokens.pack(lse, scratch, "lse_rows"), tokens.pack(lse, scratch, "delta_rows")
        out_rows = tokens.pack(out, scratch, "q_grads")
        torch.sum(out_rows.mul_(grad_rows).unflatten(1, (group_size, -1)), -1, out=delta_rows)
        if grad_lse is not None:
            delta_rows -= tokens.pack(grad_lse, scratch, "grad_lse")
        q_grads = out_rows.zero_()
        for tile in index.tiles(tokens, max_tokens(group_size, head_dim, block_size)):
            q_tile = tile.gather(q_rows, scratch, "q", group_size)
            grad_tile = tile.gather(grad_rows, scratch, "grad", group_size)
            probs = tile.score(q_tile, k_blocks, scratch, "probs").sub_(tile.column(lse_rows)).exp_()
            tile.hide_future(probs, 0.0)
            tile.add_to_blocks(v_grads, probs, grad_tile)
            grad_scores = tile.score(grad_tile, v_blocks, scratch, "grad_scores")
            grad_scores.sub_(tile.column(delta_rows)).mul_(probs)
            tile.add_to_blocks(k_grads, grad_scores, q_tile)
            partial = torch.bmm(grad_scores, tile.operand(k_blocks), out=grad_tile)
            q_grads.index_add_(0, tile.rows, partial.view(-1, q_grads.shape[1]))
        tokens.unpack(q_grads, grad_q)
    return grad_q, index.blocks.unpack(k_grads.mul_(scale), k), index.blocks.unpack(v_grads, v)
