"""Tables of the arms' results. `write_report` writes them and, with matplotlib, the pictures of pictures.py."""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_tables import markdown
from benchmarks.quality.arms import make_arms
from benchmarks.quality.settings import FULL

__all__ = ["Difference", "Study", "load", "summary", "tables", "write_report"]

NONE = "-"
# Of a row of held-out text: a sum, and what it is a sum over.
Values = Callable[[dict[str, Any]], tuple[float, float]]


@dataclass(frozen=True)
class Difference:
    """A mean over held-out text, and its standard error, for which a package's rows are one observation."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.error:.4f}"


@dataclass(frozen=True)
class Study:
    """The finished runs: arm -> seed -> what the run wrote; arms in the order of the plan."""

    runs: dict[str, dict[int, dict[str, Any]]]

    @property
    def any_run(self) -> dict[str, Any]:
        """One of them, for what all have in common."""
        return next(iter(next(iter(self.runs.values())).values()))

    def values(self, arm: str, value: Callable[[dict[str, Any]], float]) -> list[float]:
        """A figure of each seed."""
        return [value(run) for _, run in sorted(self.runs[arm].items())]

    def title(self, arm: str) -> str:
        """What tables call an arm."""
        return str(next(iter(self.runs[arm].values()))["title"])

    def seeds_with_dense(self, arm: str) -> list[int]:
        """The seeds with which both the arm and dense were trained."""
        return sorted(self.runs[arm].keys() & self.runs.get("dense", {}).keys())

    def from_dense(self, arm: str, values: Values, seeds: list[int] | None = None) -> Difference | None:
        """How far an arm is above dense, on the same rows with the same seeds: all that both have, or those given.

        values: of a row, a sum and what it is a sum over; their totals' ratio is compared.
        """
        seeds = self.seeds_with_dense(arm) if seeds is None else seeds
        if not seeds or arm == "dense":
            return None
        sums: dict[str, list[float]] = {}
        for seed in seeds:
            ours, dense = (self.runs[name][seed]["heldout"]["rows"] for name in (arm, "dense"))
            for row, other in zip(ours, dense, strict=True):
                (total, count), (dense_total, _) = values(row), values(other)
                into = sums.setdefault(row["package"], [0.0, 0.0])
                into[0] += total - dense_total
                into[1] += count
        return clustered(sums.values())


def clustered(sums: Iterable[Iterable[float]]) -> Difference:
    """The ratio of two sums over clusters, with its standard error (linearised).

    >>> clustered([(1.0, 10), (3.0, 10)])
    Difference(mean=0.2, error=0.1)
    """
    pairs = [tuple(pair) for pair in sums]
    count = sum(number for _, number in pairs)
    if not count:
        return Difference(math.nan, math.nan)
    mean = sum(total for total, _ in pairs) / count
    if len(pairs) < 2:
        return Difference(mean, math.nan)
    squares = sum((total - mean * number) ** 2 for total, number in pairs)
    return Difference(mean, round(math.sqrt(squares * len(pairs) / (len(pairs) - 1)) / count, 12))


def load(folder: Path) -> Study:
    """Read the finished runs of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: they are not of one study: other settings, another text, or other batches.
    """
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*-[0-9]*.json"))]
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for run in (run for run in found if run["finished"]):
        runs.setdefault(run["arm"], {})[run["seed"]] = run
    if not runs:
        raise FileNotFoundError(f"{folder}: expected the result of a finished arm, as msa-0.json, got none")
    for name in ("key", "text"):
        if len({run[name] for seeds in runs.values() for run in seeds.values()}) > 1:
            raise ValueError(f"{folder}: expected runs of the same {name}, got several; keep each study in a folder")
    for seed in {seed for seeds in runs.values() for seed in seeds}:
        batches = {seeds[seed]["batches"] for seeds in runs.values() if seed in seeds}
        if len(batches) > 1:
            raise ValueError(f"{folder}: expected arms of seed {seed} to train on the same batches, got {batches}")
    return Study({name: runs[name] for name in make_arms(FULL) if name in runs})


def mean_loss(run: dict[str, Any]) -> float:
    """Over all held-out rows, nats per token."""
    return statistics.fmean(row["loss"] for row in run["heldout"]["rows"])


def far_mentions(run: dict[str, Any], row: dict[str, Any]) -> tuple[float, float]:
    """The summed loss of identifiers last read beyond the budget, and their number."""
    edges, settings = run["heldout"]["distance_edges"], run["settings"]
    first = edges.index(settings["block_size"] * settings["topk"])
    return sum(row["identifiers"][first:]), sum(row["identifier_counts"][first:])


def far_loss(run: dict[str, Any]) -> float:
    """Nats per identifier last read beyond the budget; NaN without any."""
    pairs = [far_mentions(run, row) for row in run["heldout"]["rows"]]
    count = sum(number for _, number in pairs)
    return sum(total for total, _ in pairs) / count if count else math.nan


def needle(run: dict[str, Any], kind: str, length: int, name: str) -> float:
    """Of the answers, nats per letter or the share of right ones, mean over the depths."""
    return statistics.fmean(row[name] for row in run["needles"] if (row["kind"], row["length"]) == (kind, length))


def recall(run: dict[str, Any], name: str, place: int) -> float:
    """Mean over the layers, at the end."""
    return statistics.fmean(layer[place] for layer in run["recalls"][name])


def keys_read(run: dict[str, Any]) -> int:
    """By the last query, as counted before the training; the way of the last phase."""
    ways = [name for name in run["checks"] if name.endswith("_keys") and name != "dense_keys"]
    return run["checks"][ways[0] if ways else "dense_keys"][-1]


def spread(values: list[float], digits: int = 3) -> str:
    """The mean over the seeds, and the range where there are several."""
    if any(map(math.isnan, values)):
        return NONE
    text = f"{statistics.fmean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def summary(run: dict[str, Any]) -> str:
    """A line about a finished run."""
    context = run["settings"]["context"]
    single, multi = (needle(run, kind, context, "right") for kind in KINDS)
    mqar, nats = (statistics.fmean(run["associative_recall"][name]) for name in ("right", "nats"))
    return (
        f"{run['arm']}-{run['seed']}: held-out loss {mean_loss(run):.4f}, far identifiers {far_loss(run):.3f}; right: "
        f"single {single:.2f}, multi {multi:.2f}, MQAR {mqar:.2f} ({nats:.2f} nats per letter); score "
        f"recall {recall(run, 'index', 1):.2f}"
    )


def losses_table(study: Study) -> str:
    """Losses of each arm, beside dense on the same rows."""
    compared: tuple[Values, ...] = (
        loss_of,
        lambda row: (row["by_position"][-1], 1.0),
        lambda row: far_mentions(study.any_run, row),
    )
    rows = []
    for arm, seeds in study.runs.items():
        cells = [study.title(arm), f"{len(seeds)}", f"{keys_read(next(iter(seeds.values()))):,}"]
        cells.append(spread(study.values(arm, mean_loss)))
        rows.append([*cells, *(_above_dense(study, arm, values) for values in compared)])
    head = ["arm", "seeds", "keys of the last query", "loss", "above dense", "above dense, second half of the row"]
    return markdown([*head, "above dense, far identifiers"], rows)


def loss_of(row: dict[str, Any]) -> tuple[float, float]:
    """The loss of a row, as Values."""
    return row["loss"], 1.0


def relative_to_dense(study: Study, arm: str, values: Values) -> float:
    """How far an arm is above dense, as a share of dense's, with the seeds that both have; NaN where there is none."""
    found = study.from_dense(arm, values)
    if found is None:
        return math.nan
    seeds = study.seeds_with_dense(arm)
    sums = [values(row) for seed in seeds for row in study.runs["dense"][seed]["heldout"]["rows"]]
    dense, count = (sum(numbers) for numbers in zip(*sums, strict=True))
    return found.mean * count / dense


def _above_dense(study: Study, arm: str, values: Values) -> str:
    """The difference with its standard error, in percent, and of each seed where there are several."""
    found, seeds = study.from_dense(arm, values), study.seeds_with_dense(arm)
    if found is None:
        return NONE
    text = NONE if math.isnan(found.mean) else f"{found} ({relative_to_dense(study, arm, values):+.1%})"
    each = [study.from_dense(arm, values, [seed]) for seed in seeds]
    return text if len(seeds) < 2 else f"{text}; by seed {', '.join(f'{one.mean:+.4f}' for one in each if one)}"


def retrieval_table(study: Study) -> str:
    """Nats per letter of the answers and the share of right ones, mean over the depths."""
    context, lengths = study.any_run["settings"]["context"], study.any_run["settings"]["needle_lengths"]
    columns = [("single", context), *(("multi", length) for length in lengths)]
    rows = []
    for arm, seeds in study.runs.items():
        for seed, run in sorted(seeds.items()):
            found = [[needle(run, kind, length, name) for name in ("nats", "right")] for kind, length in columns]
            found.append([statistics.fmean(run["associative_recall"][name]) for name in ("nats", "right")])
            rows.append([study.title(arm), f"{seed}", *(f"{nats:.2f}, {right:.0%}" for nats, right in found)])
    names = [f"{KINDS[kind]}, {length // 1024 or length}{'K' if length >= 1024 else ''}" for kind, length in columns]
    return markdown(["nats per letter, right answers", "seed", *names, "MQAR"], rows)


KINDS = {"single": "single needle", "multi": "multi-key"}


def by_position(study: Study, arm: str) -> list[Difference | None]:
    """How far an arm is above dense, for each bin of positions."""
    bins = _bins(study.any_run["heldout"]["position_edges"])
    return [study.from_dense(arm, lambda row, p=place: (row["by_position"][p], 1.0)) for place in bins]


def positions_table(study: Study) -> str:
    """How far each arm is above dense, by position."""
    edges = study.any_run["heldout"]["position_edges"]
    rows = []
    for arm in study.runs:
        found = by_position(study, arm)
        if any(found):
            rows.append([study.title(arm), *map(str, found)])
    return markdown(["above dense at positions", *(f"from {edges[place]:,}" for place in _bins(edges))], rows)


def identifiers_table(study: Study) -> str:
    """The loss of identifiers by how many tokens ago they were last read, with the seeds that all arms have."""
    edges = study.any_run["heldout"]["distance_edges"]
    seeds = sorted(set.intersection(*(set(runs) for runs in study.runs.values())))
    rows = []
    for arm, runs in study.runs.items():
        found = [row for seed in seeds for row in runs[seed]["heldout"]["rows"]]
        cells = []
        for place in range(len(edges)):
            total, count = (sum(row[name][place] for row in found) for name in ("identifiers", "identifier_counts"))
            cells.append(f"{total / count:.3f}" if count else NONE)
        rows.append([study.title(arm), *cells])
    head = f"nats per identifier, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}; last read"
    return markdown([head, *(f"{edge:,} tokens ago" for edge in edges)], rows)


def recalls_table(study: Study) -> str:
    """Score recall and block recall at the end, mean over the layers, beside those of other selections."""
    rows = []
    for seeds in study.runs.values():
        run = next(iter(seeds.values()))
        cells = [f"{recall(run, name, 1):.2f} / {recall(run, name, 0):.2f}" for name in SELECTIONS]
        rows.append([run["title"], *cells])
    return markdown(["score recall / block recall", *SELECTIONS.values()], rows)


SELECTIONS = {"index": "index branch", "untrained": "untrained", "window": "window", "random": "random"}


def speeds_table(folder: Path) -> str:
    """Training steps of one row: thousand tokens per second, and memory; empty without that file."""
    path = folder / "speed.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())["rows"]
    lengths = sorted({row["length"] for row in found})
    rows = []
    for kind in dict.fromkeys(row["kind"] for row in found):
        of_kind = {row["length"]: row for row in found if row["kind"] == kind}
        cells = []
        for row in (of_kind.get(length) for length in lengths):
            if row is None or row["seconds"] is None:
                cells.append(NONE)
                continue
            memory = "" if row["memory"] is None else f", {row['memory'] / 2**30:.1f} GiB"
            cells.append(f"{row['length'] / row['seconds'] / 1e3:.1f}{memory}")
        rows.append([kind, *cells])
    return markdown(["thousand tokens per second", *(f"{length:,}" for length in lengths)], rows)


def progress_table(study: Study) -> str:
    """How far the training loss of each arm is above dense, on the same batches, over the base model's long steps."""
    settings = study.any_run["settings"]
    parts, every = 5, settings["log_every"]
    size = settings["steps"] // parts
    rows = []
    for arm in study.runs:
        seeds = study.seeds_with_dense(arm)
        if arm == "dense" or not seeds:
            continue
        cells = []
        both = ([_losses(study.runs[name][seed]) for seed in seeds] for name in (arm, "dense"))
        ours, dense = ([statistics.fmean(entry) for entry in zip(*runs, strict=True)] for runs in both)
        for part in range(parts):
            first, last = ((settings["short_steps"] + place * size) // every for place in (part, part + 1))
            cells.append(f"{statistics.fmean(ours[first:last]) - statistics.fmean(dense[first:last]):+.4f}")
        rows.append([study.title(arm), *cells])
    steps = [f"{part * size + 1} to {part * size + size}" for part in range(parts)]
    return markdown(["above dense in training, long steps", *steps], rows)


def _losses(run: dict[str, Any]) -> list[float]:
    """The losses of the log in which the base model learns."""
    return [entry["loss"] for entry in run["log"] if not entry["index_only"]]


def _bins(edges: list[int]) -> range:
    return range(len(edges) - 1)


def tables(study: Study, folder: Path) -> str:
    """All tables, as Markdown."""
    makers = losses_table, positions_table, progress_table, retrieval_table, identifiers_table, recalls_table
    made = (make(study) for make in makers)
    return "\n\n".join(table for table in (*made, speeds_table(folder)) if table) + "\n"


def write_report(folder: Path) -> str:
    """Write report.md and the pictures into the folder of the results; returns the text."""
    study = load(folder)
    text = tables(study, folder)
    (folder / "report.md").write_text(text)
    try:
        from benchmarks.quality.pictures import draw
    except ImportError:
        return text + "\nNo pictures, as matplotlib is not installed: pip install flexmsa[plot]\n"
    draw(study, folder)
    return text
