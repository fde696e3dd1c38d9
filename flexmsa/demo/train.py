"""Train the MSA model and its dense twin side by side, on the same batches, and measure both."""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flexmsa import functional, metrics
from flexmsa._progress import Progress
from flexmsa.config import MSAConfig
from flexmsa.demo.model import GPT, dense_twin, language_loss
from flexmsa.demo.text import Text, random_batch, spread_windows


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on. The defaults take about four minutes on two CPU cores."""

    steps: int = 420
    warmup: int = 120
    batch_size: int = 4
    context: int = 512
    seed: int = 0
    device: str = "cpu"
    out: Path = Path("out/demo")
    prompt: str = "import os\nimport sys\n\n\ndef "
    generated_bytes: int = 300
    temperature: float = 0.8
    num_layers: int = 3
    hidden_size: int = 128
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 16
    topk: int = 4
    learning_rate: float = 3e-3
    index_loss_weight: float = 1.0
    probe_every: int = 25
    probe_windows: int = 4
    validation_windows: int = 128

    def attention(self) -> MSAConfig:
        """The settings of one layer."""
        return MSAConfig(
            self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            index_head_dim=self.head_dim,
            block_size=self.block_size,
            topk=self.topk,
        )


class Step(NamedTuple):
    """One step of both models; losses in nats, `index_loss` the mean over the layers."""

    step: int
    sparse: bool
    msa_loss: float
    dense_loss: float
    index_loss: float


class Probe(NamedTuple):
    """Recalls of the index branch after a step, one of each kind per layer."""

    step: int
    block_recall: list[float]
    score_recall: list[float]


class Selection(NamedTuple):
    """A layer's selection on some text: block_indices [B, Hkv, S, topk], and its recall."""

    block_indices: Tensor
    recall: metrics.Recall


class Training:
    """Both models, their optimizers, and the measurements so far.

    Attributes:
        steps, probes: the history, complete at any time.
        seconds: time spent in `run`.
    """

    def __init__(self, settings: Settings, text: Text) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.text = settings, text
        self.msa = GPT(settings.attention(), settings.num_layers).to(settings.device)
        self.dense = dense_twin(self.msa)
        self.optimizers = {
            model: torch.optim.AdamW(_branches(model), lr=settings.learning_rate, betas=(0.9, 0.95))
            for model in (self.msa, self.dense)
        }
        self.batches = torch.Generator().manual_seed(settings.seed)
        self.probe_ids = spread_windows(text.validation, settings.probe_windows, settings.context)
        self.steps: list[Step] = []
        self.probes: list[Probe] = []
        self.seconds = 0.0

    def run(self, progress: Progress) -> None:
        """Train to the end: the dense warm-up, then sparse."""
        started = time.monotonic()
        try:
            for step in range(1, self.settings.steps + 1):
                self.steps.append(self._step(step))
                if step % self.settings.probe_every == 0 or step in (1, self.settings.steps):
                    self.probes.append(self._probe(step))
                progress.update(step, describe(self.steps[-1], self.probes[-1]))
        finally:
            progress.close()
            self.seconds = time.monotonic() - started

    def _step(self, step: int) -> Step:
        settings = self.settings
        sparse = step > settings.warmup
        self.msa.set_topk(settings.topk if sparse else None)
        ids = random_batch(self.text.train, settings.batch_size, settings.context + 1, self.batches)
        ids = ids.to(settings.device)
        msa_loss, index_loss = self._learn(self.msa, step, ids)
        dense_loss, _ = self._learn(self.dense, step, ids)
        return Step(step, sparse, msa_loss, dense_loss, index_loss / settings.num_layers)

    def _learn(self, model: GPT, step: int, ids: Tensor) -> tuple[float, float]:
        optimizer = self.optimizers[model]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, self.settings.steps, self.settings.learning_rate)
        model.train()
        logits, index_loss = model(ids[:, :-1])
        loss = language_loss(logits, ids[:, 1:])
        optimizer.zero_grad()
        (loss + self.settings.index_loss_weight * index_loss).backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        return loss.item(), index_loss.item()

    def _probe(self, step: int) -> Probe:
        recalls = [selection.recall for selection in self.selections()]
        return Probe(step, [recall.block.item() for recall in recalls], [recall.score.item() for recall in recalls])

    @torch.no_grad()
    def selections(self) -> list[Selection]:
        """Each layer's selection on the probe's text; in the warm-up, the selection that it would make."""
        self.msa.eval()
        x = self.msa.embedding(self.probe_ids.to(self.settings.device))
        found = []
        for block in self.msa.blocks:
            layer, inputs = block.attention, block.attention_norm(x)
            q, k, _, index_q, index_k = layer.project(inputs)
            size = self.settings.block_size
            chosen = functional.select_blocks(index_q, index_k, block_size=size, topk=self.settings.topk)
            found.append(Selection(chosen, metrics.recall(q, k, chosen, block_size=size)))
            x, _ = block(x)
        return found

    @torch.no_grad()
    def validate(self, model: GPT, count: int) -> Tensor:
        """Return [count]: the loss on each of `count` held-out windows."""
        model.eval()
        ids = spread_windows(self.text.validation, count, self.settings.context + 1).to(self.settings.device)
        losses = [
            language_loss(model(rows[:, :-1])[0], rows[:, 1:], reduction="none").view(len(rows), -1).mean(1)
            for rows in ids.split(self.settings.batch_size)
        ]
        return torch.cat(losses).double().cpu()


def _branches(model: GPT) -> list[dict[str, list[nn.Parameter]]]:
    """The parameters in two groups, index branches and all others, whose gradients are clipped independently."""
    groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for name, parameter in model.named_parameters():
        groups[".index_" in name].append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear up to the peak in the first twentieth of the steps, then a cosine down to a tenth of it."""
    rise = max(1, steps // 20)
    if step <= rise:
        return peak * step / rise
    return peak * (0.55 + 0.45 * math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def describe(step: Step, probe: Probe) -> str:
    """Return one line on the state of the training."""
    block, score = (sum(recall) / len(recall) for recall in (probe.block_recall, probe.score_recall))
    return (
        f"{'sparse ' if step.sparse else 'warm-up'} loss {step.msa_loss:.2f} dense {step.dense_loss:.2f} "
        f"KL {step.index_loss:.3f} recall {block:.2f}/{score:.2f}"
    )
