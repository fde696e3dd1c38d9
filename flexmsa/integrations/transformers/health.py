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

    def selected(branch: IndexHeads) -> Tensor:
        return select(branch.index_q[row, :, queries], branch.index_k[row, :, keys], config)

    own = heads.index_q[row, :, queries], heads.index_k[row, :, keys]
    selections = {"learned": selected(heads), "untrained": selected(untrained), "window": window_blocks(*own, config)}
    return LayerHealth(**metrics.recalls(q, k, selections, block_size=config.block_size, scale=scale))


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
    """Return `metrics.window_blocks` of `config.topk` blocks, [B, Hkv, Sq, topk]."""
    assert config.topk is not None
    groups = index_k.expand(-1, index_q.shape[1], -1, -1)
    sizes = {"block_size": config.block_size, "topk": config.topk}
    return metrics.window_blocks(index_q, groups, **sizes, num_init_blocks=num_init_blocks)


def random_blocks(index_q: Tensor, index_k: Tensor, config: MSAConfig) -> Tensor:
    """Return `metrics.random_blocks` of `config.topk` blocks, [B, Hkv, Sq, topk]."""
    assert config.topk is not None
    groups = index_k.expand(-1, index_q.shape[1], -1, -1)
    return metrics.random_blocks(index_q, groups, block_size=config.block_size, topk=config.topk)
