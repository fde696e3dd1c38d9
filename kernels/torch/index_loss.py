"""The KL divergence that trains the index branch, with its closed-form gradient.

For each query and group, over the visible tokens of its selected blocks:

    P = mean over the group's heads of exp(scale q k^T - lse)            (teacher)
    L = index_scale index_q index_k^T - index_lse,  P_index = exp(L)     (student)
    loss = mean of sum_j P_j (log P_j - L_j),  d loss / d (index scores) = (P_index - P) / count

index_lse comes from a first walk over the blocks; the second walk computes loss and gradient together.
"""

import math

import torch
from torch import Tensor

from flexmsa.kernels.torch.packing import Chunk, Scratch, compute_dtype
from flexmsa.kernels.torch.reverse_index import ReverseIndex
from flexmsa.kernels.torch.softmax import OnlineSoftmax
from flexmsa.kernels.torch.tile import max_tokens


def index_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_indices: Tensor | None,
    lse: Tensor,
    sequences: Tensor,
    block_size: int,
    scale: float,
    index_scale: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,Hq,Sq,D], k [B,Hkv,Sk,D], index_q [B,Hkv,Sq,Di], index_k [B,1,Sk,Di], lse [B,Hq,Sq] of the main branch.

    block_indices [B,Hkv,Sq,K], or None for every visible block. Returns the loss, a scalar in the compute dtype,
    averaged over all (batch, group, query) that see a key, and the gradients of index_q and index_k in that dtype
    too, or two empty tensors unless ``with_grad``.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, index_dim = k.shape[1], index_q.shape[-1]
    group_size = num_heads // num_kv_heads
    index = ReverseIndex(sequences, block_indices, block_size, batch, num_kv_heads, seqlen_q)
    count = max(1, index.num_visible)
    k_blocks = index.table.pack(k, scale)
    # All groups have the same index keys, but each tile names the blocks of its group.
    index_blocks = index.table.pack(index_k, index_scale).repeat(num_kv_heads, 1, 1)
    index_k_grads = torch.zeros_like(index_blocks)
    scratch = Scratch(compute_dtype(q.dtype))
    tiny = torch.finfo(scratch.dtype).tiny
    loss = torch.zeros((), dtype=torch.float64)
    grad_index_q = torch.empty(index_q.shape if with_grad else 0, dtype=scratch.dtype)
    for chunk in index.chunks(group_size, head_dim):
        q_rows, index_rows = chunk.pack(q, scratch, "q_rows"), chunk.pack(index_q, scratch, "index_rows")
        index_lse = _index_lse(index, chunk, index_rows, index_blocks, scratch)
        # With the number of heads in the lse, the mean over them is a sum.
        lse_rows = chunk.pack(lse, scratch, "lse_rows").add_(math.log(group_size))
        # The zero row's teacher has to vanish, and 0 * log P_index must not become NaN.
        lse_rows[-1], index_lse[-1] = torch.inf, 0.0
        index_q_grads = scratch.take("index_q_grads", *index_rows.shape).zero_()
        for tile in index.tiles(chunk, max_tokens(group_size, head_dim, block_size)):
            q_tile = tile.gather(q_rows, scratch, "q", group_size)
            probs = tile.score(q_tile, k_blocks, scratch, "probs").sub_(tile.column(lse_rows)).exp_()
            by_head = probs.unflatten(1, (-1, group_size))
            teacher = torch.sum(by_head, 2, out=scratch.take("teacher", *by_head.shape[:2], block_size))
            tile.hide_future(teacher, 0.0)
            index_tile = tile.gather(index_rows, scratch, "index_q", 1)
            log_student = tile.score(index_tile, index_blocks, scratch, "student").sub_(tile.column(index_lse))
            ratio = torch.clamp(teacher, min=tiny, out=scratch.take("ratio", *teacher.shape)).log_().sub_(log_student)
            loss += torch.dot(teacher.flatten(), ratio.flatten())
            if with_grad:
                grad_scores = tile.hide_future(log_student.exp_(), 0.0).sub_(teacher)
                tile.add_to_blocks(index_k_grads, grad_scores, index_tile)
                partial = torch.bmm(grad_scores, tile.operand(index_blocks), out=index_tile)
                index_q_grads.index_add_(0, tile.rows, partial.view(-1, index_dim))
        if with_grad:
            chunk.unpack(index_q_grads.div_(count), grad_index_q)
    loss = (loss / count).to(scratch.dtype)
    if not with_grad:
        return loss, grad_index_q, torch.empty(0, dtype=scratch.dtype)
    shared_grads = index_k_grads.unflatten(0, (num_kv_heads, -1)).sum(0)
    return loss, grad_index_q, index.table.unpack(shared_grads, index_k.to(scratch.dtype), index_scale / count)


def _index_lse(index: ReverseIndex, chunk: Chunk, index_rows: Tensor, index_blocks: Tensor, scratch: Scratch) -> Tensor:
    """Logsumexp of the student's scores, rows [num_rows + 1, 1]."""
    softmax = OnlineSoftmax(chunk.num_rows, 1, scratch)
    for tile in index.tiles(chunk, max_tokens(1, *index_blocks.shape[1:])):
        index_tile = tile.gather(index_rows, scratch, "index_q", 1)
        scores = tile.score(index_tile, index_blocks, scratch, "student")
        softmax.update(tile, tile.hide_future(scores, -torch.inf))
    return softmax.lse
