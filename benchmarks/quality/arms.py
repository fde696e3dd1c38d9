"""The arms: the same model, text and steps, and different ways to choose the keys that a query attends to."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.settings import Settings
from flexmsa import metrics
from flexmsa.config import MSAConfig
from flexmsa.modules import MSAttention
from flexmsa.recipes.model import GPT

__all__ = ["Arm", "ArmAttention", "Phase", "Step", "choose", "find_arm", "make_arms", "make_model"]

# Of the window arm: its oldest blocks, which every query sees.
SINKS = 1


@dataclass(frozen=True)
class Phase:
    """Steps of one kind.

    Attributes:
        way: dense; select, by the index branch; window, the newest blocks and a sink; random, and the own block.
        kl: train the index branches by the KL loss.
        index_only: the index branches alone are trained, in steps that come on top of the base model's.
        short: on shorter rows.
    """

    steps: int
    way: str
    kl: bool = False
    index_only: bool = False
    short: bool = False


@dataclass(frozen=True)
class Arm:
    """A name for files and the phases, whose steps of the base model are as many in every arm.

    The first phase, on short rows, is the same in all arms.
    """

    name: str
    title: str
    phases: tuple[Phase, ...]
    topk: int

    @property
    def steps(self) -> int:
        """All steps, those of the index branches alone included."""
        return sum(phase.steps for phase in self.phases)

    def step(self, number: int) -> "Step":
        """What the step of this number, from 0, does."""
        base, left = 0, number
        for phase in self.phases:
            if left < phase.steps:
                # The index branches alone see the newest batches again: every arm's base learns from the same ones.
                batch = base - phase.steps + left if phase.index_only else base + left
                return Step(phase, max(0, batch), left)
            left -= phase.steps
            base += 0 if phase.index_only else phase.steps
        raise IndexError(f"step: expected less than {self.steps}, got {number}")


@dataclass(frozen=True)
class Step:
    """A step's phase, the number of its batch, and its number in the phase."""

    phase: Phase
    batch: int
    in_phase: int


def make_arms(settings: Settings) -> dict[str, Arm]:
    """All arms, by name."""
    steps, warm_up, topk = settings.steps, settings.warm_up, settings.topk
    dense, warm = Phase(warm_up, "dense"), Phase(warm_up, "dense", kl=True)

    def rest(way: str, kl: bool = False) -> Phase:
        return Phase(steps - warm_up, way, kl)

    conversion = (
        Phase(settings.convert_at, "dense"),
        Phase(settings.index_steps, "dense", kl=True, index_only=True),
        Phase(steps - settings.convert_at, "select", kl=True),
    )
    arms = (
        Arm("dense", "dense", (Phase(steps, "dense"),), topk),
        Arm("msa", "MSA from scratch", (warm, rest("select", kl=True)), topk),
        Arm("convert", "MSA by conversion", conversion, topk),
        Arm("window", "window and a sink block", (dense, rest("window")), topk),
        Arm("random", "random blocks", (dense, rest("random")), topk),
        Arm("no-kl", "MSA without the KL", (dense, rest("select")), topk),
        Arm("few", f"MSA, {settings.few} blocks", (warm, rest("select", kl=True)), settings.few),
        Arm("cold", "MSA without the warm-up", (Phase(steps, "select", kl=True),), topk),
    )
    short = Phase(settings.short_steps, "dense", short=True)
    return {arm.name: replace(arm, phases=(short, *arm.phases)) for arm in arms}


def find_arm(settings: Settings, name: str) -> Arm:
    """The arm of this name.

    Raises:
        ValueError: there is none.
    """
    arms = make_arms(settings)
    if name not in arms:
        raise ValueError(f"arm: expected one of {', '.join(arms)}, got {name}")
    return arms[name]


class ArmAttention(MSAttention):
    """MSAttention whose queries attend to all keys, to blocks of the index branch, or to blocks of another rule."""

    def __init__(self, config: MSAConfig) -> None:
        super().__init__(config)
        self.way, self.kl = "dense", False

    def choose(self, way: str, kl: bool) -> None:
        """Attend in this way from now on; kl: in training, return the gradient of the KL loss."""
        self.way, self.kl = way, kl
        self.topk = None if way == "dense" else self.config.topk

    def given_blocks(self, x: Tensor) -> Tensor | None:
        """block_indices [B, Hkv, S, topk] of a rule; None where the layer attends to all or selects."""
        assert self.config.topk is not None
        heads = x[:, None].expand(-1, self.config.num_kv_heads, -1, -1)
        sizes: dict[str, Any] = {"block_size": self.config.block_size, "topk": self.config.topk}
        if self.way == "window":
            return metrics.window_blocks(heads, heads, num_init_blocks=SINKS, **sizes)
        return metrics.random_blocks(heads, heads, **sizes) if self.way == "random" else None

    def forward(self, x: Tensor, **sequences: Any) -> tuple[Tensor, Tensor]:
        """As the base class; the index loss is a 0 where it is not computed."""
        kl = self.kl and self.training
        out, loss = super().forward(x, block_indices=self.given_blocks(x), with_index_loss=kl, **sequences)
        return out, x.new_zeros(()) if loss is None else loss


def make_model(settings: Settings, arm: Arm, seed: int) -> GPT:
    """The model of an arm: for a seed, all arms begin with the same weights."""
    config = settings.attention(arm.topk)
    torch.manual_seed(seed)
    model = GPT(config, settings.num_layers, settings.mlp_size, settings.vocabulary)
    for block in model.blocks:
        weights = block.attention.state_dict()
        block.attention = ArmAttention(config)
        block.attention.load_state_dict(weights)
    return model


def choose(model: GPT, way: str, kl: bool = False) -> None:
    """Let all layers attend in this way."""
    for block in model.blocks:
        block.attention.choose(way, kl)
