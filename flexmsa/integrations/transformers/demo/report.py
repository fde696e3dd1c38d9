"""Save a run of convert-demo: all numbers as JSON, the table as text, and pictures if matplotlib is installed."""

from __future__ import annotations

import itertools
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmsa._command import write_whole
from flexmsa.demo.report import draw_phases, smooth
from flexmsa.integrations.transformers.demo.train import WAYS, Demo, Score
from flexmsa.plotting import BLUE, GREEN, GREY, ORANGE, PURPLE, decorate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("convert.json", "convert.md", "convert-ways.png", "convert-index.png")
# Lines differ in style too.
STYLES = {"dense": ":", "MSA": "-", "window": "--", "random": "-."}
COLOURS = {"dense": ORANGE, "MSA": BLUE, "window": GREEN, "random": PURPLE}
NAMES = {"dense": "dense", "MSA": "MSA", "window": "sliding window and a sink block", "random": "random blocks"}
COLUMNS = (
    "loss, nats per byte",
    "keys that the last byte attends to",
    "loss, not retrained",
    "retrieval, not retrained",
    "loss, retrained",
    "above dense",
    "retrieval, retrained",
)


def save(demo: Demo, results: dict[str, Any]) -> list[Path]:
    """Write the files into the run's folder; returns the paths."""
    folder = demo.settings.out
    results = {**results, "losses": demo.losses, "index_branch": demo.entries}
    text = json.dumps(results, indent=1)
    written = [folder / name for name in FILES[:2]]
    write_whole(written[0], lambda path: path.write_text(text + "\n"))
    write_whole(written[1], lambda path: path.write_text(draw_table(demo, results["unigram_loss"])))
    try:
        figures = draw_figures(results)
    except ImportError:
        print("No pictures, as matplotlib is not installed: pip install flexmsa[plot]")
        return written
    for name, figure in figures.items():
        written.append(folder / f"convert-{name}.png")
        write_whole(written[-1], partial(figure.savefig, format="png"))
    return written


def draw_table(demo: Demo, unigram_loss: float) -> str:
    """The table of docs/conversion.md as Markdown, with a dash for missing results."""
    settings = demo.settings
    sparse_keys = settings.block_size * settings.topk
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- " * len(COLUMNS) + "|"]
    for way in WAYS:
        keys = settings.context if way == "dense" else sparse_keys
        before, after = demo.swapped.get(way), demo.trained.get(way)
        cells = [NAMES[way], f"{keys}", *_cells(before), *_cells(after)]
        cells.insert(5, _above(after, demo.trained.get("dense")))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, f"| unigram baseline | 0 | {unigram_loss:.3f} | 0% | | | |"]) + "\n"


def _cells(score: Score | None) -> list[str]:
    return ["-", "-"] if score is None else [f"{score.loss:.3f}", f"{score.answers:.0%}"]


def _above(score: Score | None, dense: Score | None) -> str:
    if score is None or dense is None:
        return "-"
    return f"{score.loss / dense.loss - 1:+.1%}"


def draw_figures(results: dict[str, Any]) -> dict[str, Figure]:
    """Draw what convert.json holds: the ways to attend, and the index branches."""
    from matplotlib.figure import Figure

    ways, index = (Figure(figsize=(11, 3.9), dpi=110, layout="constrained") for _ in range(2))
    training, excess, answers = ways.subplots(1, 3)
    _draw_training(training, results)
    _draw_excess(excess, results)
    _draw_answers(answers, results)
    divergence, score, block = index.subplots(1, 3)
    _draw_divergence(divergence, results)
    _draw_recalls(score, results, "score")
    _draw_recalls(block, results, "block")
    return {"ways": ways, "index": index}


def _title(axes: Axes, what: str, found: str) -> None:
    decorate(axes, f"{what}{':' if found else ''}\n{found}")


def _draw_training(axes: Axes, results: dict[str, Any]) -> None:
    losses, unigram = results["losses"].get("dense training", []), results["unigram_loss"]
    axes.plot(range(1, len(losses) + 1), smooth(losses, 10), color=ORANGE, label="dense model")
    axes.axhline(unigram, color=GREY, linestyle=":", linewidth=1.5, label="unigram baseline")
    axes.set(xlabel="step", ylabel="nats per byte")
    axes.legend(frameon=False)
    last = f"ends at {smooth(losses, 10)[-1]:.2f} nats per byte" if losses else ""
    _title(axes, "Dense model before conversion", last)


def _draw_excess(axes: Axes, results: dict[str, Any]) -> None:
    """Draw the loss of each way to attend minus that of the dense model on the same batches."""
    losses, means = results["losses"], {}
    for way in WAYS:
        excess = [loss - other for loss, other in zip(losses.get(way, []), losses.get("dense", []), strict=False)]
        if excess:
            means[way] = sum(excess) / len(excess)
            line = smooth(excess, 10)
            axes.plot(range(1, len(line) + 1), line, STYLES[way], color=COLOURS[way], linewidth=2, label=way)
    axes.set(xlabel="step of further training", ylabel="nats per byte")
    if axes.lines:
        axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.55))
    found = f"MSA {means['MSA']:+.3f}, a window {means['window']:+.3f}" if {"MSA", "window"} <= means.keys() else ""
    _title(axes, "Loss above the dense model", found)


def _draw_answers(axes: Axes, results: dict[str, Any]) -> None:
    for place, way in enumerate(WAYS):
        for shift, scores, alpha in ((-0.2, results["not_retrained"], 0.4), (0.2, results["retrained"], 1.0)):
            if way in scores:
                share = scores[way]["answers"]
                axes.bar(place + shift, share, width=0.38, color=COLOURS[way], alpha=alpha)
                axes.annotate(f"{share:.0%}", (place + shift, share), ha="center", va="bottom", fontsize="small")
    axes.set_xticks(range(len(WAYS)), WAYS)
    axes.set(ylim=(0, 1.1), ylabel="share of keys answered", xlabel="pale: before further training")
    after = results["retrained"]
    found = ", ".join(f"{name} {after[name]['answers']:.0%}" for name in ("dense", "MSA", "window") if name in after)
    _title(axes, "Retrieval of a far key", found)


def _draw_divergence(axes: Axes, results: dict[str, Any]) -> None:
    entries, settings = results["index_branch"], results["settings"]
    steps = [entry["step"] for entry in entries]
    for layer, style in zip(range(settings["num_layers"]), itertools.cycle(("-", "--", "-.", ":"))):
        values = [entry[f"kl/layer_{layer}"] for entry in entries]
        axes.plot(steps, values, style, color=GREEN, linewidth=2, label=f"layer {layer}")
    _draw_steps(axes, settings, "nats per query")
    axes.set(ylim=(0, None))
    if steps:
        axes.legend(frameon=False)
    found = f"{entries[0]['kl']:.1f} at first, {entries[-1]['kl']:.1f} at the end, all layers" if steps else ""
    _title(axes, "KL of the index branches", found)


def _draw_recalls(axes: Axes, results: dict[str, Any], kind: str) -> None:
    entries, last = results["index_branch"], {}
    for suffix, name, colour, style in (
        ("", "index branch", BLUE, "-"),
        ("_window", "window", GREEN, "--"),
        ("_untrained", "untrained", PURPLE, "-."),
    ):
        recalls = [entry[f"{kind}_recall{suffix}"] for entry in entries]
        last[name] = recalls[-1] if recalls else None
        axes.plot([entry["step"] for entry in entries], recalls, style, color=colour, linewidth=2, label=name)
    _draw_steps(axes, results["settings"], "share")
    axes.set(ylim=(0, 1.02))
    if entries:
        axes.legend(frameon=False, loc="lower right")
    found = f"{last['index branch']:.2f} at the end, a window {last['window']:.2f}" if entries else ""
    _title(axes, f"{kind.capitalize()} recall, best {results['settings']['topk']} blocks", found)


def _draw_steps(axes: Axes, settings: dict[str, Any], unit: str) -> None:
    draw_phases(axes, settings["warm_up_steps"])
    axes.set(xlabel="step after the conversion (dashed: phase 2)", ylabel=unit)
