"""The tables of docs/quality.md, from the committed results of the study."""

import functools
import statistics

from benchmarks.gpu_tables import RESULTS, load_result
from benchmarks.quality.earlier import direct_runs, machine_and_text, recipe_table
from benchmarks.quality.plan import parameters, plan_table, plan_text
from benchmarks.quality.report import (
    Study,
    identifiers_table,
    load,
    losses_table,
    mean_loss,
    positions_table,
    progress_table,
    recalls_table,
    retrieval_table,
)
from benchmarks.quality.settings import FULL

__all__ = ["FOLDER", "QUALITY_TABLES", "study"]

FOLDER = RESULTS / "quality"


@functools.cache
def study() -> Study:
    """The finished arms."""
    return load(FOLDER)


def quality_sizes() -> str:
    return plan_text()


def quality_plan() -> str:
    return plan_table()


def quality_direct() -> str:
    return direct_runs()


def quality_recipe() -> str:
    return recipe_table()


def quality_losses() -> str:
    run = study().any_run
    rows = run["heldout"]["rows"]
    read = f"Losses are of {len(rows)} held-out rows, of {len({row['package'] for row in rows})} packages."
    return f"{machine_and_text(run, load_result('quality/text.json'))}\n{read}\n\n{losses_table(study())}"


def quality_positions() -> str:
    return positions_table(study())


def quality_progress() -> str:
    return progress_table(study())


def quality_retrieval() -> str:
    return retrieval_table(study())


def quality_identifiers() -> str:
    return identifiers_table(study())


def quality_recalls() -> str:
    return recalls_table(study())


def quality_summary() -> str:
    """The answer, for the README."""
    dense = statistics.fmean(study().values("dense", mean_loss))
    above = {}
    for arm in ("msa", "convert", "window"):
        found = study().from_dense(arm, lambda row: (row["loss"], 1.0))
        assert found is not None
        above[arm] = f"{found.mean / dense:+.1%}".replace("%", " %")
    seeds, context = len(study().runs["msa"]), study().any_run["settings"]["context"]
    return (
        f"Does a model learn as well with it? With {parameters(FULL).base / 1e6:.0f} million parameters, rows of "
        f"{context // 1024}K tokens and {seeds} seeds, the held-out loss\ndiffers from that of dense attention by "
        f"{above['msa']} with MSA from scratch, {above['convert']} by conversion, and {above['window']}\nwith a window "
        "of the same budget ([the study](docs/quality.md))."
    )


QUALITY_TABLES = (
    *(quality_sizes, quality_plan, quality_direct, quality_recipe, quality_losses, quality_positions),
    *(quality_progress, quality_retrieval, quality_identifiers, quality_recalls, quality_summary),
)
