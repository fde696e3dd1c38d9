"""Plot a training step on one GPU and on several, from the results of `benchmarks/distributed.py`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmsa.plotting import BLUE, GREY, ORANGE, decorate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 0.27


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw a panel for each kind of heads. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    rows = found["attention"]
    kinds = list(dict.fromkeys(row["heads"] for row in rows))
    figure = Figure(figsize=(5.5 * len(kinds), 4.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        draw_panel(axes, kind, [row for row in rows if row["heads"] == kind])
    panels[0].set_yscale("log")
    panels[0].set_ylim(top=6 * max(row["one_ms"] or row["step_ms"] for row in rows))
    panels[0].set_yticks([10, 100, 1e3, 1e4], ["10 ms", "0.1 s", "1 s", "10 s"])
    panels[0].set_ylabel("training step of one layer's attention")
    figure.suptitle(f"Context parallel on {found['machine']}, bf16", fontsize=11)
    figure.savefig(path, dpi=130)


def draw_panel(axes: "Axes", kind: str, rows: list[dict[str, Any]]) -> None:
    """Bars of dense attention on all GPUs, where it was timed, and of ours on one and on all."""
    number = rows[0]["processes"]
    ways = (
        (f"dense cuDNN, {number} GPUs", "dense_ms", GREY),
        ("flexmsa, 1 GPU", "one_ms", ORANGE),
        (f"flexmsa, {number} GPUs", "step_ms", BLUE),
    )
    for place, (label, name, color) in enumerate(ways):
        timed = [(at, row) for at, row in enumerate(rows) if row[name] is not None]
        bars = axes.bar([at + (place - 1) * WIDTH for at, _ in timed], [row[name] for _, row in timed], WIDTH)
        for bar in bars:
            bar.set_color(color)
        bars.set_label(label)
        if name == "step_ms":
            shares = (row["efficiency"] for _, row in timed)
            axes.bar_label(bars, [f"{share:.0%}" if share else "" for share in shares], fontsize=9)
    heads, groups, size = kind.split("/")
    decorate(axes, f"{heads} query and {groups} KV heads of {size}\n(above the bars: of linear scaling)")
    axes.set_xticks(range(len(rows)), [f"{row['tokens'] // 1024}K" for row in rows])
    axes.set_xlabel("sequence length (tokens)")
    axes.legend(frameon=False, loc="upper left")
