"""Tokens per second and memory of training steps, by length and by what the queries attend to."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.quality.arms import Arm, Phase
from benchmarks.quality.settings import Settings
from benchmarks.quality.tokens import Corpus
from benchmarks.quality.train import Training

__all__ = ["KINDS", "speeds"]

# Name -> how an arm attends, and whether its index branches learn.
KINDS = {
    "dense": ("dense", False),
    "MSA": ("select", True),
    "MSA, warm-up": ("dense", True),
    "window": ("window", False),
    "random": ("random", False),
}
WARM, TIMED = 2, 4


def speeds(settings: Settings, corpus: Corpus, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time steps of the optimizer on batches of one row, for each kind and length."""
    for kind, (way, kl) in KINDS.items():
        arm = Arm(kind, kind, (Phase(WARM + TIMED, way, kl),), settings.topk)
        torch.compiler.reset()
        for length in settings.speed_lengths:
            row = {"kind": kind, "length": length}
            timed = replace(settings, context=length, batch_rows=1, short_steps=0)
            try:
                yield {**row, **_time(timed, arm, corpus, device)}
            except torch.OutOfMemoryError:
                yield {**row, "seconds": None, "memory": None}


def _time(settings: Settings, arm: Arm, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    rows = -(-corpus.train.size // settings.context)
    long = corpus.train.reshape(-1)[: rows * settings.context - settings.context].reshape(-1, settings.context)
    training = Training(settings, arm, 0, replace(corpus, train=long), device)
    if device.type == "cuda":
        training.compile()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for number in range(WARM + TIMED):
        started = time.monotonic()
        training.step_once(number)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - started)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"seconds": statistics.median(seconds[WARM:]), "memory": memory}
