"""Run small cases of every path under compute-sanitizer: memcheck, racecheck and initcheck.

    python -m benchmarks.gpu_sanitize [--tools memcheck ...] [--paths forward ...] [--jobs N]

Needs a GPU, and compute-sanitizer of the CUDA toolkit on PATH. Each path is a process of its own, first without a tool,
which compiles its kernels, then with each tool; some processes run side by side. Exits with 1 if a path fails or a tool
reports anything, and prints what the tool said of it; `sanitizer_reports` says what is set aside on Hopper, and why.
Inputs are made on the CPU, and allocations are not cached: a cache hides from memcheck where a tensor ends, and from
initcheck what was never written. Without a tool each path runs a second time, in memory that is filled with NaN and
the largest integers before use, and must return the same bits.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import flexmsa
from flexmsa import AuxRequest
from flexmsa.kernels.triton.common.launch import expected
from flexmsa.testing import Case, Schedule
from flexmsa.testing.check import kernels_for_many_queries

from .sanitizer_reports import control, counted, reports_of

TOOLS = ("memcheck", "racecheck", "initcheck")
NONE = "no tool"
CONTROL = "control"
DEVICE = "cuda"
# Where many tools start at a time, some do not reach their process, and wait for ever.
NOT_ATTACHED, ATTEMPTS = "No attachable process found", 3
# Each process takes a core of the host most of the time.
JOBS = min(12, os.cpu_count() or 1)
# The last queries of a part-filled cache: many blocks of keys, and few queries, as racecheck is slow.
FEW = {"seqlen_q": 48, "seqlen_k": 1400, "kv_lens": (1390,), "kv_starts": (5,), "dtype": "bfloat16"}
LAYERS = {
    "Gluon, 128": Case(1, 2, 16, 128, 128, block_size=128, topk=3, **FEW),
    "Gluon, 64": Case(1, 1, 8, 64, 64, block_size=128, topk=2, **FEW),
    "Triton": Case(1, 2, 3, 80, 32, block_size=48, topk=4, strided=True, **FEW),
    "fp32": Case(1, 1, 4, 32, 16, block_size=64, topk=3, **{**FEW, "dtype": "float32"}),
}
PACKED = {"cu_seqlens": (0, 1, 70, 150, 260), "seqlen_q": 260, "seqlen_k": 260, "kv_lens": None, "kv_starts": None}
STEPS = (("append", (140, 131)), ("append", (1, 1)), ("append", (3, 0)))
CACHE = Schedule(STEPS, 2, 2, 16, 128, 128, 128, 2, capacity=384, dtype="bfloat16")


def on_gpu(case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """The inputs of a case, made on the CPU, and the settings of a single step."""
    inputs, _ = case.inputs("cpu")
    names = ("block_size", "cu_seqlens", "kv_starts", "kv_lens")
    settings = {name: value for name, value in case.settings(DEVICE).items() if name in names}
    return [x.to(DEVICE).requires_grad_() for x in inputs], settings


def blocks(case: Case) -> Tensor:
    """Half the tokens choose the same blocks, which is work for query-major kernels, the others random ones."""
    ids = replace(case, ids="given").block_indices("cpu")
    assert ids is not None and case.topk is not None
    ids[:, :, : case.seqlen_q // 2] = torch.arange(case.topk, dtype=torch.int32)
    return ids.to(DEVICE)


def rule(case: Case) -> dict[str, Any]:
    return {"topk": case.topk, "num_local_blocks": case.num_local_blocks, "num_init_blocks": case.num_init_blocks}


def select(case: Case, e4m3: bool = False) -> list[Tensor]:
    inputs, settings = on_gpu(case)
    index = [x.detach().to(torch.float8_e4m3fn) if e4m3 else x.detach() for x in inputs[3:]]
    return [flexmsa.select_blocks(*index, **settings, **rule(case), backend="triton")]


def train(case: Case, step: str, few: bool = False) -> list[Tensor]:
    """One step of training with given blocks: "forward", "backward" or "index loss"; few: as for few queries."""
    (q, k, v, *index), settings = on_gpu(case)
    ids = None if case.topk is None else blocks(case)
    aux = AuxRequest(lse=True)
    kernels = nullcontext() if few else kernels_for_many_queries(q, "triton")
    with torch.set_grad_enabled(step == "backward"), kernels:
        out, got = flexmsa.block_sparse_attention(q, k, v, ids, **settings, backend="triton", return_aux=aux)
    if step == "backward":
        gradients = torch.autograd.grad((out, got.lse), (q, k, v), (torch.ones_like(out), torch.ones_like(got.lse)))
        return [out, got.lse, *gradients]
    if step == "index loss":
        loss = flexmsa.index_loss(q.detach(), k.detach(), *index, ids, got.lse, **settings, backend="triton")
        return [loss, *torch.autograd.grad(loss, index)]
    return [out, got.lse]


def train_together(case: Case) -> list[Tensor]:
    """A whole step, whose backward computes the index loss."""
    inputs, settings = on_gpu(case)
    value = torch.zeros((), device=DEVICE)
    aux = AuxRequest(index_loss=True)
    settings |= rule(case) | {"backend": "triton"}
    out, got = flexmsa.attention(*inputs, **settings, return_aux=aux, index_loss_value=value)
    ones = torch.ones_like(out), torch.ones_like(got.index_loss)
    return [out, *torch.autograd.grad((out, got.index_loss), inputs, ones), value]


def serve(schedule: Schedule) -> list[Tensor]:
    """The appends of a schedule, each followed by attention to the cache."""
    outputs = []
    cache = schedule.new_cache(DEVICE)
    heads = schedule.num_kv_heads
    for _, lens in schedule.steps:

        def new(heads: int, size: int, count: int = max(lens)) -> Tensor:
            return torch.randn(schedule.batch, heads, count, size).bfloat16().to(DEVICE)

        ragged = torch.tensor(lens, dtype=torch.int32).to(DEVICE) if len(set(lens)) > 1 else None
        k, index_k = new(heads, schedule.head_dim), new(1, schedule.index_head_dim)
        cache.append(k, k, index_k, lens=ragged, backend="triton")
        q, index_q = new(heads * schedule.group_size, schedule.head_dim), new(heads, schedule.index_head_dim)
        sizes = {"block_size": schedule.block_size, "topk": schedule.topk}
        outputs.append(flexmsa.decode(q, cache, index_q, **sizes, backend="triton"))
    return outputs


def every_layer(run: Callable[[Case], list[Tensor]], *more: Case) -> list[Tensor]:
    return [x for case in (*LAYERS.values(), *more) for x in run(case)]


WARM_UP = replace(LAYERS["Triton"], topk=None)
PACKED_LAYERS = [replace(LAYERS[name], **PACKED) for name in ("Gluon, 128", "Triton")]
FEW_QUERIES = replace(LAYERS["Gluon, 128"], seqlen_q=2)
MANY_KEYS = replace(FEW_QUERIES, seqlen_k=6000, kv_lens=(5990,))
PATHS: dict[str, Callable[[], list[Tensor]]] = {
    "selection": partial(every_layer, select, *PACKED_LAYERS),
    "selection, few queries": partial(every_layer, select, FEW_QUERIES, MANY_KEYS),
    "selection, e4m3": partial(select, LAYERS["Gluon, 128"], e4m3=True),
    "forward": partial(every_layer, partial(train, step="forward"), *PACKED_LAYERS, WARM_UP),
    "forward, few queries": partial(every_layer, partial(train, step="forward", few=True), *PACKED_LAYERS),
    "backward": partial(every_layer, partial(train, step="backward"), WARM_UP),
    "backward, packed": lambda: [x for case in PACKED_LAYERS for x in train(case, "backward")],
    "index loss": partial(every_layer, partial(train, step="index loss"), *PACKED_LAYERS, WARM_UP),
    "loss in the backward": partial(every_layer, train_together),
    "decode": lambda: serve(CACHE) + serve(replace(CACHE, topk=None)),
    "decode, pages": partial(serve, replace(CACHE, paged=True)),
    "decode, e4m3": partial(serve, replace(CACHE, fp8_keys=True, index_dtype="float8_e4m3fn")),
    "decode, int8": partial(serve, replace(CACHE, index_dtype="int8")),
    "decode, pages, e4m3": partial(serve, replace(CACHE, paged=True, fp8_keys=True, index_dtype="float8_e4m3fn")),
}


def results_of(path: Callable[[], list[Tensor]], filled: bool) -> list[Tensor]:
    """What a path returns, on the CPU; filled: with memory that holds NaN and the largest integers before use."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(filled, warn_only=True)
    try:
        # One kernel after the other, in this thread: sanitizers do not follow what other threads load.
        with expected(lambda: None):
            return [x.detach().cpu() for x in path()]
    finally:
        torch.use_deterministic_algorithms(False)


def check_bits(path: Callable[[], list[Tensor]]) -> None:
    """Run a path twice, and raise unless it returns the same bits whatever lay in its memory."""
    for number, pair in enumerate(zip(results_of(path, False), results_of(path, True), strict=True)):
        plain, filled = (x.flatten().view(torch.uint8) for x in pair)
        if not torch.equal(plain, filled):
            raise AssertionError(f"result {number} depends on memory that nothing was written to")


class Report(NamedTuple):
    """How a path fared with a tool: what went wrong, or nothing, and the seconds that it took."""

    path: str
    tool: str
    wrong: str
    output: str
    seconds: float


def verdict(code: int, output: str, tool: str, blind: bool = False) -> str:
    """What is wrong by the exit code and the output of a run, or nothing.

    blind: the tool reports the control.

    >>> verdict(0, "========= ERROR SUMMARY: 0 errors", "memcheck")
    ''
    >>> verdict(0, "========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", "racecheck")
    '2 hazards displayed (0 errors, 2 warnings)'
    """
    summaries = re.findall(r"SUMMARY: (\d+) (.*)", output)
    reported = [f"{number} {what}" for number, what in summaries if int(number)]
    if reported and reports_of(output):
        counts = counted(output, tool, blind)
        return f"{len(counts)} reports: {counts[0].splitlines()[0]}" if counts else ""
    if reported:
        return "; ".join(reported)
    if code:
        return f"exit code {code}"
    return "" if summaries or tool == NONE else "the tool printed no summary"


def run(path: str, tool: str, seconds: float, blind: bool = False) -> Report:
    """Run one path in a process of its own, under a tool or none; blind: see `verdict`."""
    command = [sys.executable, "-m", "benchmarks.gpu_sanitize", "--run", path, *(["--twice"] if tool == NONE else [])]
    if tool != NONE:
        options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
        options += ["--print-limit", "100000", "--show-backtrace", "no"]
        command = ["compute-sanitizer", *options, *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.monotonic()
    output = ""
    for _ in range(ATTEMPTS):
        try:
            found = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as error:
            output = (error.stdout or b"").decode(errors="replace")
            wrong = f"not finished after {seconds:g} s"
            if NOT_ATTACHED in output:
                continue
        else:
            output = found.stdout + found.stderr
            wrong = verdict(found.returncode, output, tool, blind)
        break
    return Report(path, tool, wrong, output, time.monotonic() - start)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS), metavar="PATH")
    parser.add_argument("--jobs", type=int, default=JOBS, help=f"processes side by side (default {JOBS})")
    parser.add_argument("--seconds", type=float, default=100, help="the most that one process may take (default 100)")
    parser.add_argument("--run", choices=[*PATHS, CONTROL], help=argparse.SUPPRESS)
    parser.add_argument("--twice", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.run:
        if options.run == CONTROL:
            control()
        elif options.twice:
            check_bits(PATHS[options.run])
        else:
            results_of(PATHS[options.run], False)
        torch.cuda.synchronize()
        return 0
    for missing, what in (
        (not torch.cuda.is_available(), "a GPU: torch.cuda.is_available() is False"),
        (shutil.which("compute-sanitizer") is None, "compute-sanitizer of the CUDA toolkit on PATH"),
    ):
        if missing:
            print(f"gpu_sanitize needs {what}", file=sys.stderr)
            return 2
    reports = []
    with ThreadPoolExecutor(options.jobs) as pool:
        seen = pool.map(lambda tool: run(CONTROL, tool, options.seconds), options.tools)
        blind = {report.tool: bool(reports_of(report.output)) for report in seen}
        print(
            f"tools that report the control: {', '.join(tool for tool in blind if blind[tool]) or 'none'}", flush=True
        )
        for tools in ([NONE], options.tools):
            jobs = [
                pool.submit(run, path, tool, options.seconds, blind.get(tool, False))
                for tool, path in product(tools, options.paths)
            ]
            for job in as_completed(jobs):
                report = job.result()
                reports.append(report)
                said = f"{report.wrong or 'clean'}, {report.seconds:.0f} s"
                print(f"{report.tool:10} {report.path:24} {said}", flush=True)
            if any(report.wrong for report in reports):
                break
    wrong = [report for report in reports if report.wrong]
    for report in wrong:
        # The first report of a tool names the kernel; the last lines have an exception.
        print(f"\n{report.tool}, {report.path}: {report.wrong}\n{report.output[:3000]}\n...\n{report.output[-1500:]}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
