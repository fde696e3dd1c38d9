"""The plan: parameters, FLOPs and time of each arm, computed from the settings before anything runs."""

import math
from dataclasses import dataclass

from benchmarks.gpu_tables import markdown
from benchmarks.quality.arms import Arm, Phase, make_arms
from benchmarks.quality.checks import expected_keys
from benchmarks.quality.settings import FULL, Settings

__all__ = ["arm_flops", "parameters", "plan_table", "plan_text"]

# An H200's dense bf16 rate in FLOP/s, and the share of it that a compiled model of this size is assumed to reach.
PEAK, SHARE = 989e12, 0.4
# A backward of the main branch computes five products, its forward two.
ATTENTION_PASSES = 3.5


@dataclass(frozen=True)
class Parameters:
    """Weights of the base model, those of them that every token is multiplied by, and those of the index branches."""

    base: int
    multiplied: int
    index: int


def parameters(settings: Settings) -> Parameters:
    """Counted from the shapes; a test compares them with a model's."""
    s, width = settings, settings.hidden_size
    heads = 2 * (s.num_heads + s.num_kv_heads) * s.head_dim * width
    layer = heads + 3 * s.mlp_size * width
    multiplied = s.num_layers * layer + s.vocabulary * width
    norms = s.num_layers * 2 * (width + s.head_dim) + width
    index = s.num_layers * ((s.num_kv_heads + 1) * s.index_head_dim * width + 2 * s.index_head_dim)
    return Parameters(multiplied + s.vocabulary * width + norms, multiplied, index)


def mean_keys(settings: Settings, arm: Arm, way: str, context: int) -> float:
    """Keys that a query reads, on average over a row of so many tokens."""
    return sum(expected_keys(query, way, settings, arm) for query in range(context)) / context


def phase_flops(settings: Settings, arm: Arm, phase: Phase) -> tuple[float, float]:
    """FLOPs per token of training: outside of attention, and of attention with selection and index loss."""
    s, found = settings, parameters(settings)
    context, _ = s.row_sizes(phase.short)
    keys, visible = mean_keys(s, arm, phase.way, context), (context + 1) / 2
    passes = 1 if phase.index_only else 3
    outside = 2.0 * passes * found.multiplied
    # Two products of forward, and those of the backward unless the base is frozen.
    attention = 4 * s.num_heads * s.head_dim * keys * (1 if phase.index_only else ATTENTION_PASSES)
    if phase.kl:
        # The index projections' input is detached: no gradient of it. Three products of the student; where all keys are
        # read, the teacher's scores once more.
        outside += 4.0 * found.index
        attention += 3 * 2 * s.num_kv_heads * s.index_head_dim * keys
        attention += 2 * s.num_heads * s.head_dim * keys if phase.way == "dense" else 0
    if phase.way == "select":
        outside += 0 if phase.kl else 2.0 * found.index
        attention += 2 * s.num_kv_heads * s.index_head_dim * visible
    return outside, s.num_layers * attention


def arm_flops(settings: Settings, arm: Arm) -> tuple[float, float]:
    """FLOPs of an arm's training: outside of attention, and of attention."""
    totals = [0.0, 0.0]
    for phase in arm.phases:
        tokens = math.prod(settings.row_sizes(phase.short))
        for place, flops in enumerate(phase_flops(settings, arm, phase)):
            totals[place] += phase.steps * tokens * flops
    return totals[0], totals[1]


def plan_table(settings: Settings = FULL) -> str:
    """A row for each arm."""
    rows = []
    for arm in make_arms(settings).values():
        outside, attention = arm_flops(settings, arm)
        last = arm.phases[-1].way
        steps = " + ".join(f"{p.steps} {'index only' if p.index_only else p.way}" for p in arm.phases if not p.short)
        seconds = (outside + attention) / (PEAK * SHARE)
        numbers = (
            f"{mean_keys(settings, arm, last, settings.context):,.0f}",
            f"{outside / 1e15:.1f}",
            f"{attention / 1e15:.1f}",
        )
        rows.append([f"`{arm.name}`", arm.title, steps, *numbers, f"{seconds:.0f}"])
    head = ["arm", "what", "steps", "keys per query", "PFLOP outside of attention", "PFLOP of attention", "seconds"]
    return markdown(head, rows)


def plan_text(settings: Settings = FULL) -> str:
    """The sizes that all arms share, in a few sentences."""
    s, found = settings, parameters(settings)
    short, long = math.prod(s.row_sizes(True)), math.prod(s.row_sizes(False))
    return (
        f"The model has {found.base / 1e6:.1f} million parameters, and {found.index / 1e6:.1f} million more in its "
        f"index branches.\nAll arms share {s.short_steps:,} dense steps on {s.short_rows} rows of {s.short_context:,} "
        f"tokens each, {short * s.short_steps / 1e6:.1f} million tokens in all.\nThen each has {s.steps:,} steps of "
        f"its own on {s.batch_rows} rows of {s.context:,} tokens, {long * s.steps / 1e6:.1f} million.\n"
        f"There a query attends to {s.topk} of the {s.context // s.block_size} blocks of its row."
    )
