"""Checks before an arm is trained: a wrong arm must not become a finding."""

import math
from typing import Any

import torch

import flexmsa
from benchmarks.quality.arms import Arm, ArmAttention, choose
from benchmarks.quality.settings import Settings
from benchmarks.quality.train import Training, autocast, batch, labels_of

__all__ = ["check", "count_keys", "expected_keys"]


def check(training: Training) -> dict[str, Any]:
    """Check an arm's untrained model: its first loss, its attention within the budget, and the keys that it reads.

    Returns:
        What was found, for the results.

    Raises:
        ValueError: something is not as expected.
    """
    settings, arm, model = training.settings, training.arm, training.model
    model.eval()
    found: dict[str, Any] = {"first_loss": _first_loss(training), "uniform_loss": math.log(settings.vocabulary)}
    if abs(found["first_loss"] - found["uniform_loss"]) > 0.3:
        raise ValueError(
            f"first loss: expected about ln V = {found['uniform_loss']:.2f}, got {found['first_loss']:.2f}"
        )
    layer = model.blocks[0].attention
    for way in sorted({phase.way for phase in arm.phases}):
        error = found[f"{way}_from_dense"] = apart_from_dense(layer, way, training.device)
        if not error < (2e-2 if training.device.type == "cuda" else 1e-5):
            raise ValueError(
                f"{arm.name}: expected the way {way!r} to be dense where the budget covers all keys, got an output "
                f"that is off by {error:.1e}"
            )
        counted = count_keys(layer, way, settings, arm, training.device)
        expected = [expected_keys(query, way, settings, arm) for query in queries(settings)]
        if counted != expected:
            raise ValueError(f"{arm.name}: expected the way {way!r} to read {expected} keys, got {counted}")
        found[f"{way}_keys"] = counted
    found["keys_of_queries"] = queries(settings)
    return found


@torch.no_grad()
def _first_loss(training: Training) -> float:
    ids = batch(training.corpus, training.settings, training.seed, 0)[:1].to(training.device)
    choose(training.model, "dense")
    with torch.compiler.set_stance("force_eager"), autocast(training.device):
        x, _ = training.model.hidden(ids)
        return training.model.score(x, labels_of(ids)).item() / (ids.numel() - 1)


def queries(settings: Settings) -> list[int]:
    """Queries whose keys are counted: within the budget, on a block's first and last key, and the last one."""
    block, budget, last = settings.block_size, settings.block_size * settings.topk, settings.context - 1
    return [0, budget - 1, budget + block // 2, last - block, last]


def expected_keys(query: int, way: str, settings: Settings, arm: Arm) -> int:
    """Keys that a query reads: all visible ones, or topk blocks, of which its own has keys up to the query only.

    >>> from benchmarks.quality.settings import FULL
    >>> arm = Arm("msa", "", (), 16)
    >>> [expected_keys(query, "select", FULL, arm) for query in (5, 2047, 2048, 16383)]
    [6, 2048, 1921, 2048]
    """
    block = settings.block_size
    if way == "dense" or query // block < arm.topk:
        return query + 1
    return (arm.topk - 1) * block + query % block + 1


@torch.no_grad()
def apart_from_dense(layer: ArmAttention, way: str, device: torch.device) -> float:
    """How far a way's output is from dense attention where every visible block is in the budget, relative to the
    largest output."""
    config = layer.config
    assert config.topk is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.topk * config.block_size, config.hidden_size, generator=generator).to(device)
    outputs = []
    for each in ("dense", way):
        layer.choose(each, False)
        with autocast(device):
            outputs.append(layer(x)[0].float())
    dense, other = outputs
    return ((other - dense).abs().max() / dense.abs().max()).item()


def count_keys(layer: ArmAttention, way: str, settings: Settings, arm: Arm, device: torch.device) -> list[int]:
    """Count the keys that queries read in the attention itself: those whose values have a gradient.

    Queries of zeros weigh all keys that they read alike, so that none is lost to rounding.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, settings.context, settings.hidden_size, generator=generator).to(device)
    layer.choose(way, False)
    sizes = {"block_size": settings.block_size, "topk": layer.topk, "block_indices": layer.given_blocks(x)}
    with autocast(device):
        q, k, v, index_q, index_k = (y.detach() for y in layer.project(x))
        q, v = torch.zeros_like(q), v.requires_grad_()
        out = flexmsa.attention(q, k, v, index_q, index_k, **sizes)
    counts = []
    for query in queries(settings):
        (gradient,) = torch.autograd.grad(out[:, :, query].sum(), v, retain_graph=True)
        per_group = (gradient != 0).any(-1).sum(-1).flatten().tolist()
        if len(set(per_group)) > 1:
            raise ValueError(f"{arm.name}: expected all groups of query {query} to read as many keys, got {per_group}")
        counts.append(per_group[0])
    return counts
