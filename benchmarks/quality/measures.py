"""What an arm has learned: losses on held-out text by position and for identifiers, recalls of the index branches."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.arms import SINKS, ArmAttention, choose
from benchmarks.quality.retrieval import associative_recall, needles
from benchmarks.quality.settings import Settings
from benchmarks.quality.train import Training, autocast
from flexmsa import metrics, select_blocks
from flexmsa.recipes.model import GPT

__all__ = ["identifiers", "layer_recalls", "measure"]

# Queries of a row for which the dense attention of a layer is computed, and the rows.
RECALL_QUERIES, RECALL_ROWS = 256, 4
NAME = re.compile(rb"[A-Za-z_]\w{3,}")
ASSIGNMENT = rb"^[ \t]*(?:self\.)?([A-Za-z_]\w{3,})[ \t]*(?::[^=\n]+)?=(?!=)"
DEFINITION = re.compile(rb"\b(?:def|class)[ \t]+([A-Za-z_]\w{3,})|" + ASSIGNMENT, re.MULTILINE)


def measure(training: Training) -> dict[str, Any]:
    """All measurements of a trained arm, which attends as in its last phase.

    They use no compiled code, which would be compiled again for other lengths.
    """
    model, settings, corpus, device = training.model, training.settings, training.corpus, training.device
    model.eval()
    # A run that only had to be measured has not begun a phase.
    choose(model, training.arm.phases[-1].way)
    # For random blocks: the same in each measurement.
    torch.manual_seed(training.seed)

    def scores(ids: Tensor, count: int) -> Tensor:
        with longer_positions(model, settings, len(ids)), torch.no_grad(), autocast(device):
            x, _ = model.hidden(ids[None])
            return model.head(model.norm(x[0, -count - 1 : -1])).float().log_softmax(-1)

    parts: dict[str, Callable[[], Any]] = {
        "heldout": lambda: heldout(training),
        "needles": lambda: needles(corpus, settings, scores, device),
        "associative_recall": lambda: associative_recall(corpus, settings, scores, device),
        "recalls": lambda: layer_recalls(training, RECALL_ROWS),
    }
    found: dict[str, Any] = {"seconds": {}}
    with torch.compiler.set_stance("force_eager"):
        for name, part in parts.items():
            started = time.monotonic()
            found[name] = part()
            found["seconds"][name] = time.monotonic() - started
    return found


@contextlib.contextmanager
def longer_positions(model: GPT, settings: Settings, length: int) -> Iterator[None]:
    """Beyond the context of the training, RoPE with a larger base, whose slowest turn fits the length (NTK-aware)."""
    before = model.blocks[0].attention.config
    config, size = before, before.rotary_size
    if length > settings.context and size > 2:
        factor = (length / settings.context) ** (size / (size - 2))
        config = replace(config, rope_theta=config.rope_theta * factor)
    for block in model.blocks:
        block.attention.config = config
    try:
        yield
    finally:
        for block in model.blocks:
            block.attention.config = before


def heldout(training: Training) -> dict[str, Any]:
    """Losses of held-out rows, in nats: means by position, and sums over identifiers by how far they are known."""
    settings, corpus = training.settings, training.corpus
    edges = position_edges(settings.context)
    distances = distance_edges(settings)
    rows = []
    for number in corpus.test_rows(settings):
        ids = corpus.heldout[number].astype(np.int64)
        losses = token_losses(training.model, torch.from_numpy(ids).to(training.device), training.device)
        means = [losses[first:last].mean().item() for first, last in pairwise(edges)]
        sums, counts = np.zeros(len(distances)), np.zeros(len(distances), int)
        for first, last, distance in identifiers(ids, corpus.token_bytes):
            place = np.searchsorted(distances, distance, side="right") - 1
            sums[place] += losses[first - 1 : last - 1].sum().item()
            counts[place] += 1
        row = {"row": number, "package": corpus.packages[number], "loss": losses.mean().item(), "by_position": means}
        rows.append({**row, "identifiers": sums.tolist(), "identifier_counts": counts.tolist()})
    return {"position_edges": edges, "distance_edges": distances, "rows": rows}


def position_edges(context: int) -> list[int]:
    """Where positions are cut: 0, and powers of two up to the context; the last token has no successor.

    >>> position_edges(1024)
    [0, 64, 128, 256, 512, 1023]
    """
    powers = [context // 2**power for power in range(4, 0, -1)]
    return [0, *powers, context - 1]


def distance_edges(settings: Settings) -> list[int]:
    """Tokens since an identifier was last read, from which bins begin: one begins where a window ends."""
    budget = settings.block_size * settings.topk
    return [0, budget // 4, budget, 2 * budget, 4 * budget]


@torch.no_grad()
def token_losses(model: GPT, ids: Tensor, device: torch.device) -> Tensor:
    """The loss of each token of ids [S] but the first, on the CPU."""
    with autocast(device):
        x, _ = model.hidden(ids[None])
        losses = model.score(x[:, :-1], ids[None, 1:], reduction="none")
    return losses.float().cpu()


def identifiers(ids: np.ndarray, token_bytes: list[bytes]) -> Iterator[tuple[int, int, int]]:
    """The later mentions of names that a row defines: first token, the one after the last, and tokens since the name
    was last mentioned. Names are functions, classes, variables and attributes, of four letters or more.

    >>> text = [b"def", b" area", b"(x):", b" pass", b" area", b"(1)"]
    >>> list(identifiers(np.arange(6), text))
    [(4, 5, 3)]
    """
    found = [token_bytes[number] for number in ids]
    ends = np.cumsum([len(each) for each in found])
    text = b"".join(found)
    defined: dict[bytes, int] = {}
    for match in DEFINITION.finditer(text):
        defined.setdefault(match[1] or match[2], match.start())
    last_seen: dict[bytes, int] = {}
    for match in NAME.finditer(text):
        name = match[0]
        if name not in defined or match.start() < defined[name]:
            continue
        first = int(np.searchsorted(ends, match.start(), side="right"))
        last = int(np.searchsorted(ends, match.end() - 1, side="right")) + 1
        if name in last_seen and first > 0:
            yield first, last, first - last_seen[name]
        last_seen[name] = first


@torch.no_grad()
def layer_recalls(training: Training, num_rows: int) -> dict[str, list[list[float]]]:
    """[block recall, score recall] of each layer, by selection: the index branch, an untrained one, both controls."""
    settings, corpus, device = training.settings, training.corpus, training.device
    config = training.model.blocks[0].attention.config
    sizes: dict[str, Any] = {"block_size": config.block_size, "topk": config.topk}
    # Its weights are none of the model's.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed + 1)
        untrained = ArmAttention(config).to(device)
    sums: dict[str, Tensor] = {}
    chosen = corpus.test_rows(settings)
    chosen = chosen[:: max(1, len(chosen) // num_rows)][:num_rows]
    for number in chosen:
        ids = torch.from_numpy(corpus.heldout[number].astype(np.int64)).to(device)
        with autocast(device):
            x = training.model.embedding(ids[None])
            for layer, block in enumerate(training.model.blocks):
                normed = block.attention_norm(x)
                found = block.attention.project(normed)
                other = untrained.project(normed)
                selections = {
                    "index": select_blocks(found.index_q, found.index_k, **sizes),
                    "untrained": select_blocks(other.index_q, other.index_k, **sizes),
                    "window": metrics.window_blocks(found.q, found.k, num_init_blocks=SINKS, **sizes),
                    "random": metrics.random_blocks(found.q, found.k, **sizes),
                }
                how = {"block_size": config.block_size, "num_queries": RECALL_QUERIES}
                for name, recall in metrics.recalls(found.q, found.k, selections, **how).items():
                    into = sums.setdefault(name, torch.zeros(settings.num_layers, 2))
                    into[layer] += torch.stack(recall).cpu()
                x, _ = block(x, None, None, None)
    return {name: (total / len(chosen)).tolist() for name, total in sums.items()}
