"""The tables of docs/quality.md, from the committed results of the study."""

import functools
from collections.abc import Callable

from benchmarks.gpu_tables import RESULTS, load_result, markdown
from benchmarks.quality.earlier import direct_runs, machine_and_text, recipe_table, speed_of_ways
from benchmarks.quality.plan import parameters, plan_table, plan_text
from benchmarks.quality.report import (
    Study,
    identifiers_table,
    load,
    loss_of,
    losses_table,
    positions_table,
    progress_table,
    recalls_table,
    relative_to_dense,
    retrieval_table,
    speeds_table,
)
from benchmarks.quality.settings import FULL

__all__ = ["FOLDER", "QUALITY_TABLES", "study"]

FOLDER = RESULTS / "quality"


@functools.cache
def study() -> Study:
    """The finished arms."""
    return load(FOLDER)


def losses() -> str:
    """The machine and the text, and the losses."""
    run = study().any_run
    rows = run["heldout"]["rows"]
    read = f"Losses are of {len(rows)} held-out rows, of {len({row['package'] for row in rows})} packages."
    return f"{machine_and_text(run, load_result('quality/text.json'))}\n{read}\n\n{losses_table(study())}"


def summary() -> str:
    """The answer, for the README."""
    shares = {arm: relative_to_dense(study(), arm, loss_of) for arm in ("msa", "convert", "window")}
    above = {arm: f"{100 * share:+.1f} %" for arm, share in shares.items()}
    fewest, *_, most = sorted(len(study().runs[arm]) for arm in ("dense", *shares))
    seeds = f"{fewest}" if fewest == most else f"{fewest} or {most}"
    context = study().any_run["settings"]["context"]
    return (
        f"Does a model learn as well with it? With {parameters(FULL).base / 1e6:.0f} million parameters, rows of "
        f"{context // 1024}K tokens and {seeds} seeds, the held-out loss\ndiffers from that of dense attention by "
        f"{above['msa']} with MSA from scratch, {above['convert']} by conversion, and {above['window']}\nwith a window "
        "of the same budget ([the study](docs/quality.md))."
    )


def training_speeds() -> str:
    """Thousand tokens per second of each arm's last phase, by seed, and the most memory of its training."""
    rows = []
    for seeds in study().runs.values():
        runs = [run for _, run in sorted(seeds.items())]
        speeds = (speed_of_ways(run, run["settings"]["short_steps"])[run["log"][-1]["way"]] for run in runs)
        most = max(run["memory"] for run in runs)
        rows.append([runs[0]["title"], ", ".join(f"{speed:.0f}" for speed in speeds), f"{most / 2**30:.1f} GiB"])
    return markdown(["arm", "thousand tokens per second, by seed", "memory"], rows)


def of_study(make: Callable[[Study], str]) -> Callable[[], str]:
    """Make a table of the finished arms, which are read when it is made."""
    return lambda: make(study())


# Name on the pages -> what makes the table.
QUALITY_TABLES: dict[str, Callable[[], str]] = {
    "quality sizes": plan_text,
    "quality plan": plan_table,
    "quality direct": direct_runs,
    "quality recipe": recipe_table,
    "quality losses": losses,
    "quality positions": of_study(positions_table),
    "quality progress": of_study(progress_table),
    "quality retrieval": of_study(retrieval_table),
    "quality identifiers": of_study(identifiers_table),
    "quality recalls": of_study(recalls_table),
    "quality training_speeds": training_speeds,
    "quality speeds": lambda: speeds_table(FOLDER),
    "quality summary": summary,
}
