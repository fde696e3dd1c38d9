"""Check the Triton kernels on a GPU, then time them, with the floors of their times.

    python -m benchmarks.gpu [--only PART ...] [--quick] [--sweep] [--out out/gpu]

Times are medians. For training and prefill, CUDA events measure one call. Before it, fills of other memory for some
milliseconds clear the L2 cache and let the host run ahead. For decode, a CUDA graph contains several calls, which use
in turn caches that together exceed the L2 cache; its time is divided by the number of calls. Floors are computed from
ceilings measured in the same run: a bf16 product of 8192^3 and a device copy. With --only, the rows of these parts
replace those in OUT/gpu.json; other parts keep their rows, and the machine and ceilings of their own run.
"""

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import triton

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_heads, gpu_model, gpu_peer_steps, gpu_peers, gpu_plot, gpu_shares, gpu_training
from benchmarks.gpu_certified import certified_errors
from benchmarks.gpu_launch_checks import host_times, launch_errors
from benchmarks.gpu_results import Results
from benchmarks.gpu_selection import large_errors, packed_errors, selection_errors, selection_times, sweep_times
from benchmarks.gpu_serving import chunk_calls, chunk_times, decode_times
from benchmarks.gpu_serving_checks import serving_errors
from flexmsa.kernels import tuning

LAYERS = [8192, 16384, 32768, 131072, 524288]

# 24 fills take longer than the host needs for the launches of a backward, some milliseconds.
event_time = partial(tuning.event_time, repeats=20, fills=24)


def launch_time(call: Callable[[], object], repeats: int = 5) -> float:
    """Median milliseconds that the host takes to launch a call, while the GPU is busy with other work."""
    spare = torch.empty(1 << 29, dtype=torch.int8, device="cuda")
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        for _ in range(200):
            spare.zero_()
        start = perf_counter()
        call()
        times.append((perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    return median(times)


def ceilings():
    """Measured FLOP/s of a bf16 product and bytes/s (read + write) of a device copy."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    flops = 2 * 8192**3 / (event_time(lambda: a @ b) * 1e-3)
    source = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / (event_time(lambda: target.copy_(source)) * 1e-3)
    return flops, bandwidth


def environment():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    # A line for each GPU, of one driver.
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.partition("\n")[0]
    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return {"gpu": torch.cuda.get_device_name(), "driver": driver, **versions}


@dataclass(frozen=True)
class Run:
    """The report function for a part's rows, the ceilings for its floors, and options."""

    report: Callable[..., None]
    flops: float
    bandwidth: float
    quick: bool
    sweep: bool

    def report_all(self, prefix: str, times: Iterable[tuple[str, float | str]]) -> None:
        """Report each (name, milliseconds), with a prefix of the names."""
        for name, time in times:
            self.report(prefix + name, time)


def time_selections(run: Run) -> None:
    if run.sweep:
        run.report_all("sweep ", sweep_times(event_time))
    for name, time, floor, config in selection_times(event_time, run.flops, run.quick):
        run.report(f"selection {name}", time, floor, config=config)


def time_decoding(run: Run) -> None:
    for name, time, floor in decode_times(run.bandwidth, quick=run.quick):
        run.report(f"decode {name}", time, floor)


def time_training(run: Run) -> None:
    for seqlen in LAYERS[:1] if run.quick else LAYERS:
        for name, floor in gpu_training.floors(seqlen, run.flops, run.bandwidth).items():
            run.report(f"floor {seqlen}: {name}", floor)
        timer = partial(event_time, repeats=20 if seqlen < 100_000 else 5)
        dense_timer = partial(event_time, repeats=1, warm_up=False) if seqlen > 200_000 else timer
        run.report_all(f"layer {seqlen}: ", gpu_training.training_times(seqlen, timer, dense_timer, launch_time))


def time_steps(run: Run) -> None:
    for seqlen in (4096, 8192, 16384):
        run.report_all(f"step {seqlen}: ", gpu_training.step_times(seqlen))


def time_prefill(run: Run) -> None:
    once = partial(event_time, repeats=1, warm_up=False)
    run.report_all(f"prefill {1 << 20}: ", gpu_training.prefill_times(1 << 20, once, ["random", "neighbours share"]))


def time_flex(run: Run) -> None:
    run.report_all("layer 32768: ", gpu_training.flex_times(32768, event_time, ["random", "neighbours share"]))


def time_peers(run: Run) -> None:
    nsa = gpu_peers.parallel_nsa()
    for seqlen in gpu_peers.LENGTHS[:1] if run.quick else gpu_peers.LENGTHS:
        timer = partial(event_time, repeats=20 if seqlen < 100_000 else 5)
        run.report_all(f"peers {seqlen}: ", gpu_peers.peer_times(seqlen, timer, nsa))
    layers = {(64, 4): (8192,)} if run.quick else gpu_peer_steps.LAYERS

    def timer_of(seqlen: int) -> gpu_training.Timer:
        return partial(event_time, repeats=20 if seqlen < 100_000 else 5)

    for name, time, more in gpu_peer_steps.step_times(timer_of, layers):
        run.report(name, time, **more)


def time_heads(run: Run) -> None:
    layouts = gpu_heads.LAYOUTS[2:3] if run.quick else gpu_heads.LAYOUTS
    gpu_heads.heads_times(run.report, lambda tokens: partial(event_time, repeats=5), layouts)


def time_model(run: Run) -> None:
    if not gpu_model.has_transformers():
        return
    lengths = list(gpu_model.BARS)[: 1 if run.quick else None]
    gpu_model.model_times(run.report, lengths)
    if not run.quick:
        print("\n".join(gpu_model.profile_lines(lengths[-1])), flush=True)


def time_shares(run: Run) -> None:
    gpu_shares.share_times(run.report, partial(event_time, repeats=2))


SELECTION_CHECKS = (selection_errors, packed_errors, large_errors, certified_errors)
# Part -> the function that times it, and the checks that must pass first.
PARTS: dict[str, tuple[Callable[[Run], None], tuple[Callable[[], Iterator[str]], ...]]] = {
    "selection": (time_selections, SELECTION_CHECKS),
    "decode": (time_decoding, (serving_errors,)),
    "host": (lambda run: run.report_all("host ", host_times()), (launch_errors,)),
    "chunks": (lambda run: run.report_all("chunk ", chunk_times(event_time)), (serving_errors,)),
    "training": (time_training, (gpu_training.training_errors,)),
    "steps": (time_steps, (gpu_training.training_errors,)),
    "prefill": (time_prefill, (*SELECTION_CHECKS, gpu_training.training_errors)),
    "flex": (time_flex, (gpu_training.training_errors,)),
    "peers": (time_peers, (gpu_training.training_errors,)),
    "heads": (time_heads, (gpu_heads.heads_errors,)),
    "model": (time_model, (gpu_model.model_errors,)),
    "shares": (time_shares, (gpu_shares.share_errors,)),
}
QUICK = ("selection", "decode", "host", "chunks", "training")


def check(parts: list[str]) -> bool:
    """Run each check of the parts once and print the errors; True if there are none."""
    torch.manual_seed(0)
    checks = dict.fromkeys(errors for part in parts for errors in PARTS[part][1])
    errors = [error for found in checks for error in found()]
    print("\n".join(errors) if errors else "correct", flush=True)
    return not errors


def report(results: Results, part: str, name: str, milliseconds, floor=None, **more) -> None:
    """Keep a row and print it; `milliseconds` is a string with the reason if there is no time."""
    results.add(part, {"name": name, "ms": milliseconds, "floor_ms": floor, **more})
    shown = milliseconds if isinstance(milliseconds, str) or milliseconds is None else f"{milliseconds:10.4f}"
    numbers = {"floor": floor, **{key: value for key, value in more.items() if isinstance(value, float)}}
    said = "  ".join(f"{key} {value:10.4f}" for key, value in numbers.items() if value is not None)
    print(f"{name:42} {shown} {said}", flush=True)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the parts to run, in order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="folder of the results (default out/gpu)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--sweep", action="store_true", help="time other configurations in the part selection")
    parser.add_argument("--quick", action="store_true", help=f"shorter lengths; by default only {', '.join(QUICK)}")
    options = parser.parse_args(argv)
    wanted = options.only or (QUICK if options.quick else PARTS)
    return options, [part for part in PARTS if part in wanted]


def main(argv: list[str] | None = None) -> None:
    options, parts = parse(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    results = Results(options.out / "gpu.json", chunks=chunk_calls())
    if not check(parts):
        sys.exit(1)
    flops, bandwidth = ceilings()
    print(f"{flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s", flush=True)
    machine = {**environment(), "flops": flops, "bytes_per_s": bandwidth}
    for part in parts:
        results.begin(part, machine)
        PARTS[part][0](Run(partial(report, results, part), flops, bandwidth, options.quick, options.sweep))
    gpu_plot.draw_if_possible(results.rows, results.parts.get("training", machine)["gpu"], options.out / "gpu.png")


if __name__ == "__main__":
    main()
