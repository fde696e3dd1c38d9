"""The definition: MiniMax Sparse Attention (arXiv 2606.13392) with dense S x S tensors, differentiable, any device.

Every function computes in float64 for float64 inputs and in float32 otherwise. Shapes: q [B, Hq, Sq, D];
k, v [B, Hkv, Sk, D]; index_q [B, Hkv, Sq, Di]; index_k [B, 1, Sk, Di]; start, end [B, Sq]. A query sees the keys
start .. end-1, and its blocks are counted from start.
"""

import torch
from torch import Tensor


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def visible_keys(start: Tensor, end: Tensor, seqlen_k: int) -> Tensor:
    """Return [B, Sq, Sk] bool: whether query i sees key j."""
    key = torch.arange(seqlen_k, device=start.device)
    return (key >= start[..., None]) & (key < end[..., None])


def key_blocks(start: Tensor, seqlen_k: int, block_size: int) -> Tensor:
    """Return [B, Sq, Sk] int64: the block of key j, counted from the query's start; -1 for keys before it."""
    key = torch.arange(seqlen_k, device=start.device)
    return (key - start[..., None].long()).div(block_size, rounding_mode="floor").clamp(min=-1)


def token_scores(index_q: Tensor, index_k: Tensor) -> Tensor:
    """Return [B, Hkv, Sq, Sk]: the raw scores of the index branch, with NaN replaced by -inf."""
    work = _work_dtype(index_q)
    scores = index_q.to(work) @ index_k.to(work).transpose(-1, -2)
    return scores.masked_fill(scores.isnan(), -torch.inf)


def block_scores(scores: Tensor, start: Tensor, end: Tensor, block_size: int) -> Tensor:
    """Return [B, Hkv, Sq, blocks]: the largest visible score of each block; -inf for a block with no visible key.

    A visible block scores at least the lowest finite number, so it ranks before invisible blocks.
    """
    seqlen_k = scores.shape[-1]
    blocks = -(-seqlen_k // block_size)
    visible = visible_keys(start, end, seqlen_k)[:, None]
    block = key_blocks(start, seqlen_k, block_size)[:, None].clamp(min=0).expand_as(scores)
    finite = torch.finfo(scores.dtype)
    clamped = scores.clamp(finite.min, finite.max).masked_fill(~visible, -torch.inf)
    empty = torch.full((*scores.shape[:-1], blocks), -torch.inf, dtype=scores.dtype, device=scores.device)
    return empty.scatter_reduce(-1, block, clamped, "amax")


def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    start: Tensor,
    end: Tensor,
    block_size: int,
    topk: int,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
) -> Tensor:
    """Return [B, Hkv, Sq, topk] int32: ids of the selected blocks, ascending, padded on the right with -1."""
    scores = block_scores(token_scores(index_q, index_k), start, end, block_size)
    blocks = scores.shape[-1]
    block = torch.arange(blocks, device=scores.device)
    newest = ((end - start - 1).long().div(block_size, rounding_mode="floor"))[:, None, :, None]
    forced = (block > newest - num_local_blocks) | (block < num_init_blocks)
    scores = scores.masked_fill(forced & (scores > -torch.inf), torch.inf)
    ranked = scores.sort(dim=-1, descending=True, stable=True)
    ids = ranked.indices.masked_fill(ranked.values == -torch.inf, blocks)[..., :topk].sort(-1).values
    ids = torch.nn.functional.pad(ids, (0, max(0, topk - blocks)), value=blocks)
    return ids.masked_fill(ids == blocks, -1).int()


def selected_keys(block_indices: Tensor | None, start: Tensor, end: Tensor, seqlen_k: int, block_size: int) -> Tensor:
    """Return [B, Hkv or 1, Sq, Sk] bool: the visible keys of the selected blocks (of all blocks, if None)."""
    visible = visible_keys(start, end, seqlen_k)[:, None]
    if block_indices is None:
        return visible
    blocks = -(-seqlen_k // block_size)
    ids = block_indices.long().where((block_indices >= 0) & (block_indices < blocks), blocks)
    member = torch.zeros((*ids.shape[:-1], blocks + 1), dtype=torch.bool, device=ids.device).scatter(-1, ids, True)
    block = key_blocks(start, seqlen_k, block_size)[:, None].clamp(min=0)
    return member.gather(-1, block.expand(-1, ids.shape[1], -1, -1)) & visible


def main_scores(q: Tensor, k: Tensor, keep: Tensor, scale: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return [B, Hkv, G, Sq, Sk]: the scaled scores of the main branch, -inf where a key is not kept."""
    work = dtype or _work_dtype(q)
    grouped = q.to(work).unflatten(1, (k.shape[1], -1))
    scores = grouped @ k.to(work).transpose(-1, -2).unsqueeze(2) * scale
    return scores.masked_fill(~keep.unsqueeze(2), -torch.inf)


def softmax(scores: Tensor) -> Tensor:
    """Return the softmax over the last dimension; a row of only -inf gives zeros, with zero gradient."""
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor | None,
    start: Tensor,
    end: Tensor,
    block_size: int,
    scale: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `out` [B, Hq, Sq, D] and `lse` [B, Hq, Sq] of softmax attention over the selected keys.

    Here and in `index_loss`, `dtype` replaces the dtype of the computation. Tests compare the errors of other
    implementations with the error of this one in the inputs' own dtype.
    """
    keep = selected_keys(block_indices, start, end, k.shape[2], block_size)
    scores = main_scores(q, k, keep, scale, dtype)
    # Values that no query sees may be NaN, and 0 * NaN is NaN.
    values = v.to(scores.dtype).masked_fill(~keep.any(-2).any(1)[:, None, :, None], 0.0)
    out = softmax(scores) @ values.unsqueeze(2)
    return out.flatten(1, 2).to(q.dtype), scores.logsumexp(-1).flatten(1, 2)


def index_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_indices: Tensor | None,
    start: Tensor,
    end: Tensor,
    block_size: int,
    scale: float,
    index_scale: float,
    dtype: torch.dtype | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """Return the scalar KL loss: the sum of KL(teacher || student) over groups and queries, divided by `count`.

    By default, count is the number of groups and queries that see a key.
    """
    keep = selected_keys(block_indices, start, end, k.shape[2], block_size)
    teacher = softmax(main_scores(q.detach(), k.detach(), keep, scale, dtype)).mean(2)
    scores = (index_q.to(teacher.dtype) @ index_k.to(teacher.dtype).transpose(-1, -2)) * index_scale
    empty = ~keep.any(-1, keepdim=True)
    student = scores.masked_fill(~keep & ~empty, -torch.inf).log_softmax(-1).masked_fill(~keep, 0.0)
    divergence = (torch.xlogy(teacher, teacher) - teacher * student).sum(-1)
    if count is None:
        count = ((end > start).sum() * index_q.shape[1]).clamp(min=1)
    return divergence.sum() / count
