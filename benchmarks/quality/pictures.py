"""Pictures of the arms' results: loss by position, retrieval, recalls by layer, loss against keys read."""

import itertools
import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.report import SELECTIONS, Study, by_position, keys_read, mean_loss
from flexmsa.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, decorate

__all__ = ["FILES", "draw"]

COLOURS = {
    **{"dense": ORANGE, "msa": BLUE, "convert": BLUE, "window": GREEN, "random": PURPLE, "no-kl": GREY},
    **{"few": "#56B4E9", "cold": "#08306B"},
}
# Nats per token.
CLOSE = 0.05
# Lines of one colour differ in style.
STYLES = {"convert": "--", "no-kl": "--"}


def positions(study: Study) -> Figure:
    """How far each arm is above dense, by position, with two standard errors: all arms, and those close to dense."""
    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    panels = figure.subplots(1, 2)
    edges = study.any_run["heldout"]["position_edges"]
    centres = [(first + last) / 2 for first, last in itertools.pairwise(edges)]
    for arm in study.runs:
        found = by_position(study, arm)
        known = [(x, y) for x, y in zip(centres, found, strict=True) if y is not None]
        if not known:
            continue
        x, y = zip(*known, strict=True)
        bars: dict[str, Any] = {"yerr": [2 * each.error for each in y], "capsize": 2, "label": study.title(arm)}
        close = max(abs(each.mean) for each in y) < CLOSE
        for axes in panels if close else panels[:1]:
            axes.errorbar(x, [each.mean for each in y], color=COLOURS[arm], linestyle=STYLES.get(arm, "-"), **bars)
    for axes, title in zip(panels, ("all arms", f"those within {CLOSE} of dense"), strict=True):
        axes.axhline(0, color=ORANGE, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(edges[1:], [f"{edge:,}" for edge in edges[1:]])
        axes.set(xlabel="position in the row, tokens", ylabel="nats per token above dense")
        if axes.containers:
            axes.legend(frameon=False, fontsize="small")
        decorate(axes, f"Held-out loss above dense: {title}")
    return figure


def retrieval(study: Study) -> Figure:
    """Nats per letter of multi-key answers, by depth and length: a column for each arm, a row for each seed."""
    arms = list(study.runs)
    seeds = sorted({seed for runs in study.runs.values() for seed in runs})
    figure = Figure(figsize=(1.9 * len(arms) + 1, 2.2 * len(seeds) + 0.3), dpi=110, layout="constrained")
    panels = figure.subplots(len(seeds), len(arms), squeeze=False, sharey=True)
    for row, seed in zip(panels, seeds, strict=True):
        for axes, arm in zip(row, arms, strict=True):
            if seed in study.runs[arm]:
                image = _heat_map(axes, study.runs[arm][seed])
                axes.set_title(f"{arm}, seed {seed}", loc="left", fontsize="small", fontweight="bold")
            else:
                axes.set_axis_off()
    figure.supxlabel("tokens of the text", fontsize="small")
    figure.supylabel("depth of the statement", fontsize="small")
    figure.colorbar(image, ax=panels, shrink=0.7, label="nats per letter; dark: known")
    return figure


def _heat_map(axes: Axes, run: dict[str, Any]) -> object:
    found = {(row["depth"], row["length"]): row["nats"] for row in run["needles"] if row["kind"] == "multi"}
    depths, lengths = (sorted(set(values)) for values in zip(*found, strict=True))
    nats = [[found[depth, length] for length in lengths] for depth in depths]
    axes.set_xticks(range(len(lengths)), [f"{length / 1024:g}K" for length in lengths], fontsize="x-small")
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize="x-small")
    return axes.imshow(nats, vmin=0, vmax=math.log(run["settings"]["letters"]), cmap="viridis", aspect="auto")


def recalls(study: Study) -> Figure:
    """Score recall of each layer at the end, and over the steps, of the arms whose index branches learn."""
    arms = [arm for arm in study.runs if arm not in ("dense", "window", "random")] or list(study.runs)
    figure = Figure(figsize=(3.4 * len(arms) + 0.5, 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(arms), squeeze=False, sharey=True)
    # The untrained branch is drawn last, dotted: it lies on the line of random blocks.
    colours = {"index": BLUE, "window": GREEN, "random": GREY, "untrained": ORANGE}
    for layers, steps, arm in zip(*panels, arms, strict=True):
        run = next(iter(study.runs[arm].values()))
        short = run["settings"]["short_steps"]
        for name, colour in colours.items():
            values = [layer[1] for layer in run["recalls"][name]]
            style = ":" if name == "untrained" else "-"
            layers.plot(range(len(values)), values, style, color=colour, label=SELECTIONS[name])
            measured = [entry for entry in run["log"] if "recalls" in entry and entry["step"] > short]
            means = [statistics.fmean(layer[1] for layer in entry["recalls"][name]) for entry in measured]
            steps.plot([entry["step"] - short for entry in measured], means, style, color=colour)
        layers.set(ylim=(0, 1.02), xlabel="layer, at the end")
        steps.set(xlabel="step on long rows, mean over the layers")
        decorate(layers, run["title"])
        decorate(steps, "")
    panels[0][0].set_ylabel("score recall")
    panels[1][0].set_ylabel("score recall")
    panels[0][0].legend(frameon=False, fontsize="small")
    return figure


def budgets(study: Study) -> Figure:
    """Loss against the keys that the last query reads, a point for each seed; arms whose points meet share a label."""
    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    labels: dict[tuple[int, int], list[str]] = {}
    for arm, seeds in study.runs.items():
        keys = [keys_read(run) for run in seeds.values()]
        losses = [mean_loss(run) for run in seeds.values()]
        axes.scatter(keys, losses, color=COLOURS[arm])
        labels.setdefault((keys[0], round(20 * losses[0])), []).append(arm)
    for (keys_of_label, _), arms in labels.items():
        height = statistics.fmean(mean_loss(run) for arm in arms for run in study.runs[arm].values())
        place: dict[str, Any] = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(", ".join(arms), (keys_of_label, height), fontsize="small", **place)
    axes.set_xscale("log", base=2)
    ticks = sorted({keys for keys, _ in labels})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.margins(x=0.2)
    axes.set(xlabel="keys that the last query reads", ylabel="held-out loss, nats per token")
    decorate(axes, "Loss against keys read")
    return figure


FILES = {"positions": positions, "retrieval": retrieval, "recalls": recalls, "budgets": budgets}


def draw(study: Study, folder: Path) -> None:
    """Draw quality-NAME.png for each picture."""
    for name, make in FILES.items():
        make(study).savefig(folder / f"quality-{name}.png")
