"""Changes that tuning made to the configurations of the Triton kernels, in this process.

The config.py of each folder of kernels chooses a configuration by problem and target. For a task, an architecture and
the fields of the problem that the task uses, some fields of its configuration may be changed, for every sequence
length: launches ask `tuned_config`, and `tune` finds changes that make a task faster.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from .problem import Problem

# How much faster a candidate must be: less than this, and noise would choose.
MARGIN = 0.03

Changes = dict[str, int | None]
Report = Callable[[str], object]


class Key(NamedTuple):
    """Where a change applies: task is "selection", "forward", "backward" or "loss"; shape: sorted names and values.

    The shape has the fields of the problem that the task uses, and the rows of the configuration before the change: a
    selection of few queries takes fewer rows, and changes that were found for many queries do not suit it.
    """

    task: str
    arch: int | str
    shape: tuple[tuple[str, Any], ...]


class Found(NamedTuple):
    """The changes that `tune` found, and the median milliseconds without and with them."""

    changes: Changes
    shipped_ms: float
    best_ms: float


_changes: dict[Key, Changes] = {}
_certified = [True]


def clear_tuning() -> None:
    """Go back to the shipped configurations: forget what `autotune` and `load_tuning` registered in this process.

    >>> clear_tuning()
    """
    _changes.clear()


def set_certified_selection(enabled: bool) -> None:
    """Say whether selections of long sequences may find their ids from int8 scores first (default: they may).

    The ids are the same, bit for bit. Where most index keys repeat, as without RoPE in the index branch, many rows have
    to be scored again, and a selection takes up to twice as long as without. docs/notes/selection-8-bits.md says
    when int8 scores are used. Holds for the whole process.

    Raises:
        TypeError: `enabled` is not a bool.

    >>> set_certified_selection(False)
    >>> set_certified_selection(True)
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled: expected True or False, got {type(enabled).__name__}")
    _certified[0] = enabled


def certified_selection() -> bool:
    """What `set_certified_selection` said last."""
    return _certified[0]


def register(key: Key, changes: Changes) -> None:
    """From now on, launch the task of `key` with these fields changed; with none, as shipped."""
    _changes[key] = changes


def key_of(task: str, problem: Problem, target: Any, config: Any, depends_on: tuple[str, ...]) -> Key:
    """The Key of a configuration that was chosen for a problem and a target; depends_on: fields of the problem."""
    shape = {name: getattr(problem, name) for name in depends_on} | {"rows": config.rows}
    # A file has dtypes by name.
    names = {name: str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else x for name, x in shape.items()}
    return Key(task, target.arch, tuple(sorted(names.items())))


def tuned_config(task: str, problem: Problem, target: Any, config: Any, depends_on: tuple[str, ...]) -> Any:
    """The configuration that was chosen for a problem and a target, with the changes that tuning made."""
    if not _changes:
        return config
    return replace(config, **_changes.get(key_of(task, problem, target, config, depends_on), {}))


def tune(
    shipped: Any,
    candidates: Iterable[Changes],
    run: Callable[[Any], tuple[torch.Tensor, ...]],
    time: Callable[[Callable[[], object]], float],
    report: Report = lambda line: None,
) -> Found:
    """Find the candidates that make `run(config)` faster; each is tried on top of those found before it.

    A candidate is left out if it does not compile or launch, or if its results are not those of `shipped`.

    Args:
        shipped: the configuration to begin with.
        candidates: fields to change, and their values.
        run: runs the task with a configuration and returns its results.
        time: milliseconds of a call.
        report: takes a line per candidate.
    """
    expected = run(shipped)
    best, best_ms = shipped, time(partial(run, shipped))
    report(f"as shipped: {best_ms:.3f} ms")
    for changes in candidates:
        config = replace(best, **changes)
        if config == best:
            continue
        try:
            if not all(map(agree, run(config), expected)):
                report(f"{describe(changes)}: other results")
                continue
            ms = time(partial(run, config))
        except Exception as error:  # Triton, ptxas and the driver each have errors of their own.
            report(f"{describe(changes)}: cannot be launched ({type(error).__name__})")
            continue
        report(f"{describe(changes)}: {ms:.3f} ms")
        if ms < best_ms * (1 - MARGIN):
            best, best_ms = config, ms
    # Once more, side by side: clocks may have changed since the first.
    shipped_ms, best_ms = time(partial(run, shipped)), time(partial(run, best))
    if best_ms >= shipped_ms * (1 - MARGIN):
        best, best_ms = shipped, shipped_ms
    return Found(difference(shipped, best), shipped_ms, best_ms)


def agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results are the same but for rounding, and ids but for choices that rounding decides."""
    if not expected.is_floating_point():
        return bool((found != expected).float().mean() <= 1e-4)
    return bool((found.float() - expected.float()).norm() <= 1e-2 * expected.float().norm())


def difference(shipped: Any, config: Any) -> Changes:
    """The fields in which two configurations differ, with the values of the second."""
    names = (field.name for field in fields(config))
    return {name: getattr(config, name) for name in names if getattr(config, name) != getattr(shipped, name)}


def describe(changes: Changes) -> str:
    """Changes in a line.

    >>> describe({"rows": 64, "num_warps": 8})
    'rows=64, num_warps=8'
    """
    return ", ".join(f"{name}={value}" for name, value in changes.items()) or "nothing"


def event_time(call: Callable[[], object], repeats: int = 10, warm_up: bool = True, fills: int = 4) -> float:
    """Median milliseconds that a call occupies the current GPU, after one call to warm up.

    Before each call, half a gigabyte is overwritten `fills` times: that empties the L2 cache, and lets the host run
    ahead, as it does in training. Host time beyond that counts.
    """
    spare = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
    if warm_up:
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(fills):
            spare.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)
