"""Save a run: every number as JSON, and two pictures where matplotlib is installed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmsa._command import write_whole
from flexmsa.demo.train import Settings, Training
from flexmsa.plotting import BLUE, GREEN, GREY, ORANGE, decorate, plot_selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("metrics.json", "curves.png", "selection.png")


def save(training: Training, results: dict[str, Any]) -> list[Path]:
    """Write metrics.json and the pictures into the run's folder; returns the paths.

    Args:
        results: results from after the training, for metrics.json in addition to the history.
    """
    settings = training.settings
    history = {
        "steps": [step._asdict() for step in training.steps],
        "probes": [probe._asdict() for probe in training.probes],
    }
    text = json.dumps({**results, **history}, indent=1)
    written = [settings.out / FILES[0]]
    write_whole(written[0], lambda path: path.write_text(text + "\n"))
    if not training.steps:
        return written
    try:
        pictures = dict(zip(FILES[1:], (draw_curves(training), draw_selection(training)), strict=True))
    except ImportError:
        print("No pictures, as matplotlib is not installed: pip install flexmsa[plot]")
        return written
    for name, figure in pictures.items():
        written.append(settings.out / name)
        write_whole(written[-1], partial(figure.savefig, format="png"))
    return written


def draw_curves(training: Training) -> Figure:
    """Draw four panels over the steps: both losses, their difference, the index branch's loss and its recalls."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 10), dpi=80, layout="constrained")
    panels = figure.subplots(4, 1, sharex=True, height_ratios=[5, 3, 3, 4])
    losses, gap, divergence, recalls = panels
    steps = [record.step for record in training.steps]
    msa, dense, index = zip(*(record[2:] for record in training.steps), strict=True)
    _draw_smoothed(losses, steps, dense, ORANGE, "dense attention")
    _draw_smoothed(losses, steps, msa, BLUE, "MSA")
    losses.set(ylabel="nats per byte")
    _draw_smoothed(gap, steps, [ours - theirs for ours, theirs in zip(msa, dense, strict=True)], BLUE)
    gap.axhline(0, color=ORANGE, linewidth=1.2)
    gap.set(ylabel="nats per byte")
    _draw_smoothed(divergence, steps, index, GREEN)
    divergence.set(ylabel="nats per query", ylim=(0, None))
    _draw_recalls(recalls, training)
    last = [smooth(values, len(values) // 60)[-1] for values in (msa, dense, index)]
    for axes, title, found in (
        (losses, "Training loss (each batch pale, smoothed bold)", f"MSA {last[0]:.2f}, dense {last[1]:.2f}"),
        (gap, "How far MSA is above dense on the same batch", f"{last[0] - last[1]:+.3f}"),
        (divergence, "Index branch: KL from the main branch's attention, mean over the layers", f"{last[2]:.2f}"),
        (recalls, f"Share of the best {training.settings.topk} blocks that the index branch finds (layers pale)", ""),
    ):
        decorate(axes, f"{title}{found and ': at the end '}{found}")
        draw_phases(axes, training.settings.warmup)
    recalls.set(xlabel="step", xlim=(0, steps[-1] + 1))
    _name_phases(losses, training.settings)
    losses.legend(frameon=False)
    recalls.legend(frameon=False, loc="lower right")
    return figure


def draw_phases(axes: Axes, warm_up_steps: int) -> None:
    """Draw the line between the warm-up and the sparse steps."""
    axes.axvline(warm_up_steps + 0.5, color=GREY, linestyle="--", linewidth=1)


def smooth(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and its neighbours up to `reach` places away."""
    near = [values[max(0, i - reach) : i + reach + 1] for i in range(len(values))]
    return [sum(x) / len(x) for x in near]


def _draw_smoothed(axes: Axes, steps: list[int], values: Sequence[float], colour: str, label: str = "") -> None:
    axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(steps, smooth(values, len(values) // 60), color=colour, linewidth=1.8, label=label)


def _draw_recalls(axes: Axes, training: Training) -> None:
    steps = [probe.step for probe in training.probes]
    for name, colour, label in (
        ("score_recall", BLUE, "by attention mass (score recall)"),
        ("block_recall", ORANGE, "by number (block recall)"),
    ):
        recalls = [getattr(probe, name) for probe in training.probes]
        for layer in zip(*recalls, strict=True):
            axes.plot(steps, layer, color=colour, alpha=0.3, linewidth=1)
        mean = [sum(layers) / len(layers) for layers in recalls]
        axes.plot(steps, mean, color=colour, linewidth=1.8, marker="o", markersize=3, label=f"{label}: {mean[-1]:.2f}")
    axes.set(ylabel="share", ylim=(0, 1.02))


def _name_phases(axes: Axes, settings: Settings) -> None:
    for text, side, shift in (("dense warm-up", "right", -5), ("sparse", "left", 5)):
        axes.annotate(
            text,
            (settings.warmup + 0.5, 0.95),
            xycoords=("data", "axes fraction"),
            xytext=(shift, 0),
            textcoords="offset points",
            ha=side,
            color=GREY,
            annotation_clip=True,
        )


def draw_selection(training: Training) -> Figure:
    """Draw the selection of each group of each layer on the first held-out window."""
    from matplotlib.figure import Figure

    settings, selections = training.settings, training.selections()
    figure = Figure(figsize=(1.6 + 3.4 * settings.num_kv_heads, 3.3 * len(selections)), dpi=90, layout="constrained")
    parts = figure.subfigures(len(selections), 1, squeeze=False)[:, 0]
    for layer, (part, selection) in enumerate(zip(parts, selections, strict=True)):
        found = selection.recall.score.item()
        title = f"Layer {layer}: {settings.topk} blocks per token, {found:.0%} of the best blocks' attention mass"
        plot_selection(selection.block_indices, block_size=settings.block_size, title=title, figure=part)
    return figure
