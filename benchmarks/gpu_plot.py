"""Plot layer time against sequence length, for MSA and dense attention.

Uses the rows of the part training of `benchmarks/gpu.py`. `python -m benchmarks.pictures` draws the committed results.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from flexmsa.plotting import BLUE, GREY, decorate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Tokens -> milliseconds.
Line = dict[int, float]
DENSE, SPARSE = "dense cuDNN", ("random", "neighbours share")
# Panel -> the steps whose times it adds up: ours (in addition to the selection), and those of dense attention.
PANELS = {
    "Training (selection, forward, backward, KL loss)": (
        ("main branch, forward", "main branch, backward", "KL value and gradient"),
        ("forward", "backward"),
    ),
    "Prefill (selection, forward)": (("main branch, forward",), ("forward",)),
}


def panel_lines(rows: Iterable[dict]) -> dict[str, dict[str, Line]]:
    """The lines of each panel, by name, at the lengths at which all steps were timed."""
    times = {row["name"]: row["ms"] for row in rows if row["name"].startswith("layer ")}
    lengths = sorted({int(name.split(":")[0].removeprefix("layer ")) for name in times})
    panels = {}
    for title, (ours, dense) in PANELS.items():
        steps = {DENSE: [f"{DENSE}, {step}" for step in dense]}
        steps |= {blocks: ["selection", *(f"{blocks}, {step}" for step in ours)] for blocks in SPARSE}
        needed = [step for names in steps.values() for step in names]
        complete = [n for n in lengths if all(f"layer {n}: {step}" in times for step in needed)]
        panels[title] = {
            line: {n: sum(times[f"layer {n}: {step}"] for step in names) for n in complete}
            for line, names in steps.items()
        }
    return panels


def crossover(ours: Line, dense: Line) -> tuple[float, float] | None:
    """(tokens, milliseconds) at which ours becomes faster, by log-log interpolation; None if it never does."""
    for low, high in pairwise(sorted(ours)):
        before, after = (math.log(ours[n] / dense[n]) for n in (low, high))
        if before > 0 >= after:
            share = before / (before - after)
            return low * (high / low) ** share, ours[low] * (ours[high] / ours[low]) ** share
    return None


def draw(rows: Iterable[dict], gpu: str, path: Path) -> None:
    """Draw both panels. Raises ImportError without matplotlib, ValueError with fewer than two lengths."""
    panels = panel_lines(rows)
    if any(len(lines[DENSE]) < 2 for lines in panels.values()):
        raise ValueError("needs the part training at two lengths or more")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (title, lines) in zip((left, right), panels.items(), strict=True):
        draw_panel(axes, title, lines)
    left.set_yscale("log")
    left.set_yticks([1, 10, 100, 1e3, 1e4], ["1 ms", "10 ms", "0.1 s", "1 s", "10 s"])
    left.set_ylabel("time of one layer")
    figure.suptitle(f"One attention layer on one {gpu}: 64 query and 4 KV heads of 128, bf16", fontsize=11)
    figure.savefig(path, dpi=130)


def draw_if_possible(rows: Iterable[dict], gpu: str, path: Path) -> None:
    try:
        draw(rows, gpu, path)
    except ImportError:
        print("no picture: pip install flexmsa[plot]")
    except ValueError as error:
        print(f"no picture: {error}")


def draw_panel(axes: "Axes", title: str, lines: dict[str, Line]) -> None:
    """Draw dense attention as a line, and ours as the band between both kinds of selection, which nearly coincide."""
    dense, (slow, fast) = lines[DENSE], (lines[name] for name in SPARSE)
    lengths, last = list(dense), max(dense)
    axes.plot(lengths, list(dense.values()), "o-", ms=4, lw=2, color=GREY, label=DENSE)
    axes.fill_between(lengths, list(fast.values()), list(slow.values()), color=BLUE, alpha=0.3, lw=0)
    for name, style in zip(SPARSE, ("o-", "s--"), strict=True):
        axes.plot(lengths, list(lines[name].values()), style, ms=4, lw=1.5, color=BLUE, label=f"flexmsa, {name}")
    point = crossover(slow, dense)
    if point:
        even = f"as fast as dense at {point[0] / 1024:.1f}K tokens"
        axes.plot(*point, "o", ms=10, mfc="none", mec=BLUE, mew=2, label=even)
    ratios = sorted(dense[last] / ours[last] for ours in (slow, fast))
    found = f"{ratios[0]:.0f} to {ratios[1]:.0f} times faster at {last // 1024}K tokens"
    decorate(axes, f"{title}:\n{found}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}K" for n in lengths])
    axes.set_xlabel("sequence length (tokens)")
    axes.legend(frameon=False, loc="upper left")
