"""What runs before the study found: the tables of docs/quality.md."""

import statistics
from typing import Any

from benchmarks.gpu_tables import load_result, markdown
from benchmarks.quality.report import mean_loss, recall

__all__ = ["direct_runs", "machine_and_text", "recipe_table", "speed_of_ways"]

# Nats per letter, with which it counts as learned.
LEARNED = 0.1


def direct_runs() -> str:
    """Arms that were trained on long rows from the beginning: machine, text and steps, then losses and speeds."""
    found = load_result("quality-direct.json")
    run = found["runs"]["dense"]
    steps = f"{run['settings']['steps']:,} steps, seed {run['seed']}."
    return f"{machine_and_text(run, found['text'])}\n{steps}\n\n{_losses(found['runs'])}"


def machine_and_text(run: dict[str, Any], text: dict[str, Any]) -> str:
    """The machine of a run and what its text is, of which `prepare` wrote text.json."""
    packages = text["packages"].values()
    files, size = (sum(package[place] for package in packages) for place in (0, 1))
    held_out = sum(package[3] for package in packages)
    lines = [
        "{device}, torch {torch}, Python {python}.".format(**run["machine"]),
        f"Its text: {files:,} files of {len(packages)} packages, {held_out} of them held out; {size / 1e6:.0f} million "
        f"bytes; {text['train_rows']:,} rows to train.",
    ]
    return "\n".join(lines)


def _losses(runs: dict[str, dict[str, Any]]) -> str:
    rows = []
    for name, run in runs.items():
        bins = [statistics.fmean(row["by_position"][place] for row in run["heldout"]["rows"]) for place in (0, -1)]
        near = [sum(row[key][0] for row in run["heldout"]["rows"]) for key in ("identifiers", "identifier_counts")]
        nats = statistics.fmean(run["associative_recall"]["nats"])
        speeds = ", ".join(f"{each:.0f} {way}" for way, each in speed_of_ways(run).items())
        numbers = mean_loss(run), *bins, near[0] / near[1], nats, recall(run, "index", 1), recall(run, "window", 1)
        rows.append([f"`{name}`", *(f"{number:.2f}" for number in numbers), speeds, f"{run['memory'] / 2**30:.0f} GiB"])
    edges = runs["dense"]["heldout"]["position_edges"]
    head = ["arm", "held-out loss", f"up to token {edges[1]:,}", f"from {edges[-2]:,} on"]
    head += ["identifiers last read up to 512 tokens ago", "MQAR, nats per letter", "score recall", "of a window"]
    return markdown([*head, "thousand tokens per second", "memory"], rows)


def speed_of_ways(run: dict[str, Any], after: int = 0) -> dict[str, float]:
    """Thousand tokens per second of each phase: the median over the entries of the log behind step `after`."""
    by_way: dict[str, list[float]] = {}
    for entry in (entry for entry in run["log"] if entry["step"] > after):
        by_way.setdefault(entry["way"], []).append(entry["tokens_per_second"] / 1e3)
    return {way: statistics.median(each) for way, each in by_way.items()}


def recipe_table() -> str:
    """When short rows teach the letters of an answer, by how much of a head RoPE rotates and its base."""
    rows = []
    for row in load_result("quality-recipe.json")["rows"]:
        long = [entry for entry in row["log"] if entry["context"] == 16384]
        cells = []
        for letter in (0, 1):
            known = [entry["step"] for entry in row["log"] if entry["letters"][letter] < LEARNED]
            cells.append(f"{known[0]:,}" if known else "none")
        last = row["log"][-1]
        after = [f"{value:.2f}" for value in long[1]["letters"]] if long else ["not run"] * 2
        sizes = f"{row['rotary_dim']}", f"{row['rope_theta']:,.0f}", f"{row['tokens'] // 1024}K"
        rows.append([*sizes, *cells, f"{last['step']:,}", *after])
    head = ["rotated numbers of a head", "RoPE's base", "tokens of a step", "first letter known at step"]
    head += ["second letter", "steps in all", "first letter, nats, 50 steps after the switch to 16K", "second letter"]
    return markdown(head, rows)
