"""Tuning, when asked for: time the Triton kernels with other tiles on this GPU, and keep what is faster.

`python -m flexmsa autotune --help` does it from the shell.
"""

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from flexmsa import validation
from flexmsa._command import write_whole
from flexmsa.config import MSAConfig
from flexmsa.kernels.problem import Problem
from flexmsa.kernels.tuning import (
    Key,
    Report,
    clear_tuning,
    describe,
    event_time,
    register,
    set_certified_selection,
    tune,
)

__all__ = ["autotune", "clear_tuning", "load_tuning", "main", "set_certified_selection"]


def autotune(
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    index_head_dim: int | None = None,
    block_size: int = 128,
    topk: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    seqlen: int = 65536,
    device: str | torch.device = "cuda",
    path: str | os.PathLike | None = None,
    report: Report = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Time the Triton kernels of one shape with other tiles than they ship with, and use what is faster.

    The shipped configurations are good choices, and nothing needs to be tuned. This is for a GPU that they were not
    measured on (they were on an H200), or a shape far from 64/4 heads of 128: it takes some minutes, mostly of
    compiling. What is found is used from then on in this process, for every sequence length; `path` keeps it for
    others. Selection, and the main branch and the index loss in sparse training, are tuned; decoding is not.

    Other tiles add up in another order: out, lse, loss and gradients stay as exact, and may differ in their last bits
    from those of the shipped configurations; they still repeat bit by bit. block_indices are the same. So tune, or
    load, before the first step, and do it alike in every process.

    Args:
        num_heads, num_kv_heads: Hq and Hkv.
        head_dim, index_head_dim: D and Di; None for Di = D.
        block_size, topk: as for `flexmsa.attention`.
        dtype: of all inputs.
        seqlen: tokens to tune with, in one sequence; enough that every kernel fills the GPU several times.
        device: the GPU to tune on.
        path: a JSON file to write, after each kernel. What it holds already, of other shapes, is kept.
        report: called with a line for each candidate.

    Returns:
        For "selection", "forward", "backward" and "loss" a dict as in the file: "changes", the fields of the shipped
        configuration that are changed, with their new values; "shipped_ms" and "best_ms", median milliseconds without
        and with the changes; and the "kernel" and "shape" that they hold for.

    Raises:
        ValueError, TypeError: a size or the dtype is not supported, or path is a file of another architecture.
        RuntimeError: there is no GPU, or no Triton.

    >>> found = autotune(num_heads=64, num_kv_heads=4, head_dim=128, path="tuned.json")  # doctest: +SKIP
    >>> found["forward"]["changes"]  # doctest: +SKIP
    {'num_warps': 8}
    """
    index_head_dim = head_dim if index_head_dim is None else index_head_dim
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    others = {"index_head_dim": index_head_dim, "block_size": block_size, "topk": topk, "dtype": dtype}
    sizes = {**heads, **others, "seqlen": seqlen}
    return {entry["kernel"]: entry for entry in _tune_tasks(sizes, device, path, report)}


def load_tuning(path: str | os.PathLike) -> None:
    """Use what `autotune` found on this kind of GPU, in this process and for every sequence length.

    What a file says of kernels and shapes takes the place of what was registered for them before.

    Args:
        path: a file that `autotune` wrote.

    Raises:
        ValueError: path was not written by `autotune`, or for another GPU architecture.
        RuntimeError: there is no GPU, or no Triton.

    >>> if os.path.exists("tuned.json"):
    ...     load_tuning("tuned.json")
    """
    arch = _target_of("cuda").arch
    for entry in _read(Path(path), arch)["kernels"]:
        _register(entry, arch)


def _target_of(device: str | torch.device) -> Any:
    """The target of a GPU, as the kernels see it."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("tuning is of the Triton kernels, and Triton is not installed: pip install triton")
    if not torch.cuda.is_available():
        raise RuntimeError("tuning is of GPU kernels, and torch finds no GPU: torch.cuda.is_available() is False")
    if torch.device(device).type != "cuda":
        raise ValueError(f"device: expected a GPU, as in 'cuda', got {device}")
    from flexmsa.kernels.triton.common.target import target_of

    return target_of(torch.device(device))


def _register(entry: dict[str, Any], arch: int | str) -> None:
    register(Key(entry["kernel"], arch, tuple(sorted(entry["shape"].items()))), entry["changes"])


def _problem_of(seqlen: int, topk: int, dtype: torch.dtype, **sizes: Any) -> Problem:
    """The problem to tune for, its sizes checked."""
    MSAConfig(hidden_size=1, topk=topk, rotary_dim=0, **sizes)
    validation.check_int("topk", topk, 1)
    validation.check_int("seqlen", seqlen, 1)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype: expected torch.bfloat16, torch.float16 or torch.float32, got {dtype}")
    group_size = sizes.pop("num_heads") // sizes["num_kv_heads"]
    return Problem(topk=topk, dtype=dtype, group_size=group_size, **sizes)


def _tune_tasks(
    sizes: dict[str, Any], device: str | torch.device, path: str | os.PathLike | None, report: Report
) -> Iterator[dict[str, Any]]:
    """Tune one task after the other: register each result, write it to path, and yield it."""
    problem = _problem_of(**sizes)
    target = _target_of(device)
    file = None if path is None else Path(path)
    stored = {"kernels": []} if file is None or not file.exists() else _read(file, target.arch)
    from flexmsa.kernels.triton.tuning.tasks import TASKS, make_inputs

    with torch.cuda.device(device):
        inputs = make_inputs(problem, sizes["seqlen"], torch.device(device))
        for task in TASKS:
            entry = _tune_task(task, inputs, report)
            _register(entry, target.arch)
            others = [old for old in stored["kernels"] if (old["kernel"], old["shape"]) != (task.name, entry["shape"])]
            stored = {**_environment(device), "arch": target.arch, "kernels": [*others, entry]}
            if file is not None:
                _write(file, stored)
            yield entry


def _tune_task(task: Any, inputs: Any, report: Report) -> dict[str, Any]:
    """The entry of a file that says what was found for one task."""
    shipped = task.choose(inputs)
    found = tune(
        shipped,
        task.candidates(inputs.problem, inputs.target, shipped),
        lambda config: task.run(inputs, config),
        event_time,
        lambda line: report(f"{task.name}: {line}"),
    )
    return {"kernel": task.name, "shape": dict(task.key(inputs).shape), **found._asdict()}


def _environment(device: str | torch.device) -> dict[str, str]:
    import triton

    return {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}


def _write(path: Path, stored: dict[str, Any]) -> None:
    write_whole(path, lambda unfinished: unfinished.write_text(json.dumps(stored, indent=2) + "\n"))


def _read(path: Path, arch: int | str) -> dict[str, Any]:
    """Read and check a file that `_write` wrote."""
    from flexmsa.kernels.triton.tuning.tasks import TASKS

    tunable = {task.name: task.tunable for task in TASKS}
    try:
        stored = json.loads(path.read_text())
        for entry in stored["kernels"]:
            unknown = set(entry["changes"]) - set(tunable[entry["kernel"]])
            values = [*entry["changes"].values(), *entry["shape"].values()]
            if unknown or not all(isinstance(value, int | str | None) for value in values):
                raise ValueError(f"changes to {entry['kernel']}: {entry['changes']}")
        found = stored["arch"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"path: expected a file that flexmsa.autotune wrote, got {path} ({type(error).__name__}: {error})"
        ) from None
    if found != arch:
        raise ValueError(
            f"path: expected a file for this GPU's architecture, {arch}, got {path} for {found} "
            f"({stored.get('gpu')}); make one here with flexmsa.autotune"
        )
    return stored


def main(argv: list[str]) -> int:
    """Tune for one shape and write the file; returns 0, or 1 where there is no GPU to tune on."""
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa autotune",
        description="Time the Triton kernels of one shape with other tiles than they ship with, and write what is "
        "faster to a file for flexmsa.load_tuning. Takes some minutes; Ctrl-C leaves what was found so far.",
    )
    for name in ("num-heads", "num-kv-heads", "head-dim"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--index-head-dim", type=int, default=None, help="default: the head dim")
    parser.add_argument("--block-size", type=int, default=128)
    parser.add_argument("--topk", type=int, default=16)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--seqlen", type=int, default=65536, help="tokens to tune with; results apply to every length")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True, help="the file; what it has of other shapes is kept")
    options = vars(parser.parse_args(argv))
    device, path = options.pop("device"), options.pop("out")
    options["dtype"] = getattr(torch, options["dtype"])
    options["index_head_dim"] = options["index_head_dim"] or options["head_dim"]
    try:
        _target_of(device)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    entries = []
    try:
        for entry in _tune_tasks(options, device, path, lambda line: print(line, flush=True)):
            entries.append(entry)
    except KeyboardInterrupt:
        print("\nstopped")
    except ValueError as error:
        parser.error(str(error))
    print(f"\n{'kernel':10} {'shipped':>10} {'best':>10}  changes")
    for entry in entries:
        shipped, best = f"{entry['shipped_ms']:.3f} ms", f"{entry['best_ms']:.3f} ms"
        print(f"{entry['kernel']:10} {shipped:>10} {best:>10}  {describe(entry['changes'])}")
    return 0
