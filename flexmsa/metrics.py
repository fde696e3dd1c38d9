"""Health figures of the index branch: how well its selection matches the attention of the main branch."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from flexmsa import validation
from flexmsa._sequences import Sequences, check_sequences
from flexmsa._settings import default_scale
from flexmsa.kernels.sequences import list_sequences
from flexmsa.ops.attention import statistics_dtype
from flexmsa.ops.checks import check_block_indices

__all__ = ["Recall", "block_recall", "random_blocks", "recall", "recalls", "score_recall", "window_blocks"]

# The most probabilities that are held at once: 256 MiB in float32.
_HELD = 2**26


class Recall(NamedTuple):
    """Two numbers from 0 to 1: the selected share of the best blocks, and the selected share of their mass.

    Scalars, or [Hkv] where each group has its own.

    >>> Recall(block=torch.tensor(0.5), score=torch.tensor(0.75)).score
    tensor(0.7500)
    """

    block: Tensor
    score: Tensor


def recall(q: Tensor, k: Tensor, block_indices: Tensor, **settings) -> Recall:
    """Compare a selection with the blocks that have the most of the main branch's dense attention (paper, health
    figures): `recalls` of one selection.

    >>> q, k = torch.randn(1, 2, 32, 8), torch.randn(1, 1, 32, 8)
    >>> everything = torch.arange(4).expand(1, 1, 32, 4)
    >>> recall(q, k, everything, block_size=8)
    Recall(block=tensor(1.), score=tensor(1.))
    """
    return recalls(q, k, {"": block_indices}, **settings)[""]


def block_recall(q: Tensor, k: Tensor, block_indices: Tensor, **settings) -> Tensor:
    """Return only the block recall of `recall`.

    >>> q, k = torch.randn(1, 2, 32, 8), torch.randn(1, 1, 32, 8)
    >>> block_recall(q, k, torch.arange(4).expand(1, 1, 32, 4), block_size=8)
    tensor(1.)
    """
    return recall(q, k, block_indices, **settings).block


def score_recall(q: Tensor, k: Tensor, block_indices: Tensor, **settings) -> Tensor:
    """Return only the score recall of `recall`.

    >>> q, k = torch.randn(1, 2, 32, 8), torch.randn(1, 1, 32, 8)
    >>> score_recall(q, k, torch.arange(4).expand(1, 1, 32, 4), block_size=8)
    tensor(1.)
    """
    return recall(q, k, block_indices, **settings).score


@torch.no_grad()
def recalls(
    q: Tensor,
    k: Tensor,
    selections: Mapping[str, Tensor],
    *,
    block_size: int = 128,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    num_queries: int | None = None,
    per_group: bool = False,
) -> dict[str, Recall]:
    """Compare selections with the blocks that have the most of the main branch's dense attention (paper, health
    figures). Baselines make the numbers readable: `window_blocks` and `random_blocks`.

    For each query and group, I is the selection and I* the |I| blocks with the greatest attention mass, averaged over
    the heads of the group. block = |I and I*| / |I*|; score = mass of (I and I*) / mass of I*. The results are means
    over the queries with a choice (they select a block, and see more than they select), and 1 if there is none: queries
    without ids do not count.

    The attention is dense: with every query the time is quadratic, and a few hundred queries are enough for a mean.
    Memory is linear. Waits for a GPU to read the lengths of the sequences.

    Args:
        q: [B, Hq, Sq, D]; k: [B, Hkv, Sk, D].
        selections: by name, block_indices [B, Hkv, Sq, topk].
        num_queries: measure so many queries of each row, spread evenly; None: all.
        per_group: return a number for each group, [Hkv], instead of the mean over the groups.
        Others: as for `flexmsa.attention`.

    Returns:
        By name, the `Recall` of each selection, in float32.

    Raises:
        ValueError, TypeError: an argument is not as described.

    >>> q, k = torch.randn(1, 4, 64, 8), torch.randn(1, 2, 64, 8)
    >>> ids = window_blocks(q, k, block_size=8, topk=3)
    >>> recalls(q, k, {"window": ids}, block_size=8, per_group=True)["window"].score.shape
    torch.Size([2])
    """
    validation.check_main_inputs(q, k, k, scale)
    validation.check_settings(block_size)
    if isinstance(selections, Tensor):
        raise TypeError("selections: expected block_indices by name, got a Tensor; call `recall` for one selection")
    for ids in selections.values():
        validation.check_block_indices(ids, q.shape[0], k.shape[1], q.shape[2], q.device)
        check_block_indices(ids, -(-k.shape[2] // block_size))
    if num_queries is not None:
        validation.check_int("num_queries", num_queries, 1)
    sequences = check_sequences(q, k.shape[2], cu_seqlens, kv_starts, kv_lens)
    scale = default_scale(scale, q)
    sums = {name: torch.zeros(3, k.shape[1], dtype=torch.float64, device=q.device) for name in selections}
    for batch, queries, keys, num_visible in _parts(q, sequences, num_queries):
        for group in range(k.shape[1]):
            heads = q[batch].unflatten(0, (k.shape[1], -1))[group, :, queries]
            mass = _block_mass(heads, k[batch, group, keys], num_visible, block_size, scale)
            for name, ids in selections.items():
                sums[name][:, group] += _compare(mass, ids[batch, group, queries].long(), num_visible, block_size)
    return {name: _means(total if per_group else total.sum(1)) for name, total in sums.items()}


def window_blocks(q: Tensor, k: Tensor, *, block_size: int = 128, topk: int = 16, num_init_blocks: int = 0) -> Tensor:
    """Select the `num_init_blocks` oldest blocks, as an attention sink, and the newest: topk in total.

    Args:
        q: [B, any, Sq, any]; k: [B, Hkv, Sk, any]; only their shapes and device are read. Each row is one sequence.

    Returns:
        block_indices [B, Hkv, Sq, topk] int32; a query that sees fewer blocks has -1 in some places.

    >>> x = torch.empty(1, 1, 5, 1)
    >>> window_blocks(x, x, block_size=1, topk=3, num_init_blocks=1)[0, 0, 4]
    tensor([0, 3, 4], dtype=torch.int32)
    """
    newest = _own_block(q, k, block_size)[:, None]
    place = torch.arange(topk, device=q.device)
    window = newest - topk + 1 + place
    ids = torch.where(place < num_init_blocks, place, window.masked_fill(window < num_init_blocks, -1))
    ids = ids.masked_fill(ids > newest, -1)
    return ids.to(torch.int32).expand(q.shape[0], k.shape[1], -1, -1)


def random_blocks(q: Tensor, k: Tensor, *, block_size: int = 128, topk: int = 16) -> Tensor:
    """Select the query's own block and random others, topk in total; arguments and result as for `window_blocks`.

    >>> random_blocks(torch.empty(1, 1, 9, 1), torch.empty(1, 1, 9, 1), block_size=1, topk=3)[0, 0, 0]
    tensor([ 0, -1, -1], dtype=torch.int32)
    """
    newest = _own_block(q, k, block_size)[:, None]
    blocks = torch.arange(-(-k.shape[2] // block_size), device=q.device)
    scores = torch.rand(q.shape[0], k.shape[1], q.shape[2], len(blocks), device=q.device)
    scores = scores.masked_fill(blocks == newest, 2.0).masked_fill(blocks > newest, -1.0)
    best = scores.topk(min(topk, len(blocks)), dim=-1)
    ids = best.indices.masked_fill(best.values < 0, -1).to(torch.int32)
    return torch.nn.functional.pad(ids, (0, topk - ids.shape[-1]), value=-1)


def _own_block(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    return torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device) // block_size


def _parts(q: Tensor, sequences: Sequences, num_queries: int | None) -> Iterator[tuple[int, Tensor, slice, Tensor]]:
    """Yield a batch row, some queries of a sequence, its keys up to the last that they see, and how many each sees."""
    heads, seqlen_q = q.shape[1:3]
    step = 1.0 if num_queries is None else max(1.0, seqlen_q / num_queries)
    # The newest query of each stretch: a row's last one has the most to choose from.
    chosen = (seqlen_q - 1 - torch.arange(0, seqlen_q, step).long()).flip(0)
    for batch, q_start, q_end, k_start, k_end in list_sequences(sequences.table):
        queries = chosen[(chosen >= q_start) & (chosen < q_end) & (k_end - q_end + chosen >= k_start)]
        rows = max(1, _HELD // max(1, heads * (k_end - k_start)))
        for part in queries.split(rows):
            if len(part):
                num_visible = k_end - q_end + part + 1 - k_start
                yield batch, part.to(q.device), slice(k_start, k_start + int(num_visible[-1])), num_visible.to(q.device)


def _block_mass(q: Tensor, k: Tensor, num_visible: Tensor, block_size: int, scale: float) -> Tensor:
    """Return [queries, blocks]: the attention mass of each block of keys, averaged over the heads q [G, queries, D]."""
    dtype = statistics_dtype(q)
    # Autocast would round the scores.
    with torch.autocast(q.device.type, enabled=False):
        scores = (q.to(dtype) * scale) @ k.to(dtype).T
    hidden = torch.arange(k.shape[0], device=q.device) >= num_visible[:, None]
    mass = scores.masked_fill_(hidden, -torch.inf).softmax(-1).mean(0)
    return torch.nn.functional.pad(mass, (0, -k.shape[0] % block_size)).unflatten(-1, (-1, block_size)).sum(-1)


def _compare(mass: Tensor, ids: Tensor, num_visible: Tensor, block_size: int) -> Tensor:
    """Return the number of queries with a choice, and the sums of both recalls over them."""
    blocks = mass.shape[-1]
    visible = (num_visible + block_size - 1).div(block_size, rounding_mode="floor")
    ids = ids.masked_fill((ids < 0) | (ids >= visible[:, None]), blocks)
    selected = torch.zeros(len(ids), blocks + 1, dtype=torch.bool, device=ids.device).scatter(1, ids, True)[:, :blocks]
    count = selected.sum(1)
    sorted_mass, order = mass.sort(dim=1, descending=True, stable=True)
    best = torch.arange(blocks, device=ids.device) < count[:, None]
    both = best & selected.gather(1, order)
    has_choice = (visible > count) & (count > 0)
    block = both.sum(1) / count.clamp(min=1)
    score = (sorted_mass * both).sum(1) / (sorted_mass * best).sum(1).clamp(min=torch.finfo(mass.dtype).tiny)
    return torch.stack([has_choice.sum(), (block * has_choice).sum(), (score * has_choice).sum()]).double()


def _means(sums: Tensor) -> Recall:
    queries, block, score = sums.float()
    one = torch.ones_like(queries)
    return Recall(*(torch.where(queries > 0, x / queries.clamp(min=1), one) for x in (block, score)))
