"""Compile every kernel of every shape that the public functions accept, for GPUs that need not be present.

    python -m benchmarks.compile_all [--targets sm_90 ...] [--tasks forward ...] [--every 1] [--jobs N]

Kernels that several shapes share are compiled once. What does not compile, or does not fit the shared memory, is
printed with its shape; kernels that spill are listed with the bytes per thread. Ctrl-C prints what was found so far.
The whole grid takes hours on a few cores; Triton's cache keeps what was compiled.
"""

import argparse
import multiprocessing
import os
import sys
from collections.abc import Iterator
from typing import NamedTuple

from flexmsa.kernels.triton.common.launch import compile_key
from flexmsa.testing.compiled import report
from flexmsa.testing.launches import TARGETS, TASKS, Layer, grid


class Job(NamedTuple):
    """The number-th launch of a task for a layer."""

    target: str
    task: str
    layer: Layer
    number: int


class Outcome(NamedTuple):
    """What the compiler said: an error, or bytes spilled per thread."""

    job: Job
    kernel: str
    error: str
    spilled: int


def jobs(targets: list[str], tasks: list[str], layers: list[Layer]) -> Iterator[Job]:
    """A job for each distinct kernel."""
    known = set()
    for target in targets:
        for task in tasks:
            for layer in layers:
                for number, launch in enumerate(TASKS[task](layer, TARGETS[target])):
                    key = target, compile_key(launch)
                    if key not in known:
                        known.add(key)
                        yield Job(target, task, layer, number)


def run(job: Job) -> Outcome:
    """Compile one kernel."""
    target = TARGETS[job.target]
    launch = TASKS[job.task](job.layer, target)[job.number]
    name = launch.kernel.__name__
    try:
        found = report(launch.compile(target))
    except Exception as error:  # Triton, LLVM and ptxas each have errors of their own.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Outcome(job, name, f"{type(error).__name__}: {lines[-1]}", 0)
    if found.shared > target.shared_memory:
        return Outcome(job, name, f"takes {found.shared} bytes of shared memory of {target.shared_memory}", 0)
    return Outcome(job, name, "", found.spilled)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_all", description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--every", type=int, default=1, help="take every N-th layer of the grid (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one per core)")
    options = parser.parse_args(argv)
    work = list(jobs(options.targets, options.tasks, grid()[:: options.every]))
    failed, spilled = [], []
    interactive = sys.stderr.isatty()
    try:
        with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
            for done, outcome in enumerate(pool.imap_unordered(run, work), start=1):
                if outcome.error:
                    failed.append(outcome)
                    print(f"{outcome.job.target} {outcome.kernel} {outcome.job.layer}: {outcome.error}", flush=True)
                elif outcome.spilled:
                    spilled.append(outcome)
                if interactive:
                    print(f"\r{done} of {len(work)} kernels, {len(failed)} failed", end="", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    for outcome in sorted(spilled, key=lambda found: -found.spilled)[:20]:
        print(f"spills {outcome.spilled:5} bytes: {outcome.job.target} {outcome.kernel} {outcome.job.layer}")
    print(f"{len(work)} kernels, {len(failed)} failed, {len(spilled)} spill")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
