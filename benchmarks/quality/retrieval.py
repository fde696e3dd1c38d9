"""The retrieval task: statements of keys and values in text, and questions that only they answer.

A statement is a mark, two letters of a key and two of a value; a question is another mark and the key, and its answer
the value. Letters are tokens that text never has. Training text has statements and questions in every row, so that
every arm learns the task; held-out text for the loss has none.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.settings import Settings
from benchmarks.quality.tokens import ALPHABETS, FIRST_LETTER, QUESTION, STATEMENT, Corpus

__all__ = ["Scores", "answers", "associative_recall", "needles", "plant"]

KEY = 2
VALUE = ALPHABETS - KEY
LENGTH = 1 + KEY + VALUE
# A place for a statement or a question.
SLOT = 8
DEPTHS = (0.05, 0.25, 0.5, 0.75, 0.9)


def plant(ids: np.ndarray, settings: Settings, generator: np.random.Generator) -> None:
    """Write statements over a row of text [S], in place, from one to the most, and of each a question behind it."""
    num_slots = len(ids) // SLOT
    most = max(1, settings.statements * len(ids) // settings.context)
    count = int(generator.integers(1, min(most, num_slots // 2) + 1))
    slots = np.sort(generator.choice(num_slots, (count, 2), replace=False), axis=1)
    for fact, (statement, question) in zip(_draw_facts(count, settings, generator), slots, strict=True):
        _write(ids, statement, STATEMENT, fact)
        _write(ids, question, QUESTION, fact)


def _draw_facts(count: int, settings: Settings, generator: np.random.Generator) -> np.ndarray:
    """Keys, each another, and values: [count, 4]. Each of the four places has an alphabet of its own."""
    letters = settings.letters
    keys = np.stack(divmod(generator.choice(letters**KEY, count, replace=False), letters), axis=1)
    values = generator.integers(letters, size=(count, VALUE))
    return FIRST_LETTER + letters * np.arange(KEY + VALUE) + np.concatenate([keys, values], axis=1)


def _write(ids: np.ndarray, slot: int, mark: int, fact: np.ndarray) -> None:
    ids[slot * SLOT] = mark
    ids[slot * SLOT + 1 : slot * SLOT + LENGTH] = fact


# From ids [S] and a number n: the log-probabilities [n, vocabulary] of the last n tokens, each behind those before it.
Scores = Callable[[Tensor, int], Tensor]


def answers(scores: Scores, ids: Tensor, num_questions: int) -> tuple[Tensor, Tensor]:
    """How a model answers the questions at the end of ids: whether rightly, and nats per letter, [num_questions] each.

    An answer is right if each of its letters is the likeliest token, behind the right letters before it.
    """
    answer = ids[-LENGTH * num_questions :].view(num_questions, LENGTH)[:, 1 + KEY :]
    found = scores(ids, LENGTH * num_questions).float().unflatten(0, (num_questions, LENGTH))[:, 1 + KEY :]
    nats = -found.gather(-1, answer[..., None]).squeeze(-1)
    return (found.argmax(-1) == answer).all(1).cpu().float(), nats.mean(1).cpu()


def _ask(filler: Tensor, facts: Tensor, starts: list[int], order: list[int]) -> Tensor:
    """Text with statements of facts [n, 4] at `starts`, which ends with questions of some of them."""
    ids = filler.clone()
    for start, fact in zip(starts, facts, strict=True):
        ids[start : start + LENGTH] = torch.cat([torch.tensor([STATEMENT]), fact])
    asked = [torch.cat([torch.tensor([QUESTION]), facts[which]]) for which in order]
    ids[len(ids) - LENGTH * len(order) :] = torch.cat(asked)
    return ids


def needles(corpus: Corpus, settings: Settings, scores: Scores, device: torch.device) -> list[dict[str, Any]]:
    """Ask for statements at several depths, by length: a single one in the text, or one at each depth (multi-key)."""
    generator = np.random.default_rng(1)
    rows = []
    for length in settings.needle_lengths:
        sums = {kind: torch.zeros(2, len(DEPTHS)) for kind in ("single", "multi")}
        for sample in range(settings.needle_samples):
            filler = corpus.stream(sample * 7, length)
            facts = torch.from_numpy(_draw_facts(len(DEPTHS), settings, generator))
            # Nothing is planted in the questions at the end, nor in the first block, which a sink sees.
            first, room = settings.block_size, length - settings.block_size - LENGTH * (len(DEPTHS) + 1)
            jitter = generator.random() * 0.04 * room
            starts = [first + int(depth * room + jitter) for depth in DEPTHS]
            for place, start in enumerate(starts):
                ids = _ask(filler, facts[place : place + 1], [start], [0]).to(device)
                sums["single"][:, place] += torch.cat(answers(scores, ids, 1))
            order = torch.from_numpy(generator.permutation(len(DEPTHS)))
            ids = _ask(filler, facts, starts, order.tolist()).to(device)
            sums["multi"][:, order] += torch.stack(answers(scores, ids, len(order)))
        for kind, total in sums.items():
            found = zip(DEPTHS, *(total / settings.needle_samples).tolist(), strict=True)
            common = {"length": length, "kind": kind, "samples": settings.needle_samples}
            rows += [{**common, "depth": depth, "right": right, "nats": nats} for depth, right, nats in found]
    return rows


def associative_recall(corpus: Corpus, settings: Settings, scores: Scores, device: torch.device) -> dict[str, Any]:
    """Many statements side by side behind the first block, and all of their questions at the end (MQAR)."""
    generator = np.random.default_rng(2)
    right, nats = [], []
    for sample in range(settings.needle_samples):
        filler = corpus.stream(sample * 7 + 3, settings.context)
        facts = torch.from_numpy(_draw_facts(settings.pairs, settings, generator))
        starts = [settings.block_size + LENGTH * place for place in range(settings.pairs)]
        order = generator.permutation(settings.pairs).tolist()
        ids = _ask(filler, facts, starts, order).to(device)
        for into, found in zip((right, nats), answers(scores, ids, len(order)), strict=True):
            into.append(found.mean().item())
    return {"pairs": settings.pairs, "length": settings.context, "right": right, "nats": nats}
