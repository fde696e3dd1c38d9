"""Train one arm on one device, in calls of limited time that continue from one another."""

import hashlib
import math
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flexmsa
from benchmarks.quality.arms import Arm, Step, choose, make_model
from benchmarks.quality.retrieval import plant
from benchmarks.quality.settings import Settings
from benchmarks.quality.tokens import Corpus
from flexmsa.demo.train import learning_rate
from flexmsa.recipes.pretrain import branches, by_dims
from flexmsa.recipes.text import IGNORED

__all__ = ["Training", "autocast", "batch", "labels_of"]


def batch(corpus: Corpus, settings: Settings, seed: int, number: int) -> Tensor:
    """The batch of this number, [rows, context] int64: it depends on nothing else, the arm least of all.

    The first are of more and shorter rows.
    """
    short = number < settings.short_steps
    context, count = settings.row_sizes(short)
    every = corpus.train.reshape(-1, context)
    epoch, first = divmod((number if short else number - settings.short_steps) * count, len(every))
    rows = []
    for place in range(first, first + count):
        order = _order(seed, epoch + place // len(every), len(every))
        ids = every[order[place % len(every)]].astype(np.int64)
        plant(ids, settings, np.random.default_rng([seed, number, place - first]))
        rows.append(torch.from_numpy(ids))
    return torch.stack(rows)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def labels_of(ids: Tensor) -> Tensor:
    """The token after each, [B, S]; none after the last."""
    return torch.cat([ids[:, 1:], ids.new_full((len(ids), 1), IGNORED)], dim=1)


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU; the weights are in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class Training:
    """An arm's model and optimizer.

    Attributes:
        done: the number of steps done.
        log: an entry for every few steps.
        batches: a digest of the batches that trained the base model.
    """

    def __init__(self, settings: Settings, arm: Arm, seed: int, corpus: Corpus, device: torch.device) -> None:
        self.settings, self.arm, self.seed, self.corpus, self.device = settings, arm, seed, corpus, device
        self.model = make_model(settings, arm, seed).to(device)
        self.branches = branches(self.model)
        groups = [
            {"params": parameters, "weight_decay": settings.weight_decay if dims > 1 else 0.0, "index": index}
            for index, branch in enumerate(self.branches)
            for dims, parameters in by_dims(branch).items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device.type == "cuda")
        self.done, self.batches, self.seconds = 0, "", 0.0
        self.log: list[dict[str, Any]] = []

    def compile(self) -> None:
        """Run blocks and scores through torch.compile, and compile this library's kernels side by side before that."""
        s = self.settings
        sizes = {"num_heads": s.num_heads, "num_kv_heads": s.num_kv_heads, "head_dim": s.head_dim}
        flexmsa.warm_up(**sizes, index_head_dim=s.index_head_dim, block_size=s.block_size, topk=self.arm.topk)
        for block in self.model.blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
        self.model.score = torch.compile(self.model.score, fullgraph=True, dynamic=False)

    def train(self, seconds: float) -> Iterator[int]:
        """Train until the end or for so many seconds; yields the number of steps done after each logged one."""
        started = last = time.monotonic()
        losses: list[Tensor] = []
        for number in range(self.done, self.arm.steps):
            step = self.arm.step(number)
            losses.append(self._train_step(step))
            self.done = number + 1
            ends = self.done == self.arm.steps or self.arm.step(self.done).phase is not step.phase
            if ends or self.done % self.settings.log_every == 0:
                found = torch.stack(losses).mean(0).tolist()
                now = time.monotonic()
                self._add(step, found, len(losses), now - last)
                losses, last = [], now
                yield self.done
                # What the caller does meanwhile counts as time of the call, not of the steps.
                last = time.monotonic()
                if last - started > seconds:
                    return

    def step_once(self, number: int) -> None:
        """One step, without a log."""
        self._train_step(self.arm.step(number))

    def _train_step(self, step: Step) -> Tensor:
        """One step of the optimizer; returns the loss, the KL of each layer, and both gradient norms."""
        settings, phase = self.settings, step.phase
        if step.in_phase == 0 or not self.model.training:
            self._begin(step)
        ids = batch(self.corpus, settings, self.seed, step.batch)
        if not phase.index_only:
            self.batches = hashlib.sha256(self.batches.encode() + ids.numpy().tobytes()).hexdigest()[:16]
        if phase.way == "random":
            # A run that continues draws the blocks that it would have drawn.
            torch.manual_seed(1_000_003 * self.seed + self.done)
        if self.device.type == "cuda":
            ids = ids.pin_memory().to(self.device, non_blocking=True)
        labels = labels_of(ids)
        with autocast(self.device):
            x, index_loss = self.model.hidden(ids)
            loss = self.model.score(x, labels) / (ids.numel() - len(ids))
        (loss + index_loss).backward()
        steps = phase.steps if phase.index_only else settings.short_steps + settings.steps
        rate = learning_rate((step.in_phase if phase.index_only else step.batch) + 1, steps, settings.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # One norm for both would let one loss scale the other's step.
        norms = [nn.utils.clip_grad_norm_(branch, settings.max_norm) for branch in self.branches]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        kl = self.model.index_losses() if phase.kl else loss.new_zeros(settings.num_layers)
        return torch.cat([loss.detach()[None], kl, *(norm[None].to(kl) for norm in norms)])

    def _begin(self, step: Step) -> None:
        """Put the model into the step's phase."""
        self.model.train()
        choose(self.model, step.phase.way, step.phase.kl)
        for parameter in self.branches[0]:
            parameter.requires_grad_(not step.phase.index_only)

    def _add(self, step: Step, found: list[float], steps: int, seconds: float) -> None:
        loss, *kl, norm, index_norm = found
        tokens = steps * math.prod(self.settings.row_sizes(step.phase.short))
        self.seconds += seconds
        entry = {"step": self.done, "way": step.phase.way, "index_only": step.phase.index_only, "loss": loss}
        entry |= {"kl": kl if step.phase.kl else None, "grad_norm": norm, "index_grad_norm": index_norm}
        self.log.append({**entry, "seconds": seconds, "tokens_per_second": tokens / seconds})

    def save(self, path: Path) -> None:
        """Write what `load` needs; all of it or nothing. A run in the short phase is any arm's."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "done": self.done}
        state |= {"log": self.log, "batches": self.batches, "seconds": self.seconds, "key": self._key()}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a file of `save`.

        Raises:
            ValueError: it is of other settings or another text.
        """
        state = torch.load(path, map_location=self.device)
        self.done = state["done"]
        if state["key"] != self._key():
            raise ValueError(f"{path}: expected a run of these settings and this text, got another; remove it")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.log, self.batches, self.seconds = state["log"], state["batches"], state["seconds"]
        self.model.eval()

    def _key(self) -> list[str]:
        shared = self.done <= self.settings.short_steps
        return [self.settings.key(), self.corpus.facts["digest"], "any" if shared else self.arm.name, str(self.seed)]
