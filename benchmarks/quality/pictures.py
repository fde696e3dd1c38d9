"""Pictures of the arms' results: loss by position, retrieval, recalls by layer, loss against keys read."""

import itertools
import statistics
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.report import KINDS, SELECTIONS, Study, by_position, keys_read, mean_loss
from flexmsa.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, decorate

__all__ = ["FILES", "draw"]

COLOURS = {
    **{"dense": ORANGE, "msa": BLUE, "convert": BLUE, "window": GREEN, "random": PURPLE, "no-kl": GREY},
    **{"few": BLUE, "cold": BLUE},
}
# Lines of one colour differ in style.
STYLES = {"convert": "--", "few": ":", "cold": "-."}


def positions(study: Study) -> Figure:
    """How far each arm is above dense, by position, with two standard errors."""
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    edges = study.any_run["heldout"]["position_edges"]
    centres = [(first + last) / 2 for first, last in itertools.pairwise(edges)]
    for arm, seeds in study.runs.items():
        found = by_position(study, arm)
        known = [(x, y) for x, y in zip(centres, found, strict=True) if y is not None]
        if known:
            x, y = zip(*known, strict=True)
            bars = {"yerr": [2 * each.error for each in y], "capsize": 2, "label": next(iter(seeds.values()))["title"]}
            axes.errorbar(x, [each.mean for each in y], color=COLOURS[arm], linestyle=STYLES.get(arm, "-"), **bars)
    axes.axhline(0, color=ORANGE, linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(edges[1:], [f"{edge:,}" for edge in edges[1:]])
    axes.set(xlabel="position in the row, tokens", ylabel="nats per token above dense")
    if axes.containers:
        axes.legend(frameon=False, fontsize="small")
    decorate(axes, "Held-out loss above dense, by position")
    return figure


def retrieval(study: Study) -> Figure:
    """Shares of right answers, by depth and length: a column for each arm, a row for each kind."""
    arms = list(study.runs)
    figure = Figure(figsize=(2.2 * len(arms) + 1, 4.4), dpi=110, layout="constrained")
    panels = figure.subplots(len(KINDS), len(arms), squeeze=False)
    for row, kind in zip(panels, KINDS, strict=True):
        for axes, arm in zip(row, arms, strict=True):
            image = _heat_map(axes, study, arm, kind)
            axes.set_title(f"{arm}, {kind}", loc="left", fontsize="small", fontweight="bold")
    figure.colorbar(image, ax=panels, shrink=0.6, label="share of right answers")
    return figure


def _heat_map(axes: Axes, study: Study, arm: str, kind: str) -> object:
    found: dict[tuple[int, float], list[float]] = {}
    for run in study.runs[arm].values():
        for row in run["needles"]:
            if row["kind"] == kind:
                found.setdefault((row["length"], row["depth"]), []).append(row["right"])
    lengths, depths = (sorted(set(values)) for values in zip(*found, strict=True))
    shares = [[statistics.fmean(found[length, depth]) for length in lengths] for depth in depths]
    axes.set_xticks(range(len(lengths)), [f"{length / 1024:g}K" for length in lengths], fontsize="x-small")
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize="x-small")
    return axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", aspect="auto")


def recalls(study: Study) -> Figure:
    """Score recall of each layer at the end, and over the steps, of the arms whose index branches learn."""
    arms = [arm for arm in study.runs if arm not in ("dense", "window", "random")] or list(study.runs)
    figure = Figure(figsize=(3.4 * len(arms) + 0.5, 5.4), dpi=110, layout="constrained")
    panels = figure.subplots(2, len(arms), squeeze=False, sharey=True)
    colours = {"index": BLUE, "untrained": PURPLE, "window": GREEN, "random": GREY}
    for layers, steps, arm in zip(*panels, arms, strict=True):
        run = next(iter(study.runs[arm].values()))
        for name, colour in colours.items():
            values = [layer[1] for layer in run["recalls"][name]]
            layers.plot(range(len(values)), values, color=colour, label=SELECTIONS[name])
            measured = [entry for entry in run["log"] if "recalls" in entry]
            means = [statistics.fmean(layer[1] for layer in entry["recalls"][name]) for entry in measured]
            steps.plot([entry["step"] for entry in measured], means, color=colour)
        layers.set(ylim=(0, 1.02), xlabel="layer, at the end")
        steps.set(xlabel="step, mean over the layers")
        decorate(layers, run["title"])
        decorate(steps, "")
    panels[0][0].set_ylabel("score recall")
    panels[1][0].set_ylabel("score recall")
    panels[0][0].legend(frameon=False, fontsize="small")
    return figure


def budgets(study: Study) -> Figure:
    """Loss against the keys that the last query reads, a point for each seed."""
    figure = Figure(figsize=(6, 4), dpi=110, layout="constrained")
    axes = figure.subplots()
    for arm, seeds in study.runs.items():
        keys = [keys_read(run) for run in seeds.values()]
        losses = [mean_loss(run) for run in seeds.values()]
        axes.scatter(keys, losses, color=COLOURS[arm])
        axes.annotate(arm, (keys[0], losses[0]), xytext=(6, 0), textcoords="offset points", fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="keys that the last query reads", ylabel="held-out loss, nats per token")
    decorate(axes, "Loss against keys read")
    return figure


FILES = {"positions": positions, "retrieval": retrieval, "recalls": recalls, "budgets": budgets}


def draw(study: Study, folder: Path) -> None:
    """Draw quality-NAME.png for each picture."""
    for name, make in FILES.items():
        make(study).savefig(folder / f"quality-{name}.png")
