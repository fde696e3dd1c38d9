"""Several arms and seeds at one time, one on each GPU, each in a process of its own."""

import os
import queue
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["run_each"]


def run_each(
    name: str, arms: Sequence[str], seeds: Sequence[int], options: Sequence[str], out: Path, num_gpus: int
) -> int:
    """Run the command `name` for each arm with each seed; what a process prints is in ARM-SEED.log.

    Returns the first exit code but 0.

    Args:
        options: of every process.
        num_gpus: 0 for one process at a time, without a GPU.
    """
    free: queue.Queue[int | None] = queue.Queue()
    for gpu in range(num_gpus) if num_gpus else [None]:
        free.put(gpu)

    def run(arm: str, seed: int) -> int:
        gpu = free.get()
        environment = dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        command = [sys.executable, "-m", "benchmarks.quality", name, "--arm", arm, "--seed", str(seed), *options]
        log = out / f"{arm}-{seed}.log"
        with log.open("w") as file:
            code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
        free.put(gpu)
        last = log.read_text().splitlines()[-1:]
        print(f"{arm}-{seed}: exit code {code}; {''.join(last)}", flush=True)
        return code

    # In turn by seed, so that a first seed of all arms comes first.
    jobs = [(arm, seed) for seed in seeds for arm in arms]
    with ThreadPoolExecutor(max(1, num_gpus)) as threads:
        codes = list(threads.map(lambda job: run(*job), jobs))
    return next((code for code in codes if code), 0)
