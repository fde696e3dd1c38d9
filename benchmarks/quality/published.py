"""The tables of docs/quality.md, from the committed results of the study."""

import functools

from benchmarks.gpu_tables import RESULTS, load_result
from benchmarks.quality.earlier import direct_runs, machine_and_text, recipe_table
from benchmarks.quality.plan import plan_table, plan_text
from benchmarks.quality.report import (
    Study,
    identifiers_table,
    load,
    losses_table,
    positions_table,
    progress_table,
    recalls_table,
    retrieval_table,
)

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


QUALITY_TABLES = (
    *(quality_sizes, quality_plan, quality_direct, quality_recipe, quality_losses, quality_positions),
    *(quality_progress, quality_retrieval, quality_identifiers, quality_recalls),
)
