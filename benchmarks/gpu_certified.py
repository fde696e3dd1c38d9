"""The selection certified from int8 scores on a GPU: `python -m benchmarks.gpu_certified [--out FILE]`.

Its ids are compared with those of the 16-bit kernel, bit for bit, for keys of several kinds, and it is timed beside
that kernel, kernel by kernel. Writes benchmarks/results/certified-h200.json.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.gpu_selection import plain
from flexmsa import set_certified_selection
from flexmsa._command import write_whole
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.selection.certified import launch
from flexmsa.kernels.triton.selection.launch import choose_config, select_blocks

RESULT = Path(__file__).resolve().parent / "results" / "certified-h200.json"
# Hkv and tokens, at the index dims, blocks and topk of M3.
LENGTHS = [(4, 65536), (8, 131072), (4, 131072), (4, 1048576)]
# Hkv, and numbers of queries and keys, of parts of such rows: the queries are the last tokens.
PARTS = (4, 8), (1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17), (1 << 16, 3 << 15, 1 << 17, 1 << 18, 1 << 20)

Kind = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def normal(index_q, index_k):
    return index_q, index_k


def integers(index_q, index_k):
    """Scores that are often equal."""
    drawn = (torch.randint(-3, 4, x.shape, device=x.device).to(x.dtype) for x in (index_q, index_k))
    return next(drawn), next(drawn)


def equal_keys(index_q, index_k):
    return index_q, index_k[:, :, :1].expand_as(index_k).contiguous()


def huge_key(index_q, index_k):
    index_k[0, 0, 5000] *= 3000
    return index_q, index_k


def wild(index_q, index_k):
    """Some numbers are NaN, infinite, vast or tiny."""
    numbers = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, 1e-39], device=index_q.device)
    for x, count in ((index_q, 300), (index_k, 3)):
        places = torch.randint(x.numel(), (count,), device=x.device)
        x.view(-1)[places] = numbers[torch.arange(count, device=x.device) % 5].to(x.dtype)
    return index_q, index_k


def any_norms(index_q, index_k):
    """Norms from 0 to 3 of queries, and from 1 to 16 of keys."""
    queries, keys = (torch.rand(x.shape[:3], device=x.device)[..., None] for x in (index_q, index_k))
    return index_q * (3 * queries).to(index_q.dtype), index_k * torch.exp2(4 * keys).to(index_k.dtype)


def zeros_fp16(index_q, index_k):
    index_q, index_k = index_q.half(), index_k.half()
    index_q[:, :, ::5], index_k[:, :, ::3] = 0, 0
    return index_q, index_k


# name: kind, (B, Hkv, Sq, Sk, Di, block_size, topk, local, init); in the ragged batch, other first and last keys.
INPUTS: dict[str, tuple[Kind, tuple[int, ...]]] = {
    "normal": (normal, (1, 4, 131072, 131072, 128, 128, 16, 1, 0)),
    "8 groups, topk 8, forced blocks": (normal, (1, 8, 32768, 32768, 128, 128, 8, 2, 1)),
    "ragged batch": (normal, (3, 4, 20000, 50000, 128, 128, 16, 1, 1)),
    "Di 64, blocks of 64, topk 32": (normal, (1, 3, 30000, 30001, 64, 64, 32, 1, 0)),
    "Di 32, blocks of 64, topk 4": (normal, (2, 4, 8000, 20000, 32, 64, 4, 1, 0)),
    "1 group, blocks of 64": (normal, (1, 1, 65536, 65536, 128, 64, 16, 1, 0)),
    "integers": (integers, (1, 4, 65536, 65536, 128, 128, 16, 1, 0)),
    "all keys equal": (equal_keys, (1, 4, 131072, 131072, 128, 128, 16, 1, 0)),
    "one huge key": (huge_key, (1, 4, 65536, 65536, 128, 128, 16, 1, 0)),
    "NaN, Inf, vast and tiny numbers": (wild, (1, 4, 65536, 65536, 128, 128, 16, 1, 0)),
    "norms of any size": (any_norms, (1, 4, 65536, 65536, 128, 128, 16, 1, 0)),
    "fp16, some vectors zero": (zeros_fp16, (1, 4, 32768, 32768, 64, 128, 16, 1, 0)),
}


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The median time of a call, after two to warm up."""
    times = []
    for _ in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


def both(index_q: Tensor, index_k: Tensor, sequences: Tensor, rule: SelectionRule) -> list[Callable[[], Tensor]]:
    """The selections from int8 scores, and from those of 16 bits."""
    config = replace(choose_config(index_q, index_k, sequences, rule), num_splits=1)
    given = index_q, index_k, sequences, rule
    return [partial(select_blocks, *given, config=replace(config, certified=x)) for x in (True, False)]


def watched(call: Callable[[], Tensor], around: Callable[..., None]) -> Tensor:
    """A selection whose kernels are launched by `around(run, kernel, arguments)`; run() launches one."""
    run = launch.launch

    def stand_in(kernel: Any, grid: Any, arguments: Any, *options: Any) -> None:
        around(partial(run, kernel, grid, arguments, *options), kernel, arguments)

    launch.launch = stand_in
    try:
        return call()
    finally:
        launch.launch = run


def marked_rows(call: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """The ids, and how many rows were left to the 16-bit kernel."""
    counts = []

    def count(run: Callable[[], None], kernel: Any, arguments: Any) -> None:
        if kernel is launch.merge_marked_kernel:
            counts.append(arguments["marked"].count[:1].clone())
        run()

    return watched(call, count), sum(int(x) for x in counts)


def kernel_times(call: Callable[[], Tensor]) -> dict[str, float]:
    """Milliseconds of each kernel, all token ranges together."""
    events = defaultdict(list)

    def time(run: Callable[[], None], kernel: Any, arguments: Any) -> None:
        pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        pair[0].record()
        run()
        pair[1].record()
        events[kernel.__name__.removesuffix("_kernel")].append(pair)

    watched(call, time)
    torch.cuda.synchronize()
    return {name: sum(begin.elapsed_time(end) for begin, end in pairs) for name, pairs in events.items()}


def compare(name: str) -> dict[str, Any]:
    """One of INPUTS: rows whose ids differ, and times."""
    kind, (batch, groups, seqlen_q, seqlen_k, depth, *rule) = INPUTS[name]
    draw = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    index_q, index_k = kind(draw(batch, groups, seqlen_q, depth), draw(batch, 1, seqlen_k, depth))
    sequences = plain(batch, seqlen_q, seqlen_k, "cuda")
    sequences[1:, 3], sequences[1:, 4] = 777, seqlen_k - 999
    certified, exact = both(index_q, index_k, sequences, SelectionRule(*rule))
    found, marked = marked_rows(certified)
    differ = int((found != exact()).any(-1).sum())
    times = {"ms": milliseconds(certified, 3), "bf16_ms": milliseconds(exact, 3)}
    return {"name": name, "rows": found[..., 0].numel(), "differ": differ, "marked": marked, **times}


def certified_errors() -> Iterator[str]:
    """The inputs whose ids are not those of the 16-bit kernel."""
    for name in INPUTS:
        row = compare(name)
        if row["differ"]:
            yield f"certified selection, {name}: {row['differ']} rows differ"


def measure(groups: int, tokens: int) -> dict[str, Any]:
    """Times of one of LENGTHS, and the most memory that a selection takes."""
    index_q = torch.randn(1, groups, tokens, 128, device="cuda", dtype=torch.bfloat16)
    index_k = torch.randn(1, 1, tokens, 128, device="cuda", dtype=torch.bfloat16)
    certified, exact = both(index_q, index_k, plain(1, tokens, tokens, "cuda"), SelectionRule(128, 16))
    certified()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found, marked = marked_rows(certified)
    peak = (torch.cuda.max_memory_allocated() - before) >> 20
    repeats = 7 if tokens < 500_000 else 1
    times = {"ms": milliseconds(certified, repeats), "bf16_ms": milliseconds(exact, repeats)}
    differ = int((found != exact()).any(-1).sum())
    row = {"groups": groups, "tokens": tokens, **times, "differ": differ, "marked": marked, "peak_mib": peak}
    return row | {"kernels": kernel_times(certified)}


def measure_part(groups: int, queries: int, keys: int) -> dict[str, Any]:
    """Rows whose ids differ, and times, of one of PARTS; the 16-bit kernel has the splits that it has by default."""
    index_q = torch.randn(1, groups, queries, 128, device="cuda", dtype=torch.bfloat16)
    index_k = torch.randn(1, 1, keys, 128, device="cuda", dtype=torch.bfloat16)
    sequences, rule = plain(1, queries, keys, "cuda"), SelectionRule(128, 16)
    certified, exact = both(index_q, index_k, sequences, rule)
    differ = int((certified() != exact()).any(-1).sum())
    times = {"ms": milliseconds(certified, 3)}
    set_certified_selection(False)
    try:
        times["bf16_ms"] = milliseconds(partial(select_blocks, index_q, index_k, sequences, rule), 3)
    finally:
        set_certified_selection(True)
    return {"groups": groups, "queries": queries, "keys": keys, "differ": differ, **times}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_certified", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="where the JSON goes (default: the committed results)")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    calls = {
        "inputs": [partial(compare, name) for name in INPUTS],
        "lengths": [partial(measure, *shape) for shape in LENGTHS],
        "parts": [partial(measure_part, *shape) for shape in product(*PARTS) if shape[1] <= shape[2]],
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in calls}
    for name, part in calls.items():
        for call in part:
            found[name].append(call())
            print(found[name][-1], flush=True)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    text = json.dumps(machine | found, indent=1) + "\n"
    write_whole(options.out, lambda unfinished: unfinished.write_text(text))
    return int(any(row["differ"] for rows in found.values() for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
