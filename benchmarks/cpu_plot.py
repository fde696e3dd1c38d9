"""Plot the speedups that `benchmarks/cpu.py` measured. `python -m benchmarks.pictures` draws the committed results."""

from pathlib import Path

from flexmsa.plotting import BLUE, GREY, ORANGE, decorate


def draw(rows: list[dict], machine: dict, path: Path) -> None:
    """Draw the speedups as bars, each with its limit. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["ratio"] for row in rows], color=BLUE, height=0.6, label="measured")
    limits = [row["limit"] for row in rows]
    lower, upper = ([place + shift for place in places] for shift in (-0.38, 0.38))
    axes.vlines(limits, lower, upper, color=ORANGE, lw=3, label="limit set by the FLOPs")
    axes.axvline(1.0, color=GREY, lw=1.5, ls=":", label="dense attention")
    for place, row in zip(places, rows, strict=True):
        axes.text(row["ratio"], place, f" {row['ratio']:.1f}x", va="center", ha="left", fontsize=9)
    labels = [f"{row['variant']}\n{row['seqlen'] // 1024}K tokens, heads {row['heads']}" for row in rows]
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as dense scaled_dot_product_attention")
    decorate(axes, title(rows))
    axes.grid(visible=False, axis="y")
    axes.legend(loc="lower right", framealpha=1, edgecolor="none")
    figure.suptitle(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, float32", fontsize=10)
    figure.savefig(path, dpi=130)


def title(rows: list[dict]) -> str:
    """What the picture shows.

    >>> title([{"ratio": 2.6, "share": 0.66}, {"ratio": 1.8, "share": 0.5}])
    '1.8 to 2.6 times as fast as dense attention, 50% to 66% of what the FLOPs allow'
    """
    ratios, shares = ([row[name] for row in rows] for name in ("ratio", "share"))
    return (
        f"{min(ratios):.1f} to {max(ratios):.1f} times as fast as dense attention, "
        f"{min(shares):.0%} to {max(shares):.0%} of what the FLOPs allow"
    )
