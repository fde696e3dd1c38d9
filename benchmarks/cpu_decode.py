"""Time one decoding step on a CPU beside dense attention over the whole cache: `python -m benchmarks.cpu_decode`.

One new token, batch 1, 64 query heads, 4 KV heads, head dim 128, blocks of 128 keys, topk 16. Dense is the faster of
scaled_dot_product_attention(enable_gqa=True) and the same call on q packed by group, [B, Hkv, G, D]. Medians of rounds
that run every variant once. The limit is the ratio of the bytes that either has to read.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.nn.functional import scaled_dot_product_attention

import flexmsa
from benchmarks.cpu import describe_machine

HEADS, GROUPS, DEPTH, CHOSEN = 64, 4, 128, 16 * 128
FP8 = torch.float8_e4m3fn
# Keys, dtype, dtype of the index keys, the least ratio that the project promises.
CASES = [
    (131072, torch.float32, torch.float32, 5.0),
    (524288, torch.float32, torch.float32, 6.0),
    (131072, torch.bfloat16, torch.bfloat16, 8.0),
    (131072, torch.bfloat16, FP8, 8.0),
]


def filled(keys: int, dtype: torch.dtype, index_dtype: torch.dtype) -> flexmsa.MSACache:
    cache = flexmsa.MSACache(1, GROUPS, DEPTH, DEPTH, keys, dtype=dtype, index_dtype=index_dtype)
    for chunk in torch.arange(keys).split(16384):
        new = [torch.randn(1, heads, len(chunk), DEPTH, dtype=dtype) for heads in (GROUPS, GROUPS, 1)]
        cache.append(*new)
    return cache


def measure(keys: int, dtype: torch.dtype, index_dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of each variant."""
    cache = filled(keys, dtype, index_dtype)
    q = torch.randn(1, HEADS, 1, DEPTH, dtype=dtype)
    packed = q.view(1, GROUPS, HEADS // GROUPS, DEPTH)
    index_q = torch.randn(1, GROUPS, 1, DEPTH, dtype=dtype)
    variants = {
        "step": lambda: flexmsa.decode(q, cache, index_q),
        "packed": lambda: scaled_dot_product_attention(packed, cache.k, cache.v),
        "enable_gqa": lambda: scaled_dot_product_attention(q, cache.k, cache.v, enable_gqa=True),
    }
    # Ten times slower than the packed call, so one round of it is enough to know which is the faster.
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats + 1):
        for name, variant in variants.items():
            if name == "enable_gqa" and number > 1:
                continue
            begin = perf_counter()
            variant()
            if number > 0:
                seconds[name].append(perf_counter() - begin)
    return {name: median(times) for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_decode", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where cpu_decode.json goes (default out)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows = []
    for keys, dtype, index_dtype, bar in CASES:
        with torch.no_grad():
            seconds = measure(keys, dtype, index_dtype, options.repeats)
        dense = min(seconds["packed"], seconds["enable_gqa"])
        itemsize = dtype.itemsize
        scale = 1 if index_dtype == FP8 else 0
        least = keys * (DEPTH * index_dtype.itemsize + scale) + 2 * GROUPS * CHOSEN * DEPTH * itemsize
        row = {
            "keys": keys,
            "dtype": str(dtype).removeprefix("torch."),
            "index_dtype": str(index_dtype).removeprefix("torch."),
            "step_seconds": seconds["step"],
            "dense_seconds": dense,
            "ratio": dense / seconds["step"],
            "limit": 2 * GROUPS * keys * DEPTH * itemsize / least,
            "bar": bar,
        }
        rows.append(row)
        verdict = "reached" if row["ratio"] >= bar else "MISSED"
        print(
            f"{keys:7} keys, {row['dtype']}, index keys {row['index_dtype']}: {1e3 * seconds['step']:.2f} ms, dense "
            f"{1e3 * dense:.1f} ms, {row['ratio']:.1f}x of at most {row['limit']:.1f}x by bytes, bar {bar:g} {verdict}",
            flush=True,
        )
        (options.out / "cpu_decode.json").write_text(
            json.dumps({"machine": describe_machine(), "rows": rows}, indent=1)
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
