"""The measurements of convert-demo: a dense model, its conversion, and further training with four ways to attend."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from flexmsa._progress import Progress
from flexmsa.demo.model import VOCABULARY, language_loss
from flexmsa.demo.text import Text, random_batch, spread_windows
from flexmsa.demo.train import learning_rate
from flexmsa.integrations.transformers import training
from flexmsa.integrations.transformers.convert import convert, set_warm_up
from flexmsa.integrations.transformers.demo.retrieval import answered, plant_early_keys, plant_keys
from flexmsa.integrations.transformers.health import random_blocks, window_blocks

MOST_STATEMENTS = 23


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on. The defaults take about ten minutes on two CPU cores."""

    dense_steps: int = 900
    warm_up_steps: int = 100
    sparse_steps: int = 150
    batch_size: int = 8
    context: int = 256
    seed: int = 0
    device: str = "cpu"
    out: Path = Path("out/convert-demo")
    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    block_size: int = 8
    topk: int = 8
    learning_rate: float = 3e-3
    retraining_rate: float = 1e-3
    index_loss_weight: float = 1.0
    measure_every: int = 10
    test_windows: int = 256

    def dense_model(self) -> Qwen3Config:
        """The configuration of the dense model."""
        return Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=self.hidden_size,
            intermediate_size=3 * self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.context,
            initializer_range=0.05,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )


class Score(NamedTuple):
    """A model's results on held-out text.

    Attributes:
        losses: [windows], nats per byte.
        answers: the share of keys that the model answers in the retrieval test.
    """

    losses: Tensor
    answers: float

    @property
    def loss(self) -> float:
        return self.losses.mean().item()


WAYS: dict[str, Callable[..., Tensor] | None] = {
    "dense": None,
    "MSA": None,
    "window": partial(window_blocks, num_init_blocks=1),
    "random": random_blocks,
}
"""Ways to attend, each with the selection that replaces the index branch's."""


class Demo:
    """The models, and the measurements so far.

    Attributes:
        dense, converted: the models after dense training and after phase 1, from which every way to attend continues.
        losses: phase or way -> the language loss at each step.
        entries: entries of the converted model's log at the measured steps, with "step" and "warm_up".
        swapped, trained: way -> its score before and after further training.
    """

    def __init__(self, settings: Settings, text: Text) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.text = settings, text
        dense: Any = Qwen3ForCausalLM(settings.dense_model())
        self.dense = dense.to(settings.device)
        self.converted: Any = None
        self.batches = torch.Generator().manual_seed(settings.seed)
        self.losses: dict[str, list[float]] = {}
        self.entries: list[dict[str, float]] = []
        self.swapped: dict[str, Score] = {}
        self.trained: dict[str, Score] = {}

    def train_dense(self, progress: Progress) -> None:
        """Train the model that is converted later."""
        settings = self.settings
        self._train("dense training", self.dense, settings.dense_steps, settings.learning_rate, progress)

    def warm_up(self, progress: Progress) -> None:
        """Convert a copy of the dense model, and train its index branches."""
        settings = self.settings
        self.converted = copy.deepcopy(self.dense)
        convert(self.converted, {"block_size": settings.block_size, "topk": settings.topk})
        self.converted.flexmsa.index_loss_weight = settings.index_loss_weight
        training.begin_warm_up(self.converted)
        self._train("phase 1", self.converted, settings.warm_up_steps, settings.learning_rate, progress)

    def try_ways(self) -> None:
        """Score each way to attend before it is trained."""
        for way in WAYS:
            self.swapped[way] = self.score(self._attending(way))

    def train_way(self, way: str, progress: Progress) -> None:
        """Run phase 2, or, without an index branch, as many steps with the language loss, on the same batches."""
        settings = self.settings
        model = self._attending(way)
        if way != "dense":
            training.begin_sparse(model)
        self.batches.manual_seed(settings.seed + 1)
        torch.manual_seed(settings.seed + 1)
        try:
            self._train(way, model, settings.sparse_steps, settings.retraining_rate, progress)
        finally:
            if self.losses[way]:
                self.trained[way] = self.score(model)

    def _attending(self, way: str) -> Any:
        """Return a new model that attends this way."""
        if way == "dense":
            return copy.deepcopy(self.dense)
        model = copy.deepcopy(self.converted)
        set_warm_up(model, False)
        model.flexmsa.select = WAYS[way]
        if way != "MSA":
            model.flexmsa.index_loss_weight = 0.0
        return model

    def _train(self, name: str, model: Any, steps: int, peak: float, progress: Progress) -> None:
        optimizer = torch.optim.AdamW(training.parameter_groups(model), lr=peak, betas=(0.9, 0.95), weight_decay=0.01)
        learns_index = name in ("phase 1", "MSA")
        if learns_index:
            training.check_optimizer(model, optimizer)
        losses = self.losses[name] = []
        model.train()
        try:
            for step in range(1, steps + 1):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, peak)
                if learns_index:
                    model.flexmsa.with_health = step == 1 or step % self.settings.measure_every == 0
                losses.append(self._step(model, optimizer))
                if learns_index and model.flexmsa.with_health:
                    place = {"step": self._steps_before(name) + step, "warm_up": name == "phase 1"}
                    self.entries.append(place | training.log_entries(model))
                progress.update(step, self._describe(name))
        finally:
            progress.close()
            if learns_index:
                model.flexmsa.with_health = False

    def _step(self, model: Any, optimizer: torch.optim.Optimizer) -> float:
        settings = self.settings
        ids = random_batch(self.text.train, settings.batch_size, settings.context, self.batches)
        ids = plant_keys(ids, MOST_STATEMENTS, self.batches).to(settings.device)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        training.clip_gradients(model, 1.0)
        optimizer.step()
        return (model.flexmsa.report.lm_loss if hasattr(model, "flexmsa") else loss).item()

    def _steps_before(self, name: str) -> int:
        return 0 if name == "phase 1" else self.settings.warm_up_steps

    def _describe(self, name: str) -> str:
        line = f"{name} loss {self.losses[name][-1]:.2f}"
        if name in ("phase 1", "MSA"):
            last = self.entries[-1]
            line += f" KL {last['kl']:.3f} score recall {last['score_recall']:.2f}"
            line += f" (untrained {last['score_recall_untrained']:.2f}, window {last['score_recall_window']:.2f})"
        return line

    @torch.no_grad()
    def score(self, model: Any) -> Score:
        """Measure the model on held-out text, with and without keys."""
        settings = self.settings
        model.eval()
        ids = spread_windows(self.text.validation, settings.test_windows, settings.context + 1)
        generator = torch.Generator().manual_seed(settings.seed)
        asked = plant_early_keys(ids, 2 * settings.block_size, generator)
        losses, answers = [], []
        for rows, keys in zip(ids.split(settings.batch_size), asked.split(settings.batch_size), strict=True):
            logits = model(rows[:, :-1].to(settings.device)).logits.cpu()
            loss = language_loss(logits, rows[:, 1:], reduction="none")
            losses.append(loss.view(len(rows), -1).mean(1).double())
            answers.append(answered(model(keys[:, :-1].to(settings.device)).logits.cpu(), keys))
        return Score(torch.cat(losses), torch.cat(answers).double().mean().item())


def unigram_loss(text: Text) -> float:
    """The loss on held-out text, in nats per byte, of predicting each byte by its frequency in the training text."""
    counts = torch.bincount(text.train.long(), minlength=VOCABULARY).double() + 1
    return -(counts / counts.sum()).log()[text.validation.long()].mean().item()
