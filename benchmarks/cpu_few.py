"""Time a few queries over many keys on a CPU, without a cache, beside `decode`: `python -m benchmarks.cpu_few`.

128K keys, batch 1, 64 query heads, 4 KV heads, head dim 128, blocks of 128 keys, topk 16, random inputs. Every round
runs each variant once, so a slowdown of the machine affects all variants; times are medians over rounds. The gradients
of k, v and index_k are as large as these tensors, so a step is shown beside the time that zeros of these sizes take.
The benchmark needs 6 GB of memory.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

import flexmsa
from benchmarks.cpu import describe_machine

HEADS, GROUPS, DEPTH, KEYS = 64, 4, 128, 131072
QUERIES = (1, 4, 16, 64)
# The time of `attention` divided by that of `decode`, at most.
BAR = 2.0


def make_variants(queries: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by name."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(1, heads, tokens, DEPTH, generator=generator).to(dtype)

    q, index_q, grad = random(HEADS, queries), random(GROUPS, queries), random(HEADS, queries)
    k, v, index_k = random(GROUPS, KEYS), random(GROUPS, KEYS), random(1, KEYS)
    cache = flexmsa.MSACache(1, GROUPS, DEPTH, DEPTH, KEYS, dtype=dtype)
    cache.append(k, v, index_k)

    def step() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, index_q, index_k)]
        with torch.enable_grad():
            out, aux = flexmsa.attention(*leaves, return_aux=flexmsa.AuxRequest(index_loss=True))
        torch.autograd.grad((out, aux.index_loss), leaves, (grad, torch.ones(())))

    return {
        "decode": lambda: flexmsa.decode(q, cache, index_q),
        "attention": lambda: flexmsa.attention(q, k, v, index_q, index_k),
        "step": step,
        "zeros": lambda: [torch.zeros_like(x) for x in (k, v, index_k)],
    }


def measure(queries: int, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds of each variant."""
    variants = make_variants(queries, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            begin = perf_counter()
            variant()
            if number > 0:
                seconds[name].append(perf_counter() - begin)
    return {name: median(times) for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_few", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of cpu_few.json (default out)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for queries in QUERIES:
            with torch.no_grad():
                seconds = measure(queries, dtype, options.rounds)
            ratio = seconds["attention"] / seconds["decode"]
            name = str(dtype).removeprefix("torch.")
            rows.append({"queries": queries, "keys": KEYS, "dtype": name, **seconds, "ratio": ratio, "bar": BAR})
            times = ", ".join(f"{variant} {1e3 * time:.1f} ms" for variant, time in seconds.items())
            verdict = "reached" if ratio <= BAR else "MISSED"
            print(f"{queries:3} queries, {name}: {times}; {ratio:.2f} of decode, bar {BAR:g} {verdict}", flush=True)
            result = {"machine": describe_machine(), "rows": rows}
            (options.out / "cpu_few.json").write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
