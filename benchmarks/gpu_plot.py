"""Plot layer time (ms) against sequence length, for MSA and dense attention: `python -m benchmarks.gpu_plot`.

Uses the rows of the part training of `benchmarks/gpu.py`. Writes docs/images/gpu.png from the committed results.
"""

import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Tokens -> milliseconds.
Line = dict[int, float]
DENSE, SPARSE = "dense cuDNN", ("random", "neighbours share")
# Panel -> the steps whose times it adds up: ours (in addition to the selection), and those of dense attention.
PANELS = {
    "Training: selection, forward, backward, KL loss": (
        ("main branch, forward", "main branch, backward", "KL value and gradient"),
        ("forward", "backward"),
    ),
    "Prefill: selection, forward": (("main branch, forward",), ("forward",)),
}
COLOURS = {DENSE: "0.35", "random": "#0072b2", "neighbours share": "#009e73"}
# Labels are above (1) or below (-1) the line.
SIDES = {DENSE: 0, "random": 1, "neighbours share": -1}


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

    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (title, lines) in zip((left, right), panels.items(), strict=True):
        draw_panel(axes, lines)
        axes.set_title(title, fontsize=11, loc="left")
    left.set_yscale("log")
    left.set_ylim(bottom=0.25)
    left.set_yticks([1, 10, 100, 1e3, 1e4], ["1 ms", "10 ms", "0.1 s", "1 s", "10 s"])
    figure.suptitle(f"An attention layer on one {gpu}: 64 query and 4 KV heads of 128, bf16", fontsize=12)
    figure.savefig(path, dpi=130)


def draw_if_possible(rows: Iterable[dict], gpu: str, path: Path) -> None:
    try:
        draw(rows, gpu, path)
    except ImportError:
        print("no picture: pip install flexmsa[plot]")
    except ValueError as error:
        print(f"no picture: {error}")


def draw_panel(axes: "Axes", lines: dict[str, Line]) -> None:
    dense, last = lines[DENSE], max(lines[DENSE])
    for name, line in lines.items():
        colour, side = COLOURS[name], SIDES[name]
        axes.plot(list(line), list(line.values()), "o-", ms=4, lw=2, color=colour)
        label = name if name == DENSE else f"flexmsa, {name}:\n{dense[last] / line[last]:.0f} times faster"
        write(axes, label, (last, line[last]), (10, 8 * side), colour, va=("top", "center", "bottom")[side + 1])
        point = crossover(line, dense)
        if point:
            axes.plot(*point, "o", ms=9, mfc="white", mec=colour, mew=2, zorder=3)
            label = f"even at\n{point[0] / 1024:.1f}K"
            write(axes, label, point, (-14 * side, 32 * side), colour, va="center", ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(dense), [f"{n // 1024}K" for n in dense])
    # Room for labels at the left end.
    axes.set_xlim(left=min(dense) / 3)
    axes.set_xlabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def write(axes: "Axes", text: str, point: tuple[float, float], offset: tuple[int, int], colour: str, **where) -> None:
    axes.annotate(text, point, offset, textcoords="offset points", color=colour, fontsize=10.5, **where)


def main() -> None:
    from benchmarks.gpu_tables import ROOT, gpu_rows, load_result

    gpu = load_result("gpu-h200.json")["parts"]["training"]["gpu"]
    draw(gpu_rows().values(), gpu, ROOT / "docs" / "images" / "gpu.png")


if __name__ == "__main__":
    main()
