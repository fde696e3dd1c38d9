"""The KL divergence that trains the index branch, with its closed-form gradient.

For each query and group, over the visible tokens of its selected blocks:

    P = mean over the group's heads of exp(scale q k^T - lse)            (teacher)
    L = index_scale index_q index_k^T - index_lse,  P_index = exp(L)     (student)
    loss = mean of sum_j P_j (log P_j - L_j),  d loss / d (index scores) = (P_index - P) / count

A first pass over the blocks computes index_lse, a second one loss and gradient together.
"""

import math

import torch
from torch import Tensor

from flexmsa.kernels.torch.inverse_index import InverseIndex
from flexmsa.kernels.torch.packing import Scratch, TokenRange, compute_dtype
from flexmsa.kernels.torch.softmax import OnlineSoftmax
from flexmsa.kernels.torch.tile import Tile, max_tokens


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
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B,Hq,Sq,D], k [B,Hkv,Sk,D], index_q [B,Hkv,Sq,Di], index_k [B,1,Sk,Di], lse [B,Hq,Sq] of the main branch.

    block_indices [B,Hkv,Sq,K], or None for every visible block. Returns the loss, a scalar in the compute dtype,
    averaged over all (batch, group, query) that see a key, or its sum over ``count``, a scalar; and the gradients of
    index_q and index_k in the same dtype, or two empty tensors without ``with_grad``.
    """
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group_size = num_heads // num_kv_heads
    index = InverseIndex(sequences, block_indices, block_size, batch, num_kv_heads, seqlen_q)
    divisor = max(1, index.num_visible) if count is None else count.item()
    k_blocks = index.blocks.pack(k, scale)
    # All groups have the same index keys, but each tile names the blocks of its group.
    index_blocks = index.blocks.pack(index_k, index_scale)
    index_k_grads = torch.zeros_like(index_blocks)
    scratch = Scratch(compute_dtype(q.dtype))
    loss = torch.zeros((), dtype=torch.float64)
    grad_index_q = torch.empty(index_q.shape if with_grad else 0, dtype=scratch.dtype)
    for tokens in index.token_ranges(group_size, head_dim):
        q_rows, index_rows = tokens.pack(q, scratch, "q_rows"), tokens.pack(index_q, scratch, "index_rows")
        index_lse = _index_lse(index, tokens, index_rows, index_blocks, scratch)
        # exp(S - lse - log G) sums up to the mean over the G heads.
        lse_rows = tokens.pack(lse, scratch, "lse_rows").add_(math.log(group_size))
        # The zero row's teacher must be 0, and 0 * log P_index must not become NaN.
        lse_rows[-1], index_lse[-1] = torch.inf, 0.0
        index_q_grads = scratch.take("index_q_grads", *index_rows.shape).zero_()
        for tile in index.tiles(tokens, max_tokens(group_size, head_dim, block_size)):
            teacher = _teacher(tile, q_rows, k_blocks, lse_rows, scratch)
            index_tile = tile.gather(index_rows, scratch, "index_q", 1)
            log_student = tile.score(index_tile, index_blocks, scratch, "student").sub_(tile.column(index_lse))
            loss += _divergence(teacher, log_student, scratch)
            if with_grad:
                grad_scores = tile.hide_future(log_student.exp_(), 0.0).sub_(teacher)
                _add_gradients(tile, grad_scores, index_tile, index_blocks, index_q_grads, index_k_grads)
        if with_grad:
            tokens.unpack(index_q_grads.div_(divisor), grad_index_q)
    loss = (loss / divisor).to(scratch.dtype)
    if not with_grad:
        return loss, grad_index_q, torch.empty(0, dtype=scratch.dtype)
    grad_index_k = index.blocks.unpack(index_k_grads.mul_(index_scale / divisor), index_k, scratch.dtype)
    return loss, grad_index_q, grad_index_k


def _index_lse(
    index: InverseIndex, tokens: TokenRange, index_rows: Tensor, index_blocks: Tensor, scratch: Scratch
) -> Tensor:
    """Logsumexp of the student's scores, rows [num_rows + 1, 1]."""
    softmax = OnlineSoftmax(tokens.num_rows, 1, scratch)
    for tile in index.tiles(tokens, max_tokens(1, *index_blocks.shape[1:])):
        index_tile = tile.gather(index_rows, scratch, "index_q", 1)
        scores = tile.score(index_tile, index_blocks, scratch, "student")
        softmax.update(tile, tile.hide_future(scores, -torch.inf))
    return softmax.lse


def _teacher(tile: Tile, q_rows: Tensor, k_blocks: Tensor, lse_rows: Tensor, scratch: Scratch) -> Tensor:
    """The teacher's probabilities [C, T, block_size]; lse_rows [num_rows + 1, G] include log G."""
    group_size = lse_rows.shape[1]
    q_tile = tile.gather(q_rows, scratch, "q", group_size)
    probs = tile.score(q_tile, k_blocks, scratch, "probs").sub_(tile.column(lse_rows)).exp_()
    by_head = probs.unflatten(1, (-1, group_size))
    teacher = torch.sum(by_head, 2, out=scratch.take("teacher", *by_head.shape[:2], probs.shape[2]))
    return tile.hide_future(teacher, 0.0)


def _divergence(teacher: Tensor, log_student: Tensor, scratch: Scratch) -> Tensor:
    """The sum of P (log P - L) over a tile."""
    tiny = torch.finfo(scratch.dtype).tiny
    ratio = torch.clamp(teacher, min=tiny, out=scratch.take("ratio", *teacher.shape)).log_().sub_(log_student)
    return torch.dot(teacher.flatten(), ratio.flatten())


def _add_gradients(
    tile: Tile, grad_scores: Tensor, index_tile: Tensor, index_blocks: Tensor, q_grads: Tensor, k_grads: Tensor
) -> None:
    """Add a tile's gradients to those of the index queries and keys; index_tile is overwritten."""
    tile.add_to_blocks(k_grads, grad_scores, index_tile)
    partial = torch.bmm(grad_scores, tile.operand(index_blocks), out=index_tile)
    q_grads.index_add_(0, tile.rows, partial.view(-1, q_grads.shape[1]))
