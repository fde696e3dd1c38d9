"""Health figures of the index branch: how well its selection matches the attention of the main branch."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flexmsa import reference, validation
from flexmsa._sequences import check_sequences

__all__ = ["Recall", "block_recall", "recall", "score_recall"]


class Recall(NamedTuple):
    """Two scalars from 0 to 1: the selected share of the best blocks, and the selected share of their mass."""

    block: Tensor
    score: Tensor


@torch.no_grad()
def recall(
    q: Tensor,
    k: Tensor,
    block_indices: Tensor,
    *,
    block_size: int = 128,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    chunk: int = 256,
) -> Recall:
    """Compare a selection with the blocks that have the most of the main branch's dense attention (paper, health
    figures).

    For each query and group, I is the selection and I* the |I| blocks with the greatest attention mass, averaged over
    the heads of the group. block = |I and I*| / |I*|; score = mass of (I and I*) / mass of I*. The results are means
    over the queries with a choice (they see more blocks than they select), and 1 if no query has one.

    Time is quadratic because of the dense attention, so call this for single batches. Memory is linear: `chunk`
    queries are compared at a time.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hkv, Sk, D]; block_indices: [B, Hkv, Sq, topk].
        Others: as for `flexmsa.attention`.

    Raises:
        ValueError, TypeError: an argument is not as described.

    >>> q, k = torch.randn(1, 2, 32, 8), torch.randn(1, 1, 32, 8)
    >>> everything = torch.arange(4).expand(1, 1, 32, 4)
    >>> recall(q, k, everything, block_size=8)
    Recall(block=tensor(1.), score=tensor(1.))
    """
    validation.check_main_inputs(q, k, k, scale)
    validation.check_settings(block_size)
    validation.check_block_indices(block_indices, q.shape[0], k.shape[1], q.shape[2], q.device)
    start, end = check_sequences(q, k.shape[2], cu_seqlens, kv_starts, kv_lens).key_ranges()
    scale = q.shape[-1] ** -0.5 if scale is None else scale

    sums = torch.zeros(3, dtype=torch.float64, device=q.device)
    for here in _chunks(q.shape[2], chunk):
        mass = _block_mass(q[:, :, here], k, start[:, here], end[:, here], block_size, scale)
        sums += _compare(mass, block_indices[:, :, here].long(), (end - start)[:, here], block_size)
    queries, block, score = sums.float()
    one = torch.ones_like(queries)
    return Recall(*(torch.where(queries > 0, x / queries.clamp(min=1), one) for x in (block, score)))


def block_recall(q: Tensor, k: Tensor, block_indices: Tensor, **settings) -> Tensor:
    """Return only the block recall of `recall`, a scalar."""
    return recall(q, k, block_indices, **settings).block


def score_recall(q: Tensor, k: Tensor, block_indices: Tensor, **settings) -> Tensor:
    """Return only the score recall of `recall`, a scalar."""
    return recall(q, k, block_indices, **settings).score


def _chunks(length: int, chunk: int) -> Iterator[slice]:
    for first in range(0, length, chunk):
        yield slice(first, min(first + chunk, length))


def _block_mass(q: Tensor, k: Tensor, start: Tensor, end: Tensor, block_size: int, scale: float) -> Tensor:
    """Return [B, Hkv, Sq, blocks]: the attention mass of each block, averaged over the heads of the group."""
    seqlen_k = k.shape[2]
    visible = reference.visible_keys(start, end, seqlen_k)[:, None]
    probabilities = reference.softmax(reference.main_scores(q, k, visible, scale)).mean(2)
    block = reference.key_blocks(start, seqlen_k, block_size)[:, None].clamp(min=0).expand_as(probabilities)
    blocks = -(-seqlen_k // block_size)
    return probabilities.new_zeros((*probabilities.shape[:-1], blocks)).scatter_add(-1, block, probabilities)


def _compare(mass: Tensor, ids: Tensor, visible_keys: Tensor, block_size: int) -> Tensor:
    """Return the number of queries with a choice, and the sums of both recalls over them."""
    blocks = mass.shape[-1]
    ids = ids.masked_fill(ids >= blocks, -1)
    selected = torch.zeros((*ids.shape[:-1], blocks + 1), dtype=torch.bool, device=ids.device)
    selected = selected.scatter(-1, ids.masked_fill(ids < 0, blocks), True)[..., :blocks]
    count = selected.sum(-1, keepdim=True)
    rank = mass.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    best = rank < count
    both = best & selected
    visible_blocks = (visible_keys + block_size - 1).div(block_size, rounding_mode="floor")[:, None]
    has_choice = (visible_blocks > count.squeeze(-1)) & (count.squeeze(-1) > 0)
    block = both.sum(-1) / count.squeeze(-1).clamp(min=1)
    best_mass = (mass * best).sum(-1)
    score = (mass * both).sum(-1) / best_mass.clamp(min=torch.finfo(mass.dtype).tiny)
    return torch.stack([has_choice.sum(), block[has_choice].sum(), score[has_choice].sum()]).double()
