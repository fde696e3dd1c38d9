"""Save a run of convert-demo: all numbers as JSON, the table as text, and a picture if matplotlib is installed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmsa.demo.report import BLUE, GREEN, GREY, ORANGE, PURPLE, decorate, draw_phases, smooth, write_whole
from flexmsa.integrations.transformers.demo.train import WAYS, Demo, Score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("convert.json", "convert.md", "convert.png")
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
    text = json.dumps({**results, "losses": demo.losses, "index_branch": demo.entries}, indent=1)
    written = [folder / name for name in FILES[:2]]
    write_whole(written[0], lambda path: path.write_text(text + "\n"))
    write_whole(written[1], lambda path: path.write_text(draw_table(demo, results["unigram_loss"])))
    try:
        figure = draw_figure(demo, results["unigram_loss"])
    except ImportError:
        print("No picture, as matplotlib is not installed: pip install flexmsa[plot]")
        return written
    written.append(folder / FILES[2])
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


def draw_figure(demo: Demo, unigram_loss: float) -> Figure:
    """Draw the training losses, the index branch's KL and recalls, and the retrieval of each way to attend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 8), dpi=90, layout="constrained")
    panels = figure.subplots(2, 2)
    _draw_losses(panels[0, 0], demo, unigram_loss)
    _draw_answers(panels[0, 1], demo)
    _draw_divergence(panels[1, 0], demo)
    _draw_recalls(panels[1, 1], demo)
    return figure


def _draw_losses(axes: Axes, demo: Demo, unigram_loss: float) -> None:
    training = demo.losses.get("dense training", [])
    axes.plot(range(1, len(training) + 1), smooth(training, 10), color=GREY, label="dense training")
    axes.axhline(unigram_loss, color=GREY, linestyle=":", linewidth=1, label="unigram baseline")
    axes.set(xlabel="step", ylabel="nats per byte", ylim=(min(training, default=0.0) - 0.1, 1.7 * unigram_loss))
    axes.legend(frameon=False, fontsize="small", loc="center right", bbox_to_anchor=(1.0, 0.37))
    decorate(axes, "Loss in training, smoothed")
    _draw_excess(axes.inset_axes((0.3, 0.71, 0.68, 0.19)), demo)


def _draw_excess(axes: Axes, demo: Demo) -> None:
    """Draw the loss of each way to attend minus that of the dense model on the same batches."""
    dense = demo.losses.get("dense", [])
    for way in WAYS:
        excess = [loss - other for loss, other in zip(demo.losses.get(way, []), dense, strict=False)]
        if excess:
            axes.plot(range(1, len(excess) + 1), smooth(excess, 10), color=COLOURS[way], label=way)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize="small")
    axes.set_title("further training: loss minus dense loss, by step", fontsize="small", loc="left")
    if axes.lines:
        axes.legend(frameon=False, fontsize="small", ncols=4, loc="upper right", bbox_to_anchor=(1.03, -0.25))


def _draw_answers(axes: Axes, demo: Demo) -> None:
    for place, way in enumerate(WAYS):
        for shift, scores, alpha in ((-0.2, demo.swapped, 0.4), (0.2, demo.trained, 1.0)):
            if way in scores:
                share = scores[way].answers
                axes.bar(place + shift, share, width=0.38, color=COLOURS[way], alpha=alpha)
                axes.annotate(f"{share:.0%}", (place + shift, share), ha="center", va="bottom", fontsize="small")
    axes.set_xticks(range(len(WAYS)), WAYS)
    axes.set(ylim=(0, 1.1), ylabel="share of keys answered")
    decorate(axes, "Retrieval: before (pale) and after further training")


def _draw_divergence(axes: Axes, demo: Demo) -> None:
    steps = [entry["step"] for entry in demo.entries]
    for layer in range(demo.settings.num_layers):
        axes.plot(steps, [entry[f"kl/layer_{layer}"] for entry in demo.entries], label=f"layer {layer}", alpha=0.8)
    draw_phases(axes, demo.settings.warm_up_steps)
    axes.set(xlabel="step after the conversion", ylabel="nats per query", ylim=(0, None))
    if steps:
        axes.legend(frameon=False, fontsize="small")
    decorate(axes, "KL of each index branch; dashed: phase 2 begins")


def _draw_recalls(axes: Axes, demo: Demo) -> None:
    steps = [entry["step"] for entry in demo.entries]
    for suffix, colour, name in (
        ("", BLUE, "index branch"),
        ("_untrained", PURPLE, "untrained"),
        ("_window", GREEN, "window"),
    ):
        for kind, style in (("score", "-"), ("block", ":")):
            recalls = [entry[f"{kind}_recall{suffix}"] for entry in demo.entries]
            axes.plot(steps, recalls, color=colour, linestyle=style, label=f"{name}, {kind} recall")
    draw_phases(axes, demo.settings.warm_up_steps)
    axes.set(xlabel="step after the conversion", ylabel="share", ylim=(0, 1.02))
    if steps:
        axes.legend(frameon=False, fontsize="small", loc="lower right")
    decorate(axes, f"Recall of the best {demo.settings.topk} blocks")
