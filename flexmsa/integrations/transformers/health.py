"""Measure a selection, and compare it with baselines without training: an untrained branch, a window, random blocks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flexmsa import functional, metrics
from flexmsa.config import MSAConfig
from flexmsa.integrations.transformers.index_branch import IndexHeads, add_index_branch, project_index
from flexmsa.integrations.transformers.tensor_parallel import head_mesh

__all__ = ["LayerHealth", "measure", "random_blocks", "untrained_heads", "window_blocks"]

# The newest queries of the longest sequence: enough for a mean, and the cost is linear in the number of keys.
MEASURED_QUERIES = 128


class LayerHealth(NamedTuple):
    """Recalls (see flexmsa.metrics) of one layer: of its index branch, and of two selections without training."""

    learned: metrics.Recall
    untrained: metrics.Recall
    window: metrics.Recall


@torch.no_grad()
def untrained_heads(
    attention: Any, config: MSAConfig, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
) -> IndexHeads:
    """Return the index heads of an untrained branch as `convert` makes it, with the same weights in every call."""
    weight = attention.index_q_proj.weight
    branch = nn.Module()
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        torch.manual_seed(attention.layer_idx)
        add_index_branch(branch, config, config.hidden_size**-0.5, weight.dtype, weight.device)
    heads = project_index(branch, attention, hidden_states, position_embeddings)
    mesh = head_mesh(attention)
    if mesh is not None:
        heads = heads._replace(index_q=heads.index_q.chunk(mesh.size(), dim=1)[mesh.get_local_rank()])
    return heads


@torch.no_grad()
def measure(
    q: Tensor,
    k: Tensor,
    heads: IndexHeads,
    untrained: IndexHeads,
    sequences: Tensor | None,
    config: MSAConfig,
    scale: float | None,
) -> LayerHealth:
    """Compare three selections of `config.topk` blocks with the blocks that get the most attention in the main branch.

    Measures the newest queries of the longest sequence in the batch, also in the warm-up, where attention is still
    dense. Waits for a GPU to read the lengths.
    """
    row, queries, keys = _longest(q, k, sequences)
    q, k = q[row, :, queries], k[row, :, keys]

    def recall(block_indices: Tensor) -> metrics.Recall:
        return metrics.recall(q, k, block_indices, block_size=config.block_size, scale=scale)

    def selected(branch: IndexHeads) -> Tensor:
        return select(branch.index_q[row, :, queries], branch.index_k[row, :, keys], config)

    trained = selected(heads)
    window = window_blocks(heads.index_q[row, :, queries], heads.index_k[row, :, keys], config)
    return LayerHealth(recall(trained), recall(selected(untrained)), recall(window))


def _longest(q: Tensor, k: Tensor, sequences: Tensor | None) -> tuple[slice, slice, slice]:
    """Return the batch row, the measured queries and the keys of the longest sequence."""
    if sequences is None:
        return slice(0, 1), slice(max(0, q.shape[2] - MEASURED_QUERIES), q.shape[2]), slice(0, k.shape[2])
    length = torch.where(sequences[:, 4] > sequences[:, 3], sequences[:, 2] - sequences[:, 1], -1)
    row, q_start, q_end, k_start, k_end = sequences[length.argmax()].tolist()
    return slice(row, row + 1), slice(max(q_start, q_end - MEASURED_QUERIES), q_end), slice(k_start, k_end)


def select(index_q: Tensor, index_k: Tensor, config: MSAConfig) -> Tensor:
    """Return the selection of the index branch, block_indices [B, Hkv, Sq, topk]."""
    assert config.topk is not None
    forced: dict[str, Any] = {"num_local_blocks": config.num_local_blocks, "num_init_blocks": config.num_init_blocks}
    return functional.select_blocks(index_q, index_k, block_size=config.block_size, topk=config.topk, **forced)


def window_blocks(index_q: Tensor, index_k: Tensor, config: MSAConfig, num_init_blocks: int = 0) -> Tensor:
    """Select the `num_init_blocks` oldest blocks, as an attention sink, and the newest: `config.topk` in total.

    Returns:
        block_indices [B, Hkv, Sq, topk] int32 for one causal sequence per row, like those of `select`.
    """
    newest = _own_block(index_q, index_k, config)[:, None]
    assert config.topk is not None
    ids = torch.arange(config.topk, device=newest.device)
    reach = config.topk - num_init_blocks
    window = torch.where(ids < num_init_blocks, ids, newest - reach + 1 + ids - num_init_blocks)
    window = window.masked_fill((ids >= num_init_blocks) & (window < num_init_blocks), -1)
    window = window.masked_fill(window > newest, -1)
    return window.to(torch.int32).expand(*index_q.shape[:3], -1)


def random_blocks(index_q: Tensor, index_k: Tensor, config: MSAConfig) -> Tensor:
    """Select the query's own block and random others, `config.topk` in total; the shape is that of `window_blocks`."""
    newest = _own_block(index_q, index_k, config)[:, None]
    blocks = torch.arange(-(-index_k.shape[2] // config.block_size), device=newest.device)
    scores = torch.rand(*index_q.shape[:3], len(blocks), device=newest.device)
    scores = scores.masked_fill(blocks == newest, 2.0).masked_fill(blocks > newest, -1.0)
    assert config.topk is not None
    best = scores.topk(min(config.topk, len(blocks)), dim=-1)
    return best.indices.masked_fill(best.values < 0, -1).to(torch.int32)


def _own_block(index_q: Tensor, index_k: Tensor, config: MSAConfig) -> Tensor:
    seqlen_q, seqlen_k = index_q.shape[2], index_k.shape[2]
    return torch.arange(seqlen_k - seqlen_q, seqlen_k, device=index_q.device) // config.block_size
