"""Time a decoding step and dense attention to the whole cache on a CPU: `python -m benchmarks.cpu_decode`.

One new token, batch 1, 64 query heads, 4 KV heads, head dim 128, blocks of 128 keys, topk 16. The steps of a round use
the caches of several layers in turn, as in a model, and so does dense attention: 4 GB of keys and values, so that no
step finds its index keys in the processor's cache. Dense is the faster of scaled_dot_product_attention(enable_gqa=True)
and the same call on q packed by group, [B, Hkv, G, D]. Times are medians over rounds. The limit is the ratio of the
bytes that both must read. The benchmark needs 6 GB of memory.
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
KV_BYTES = 2**32
FP8 = torch.float8_e4m3fn
# Keys, dtype, dtype of the index keys, the ratio that the project promises at least.
CASES = [
    (131072, torch.float32, torch.float32, 5.0),
    (524288, torch.float32, torch.float32, 6.0),
    (131072, torch.bfloat16, torch.bfloat16, 8.0),
    (131072, torch.bfloat16, FP8, 8.0),
    (131072, torch.bfloat16, torch.int8, 8.0),
]
# Bytes of a scale beside index keys of these dtypes.
SCALES = {FP8: 1, torch.int8: 4}


def filled(keys: int, dtype: torch.dtype, index_dtype: torch.dtype, layers: int) -> list[flexmsa.MSACache]:
    """Full caches whose last append was of one key, as before a decoding step."""
    caches = [
        flexmsa.MSACache(1, GROUPS, DEPTH, DEPTH, keys, dtype=dtype, index_dtype=index_dtype) for _ in range(layers)
    ]
    for chunk in (*torch.arange(keys - 1).split(16384), torch.arange(1)):
        new = [torch.randn(1, heads, len(chunk), DEPTH, dtype=dtype) for heads in (GROUPS, GROUPS, 1)]
        for cache in caches:
            cache.append(*new)
    return caches


def measure(keys: int, dtype: torch.dtype, index_dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds of each variant."""
    layers = KV_BYTES // (2 * GROUPS * keys * DEPTH * dtype.itemsize)
    caches = filled(keys, dtype, index_dtype, layers)
    q = torch.randn(1, HEADS, 1, DEPTH, dtype=dtype)
    packed = q.view(1, GROUPS, HEADS // GROUPS, DEPTH)
    index_q = torch.randn(1, GROUPS, 1, DEPTH, dtype=dtype)
    variants = {
        "step": lambda cache: flexmsa.decode(q, cache, index_q),
        "packed": lambda cache: scaled_dot_product_attention(packed, cache.k, cache.v),
    }
    # Ten times slower than the packed call, so a single call shows which of the two is faster.
    begin = perf_counter()
    scaled_dot_product_attention(q, caches[0].k, caches[0].v, enable_gqa=True)
    seconds = {"enable_gqa": [perf_counter() - begin], **{name: [] for name in variants}}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            for cache in caches:
                begin = perf_counter()
                variant(cache)
                if number > 0:
                    seconds[name].append(perf_counter() - begin)
    return {name: median(times) for name, times in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_decode", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of cpu_decode.json (default out)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    rows = []
    for keys, dtype, index_dtype, bar in CASES:
        with torch.no_grad():
            seconds = measure(keys, dtype, index_dtype, options.rounds)
        dense = min(seconds["packed"], seconds["enable_gqa"])
        itemsize = dtype.itemsize
        least = (
            keys * (DEPTH * index_dtype.itemsize + SCALES.get(index_dtype, 0)) + 2 * GROUPS * CHOSEN * DEPTH * itemsize
        )
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
