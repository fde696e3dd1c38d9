"""Time the plain PyTorch kernels and dense attention on a CPU, with the limit that the FLOPs set.

    python -m benchmarks.cpu [--repeats 3] [--lengths 16384 65536] [--out out]

Prints a table, and writes cpu.json and cpu.png. A ratio is the median dense time divided by ours. Every round runs each
variant once, so a slowdown of the machine affects all variants. The limit is the ratio of the FLOPs that both need;
`share` is the ratio divided by the limit.
"""

import argparse
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import flexmsa
from benchmarks import cpu_plot
from flexmsa import AuxRequest


@dataclass(frozen=True)
class Shape:
    """Heads and sizes of one comparison; block_size 128, topk 16, batch 1, float32."""

    seqlen: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 128
    topk: int = 16

    @property
    def kept(self) -> int:
        """The number of keys that a query attends to."""
        return self.topk * self.block_size

    def flops(self) -> dict[str, float]:
        """FLOPs of each variant by the cost model of the paper; a backward costs 2.5 forwards."""
        dense = 2.0 * self.num_heads * self.head_dim * self.seqlen**2
        main = 4.0 * self.num_heads * self.head_dim * self.seqlen * self.kept
        select = 1.0 * self.num_kv_heads * self.head_dim * self.seqlen**2
        teacher = main / 2
        student = 3 * 2.0 * self.num_kv_heads * self.head_dim * self.seqlen * self.kept
        return {
            "dense forward": dense,
            "dense forward + backward": 3.5 * dense,
            "main branch forward": main,
            "layer forward": main + select,
            "layer forward + backward with KL": 3.5 * main + select + teacher + student,
        }


SHAPES = {
    16384: Shape(16384, num_heads=16, num_kv_heads=4, head_dim=128),
    65536: Shape(65536, num_heads=4, num_kv_heads=1, head_dim=64),
}
# The share of the limit that the project promises at least.
BARS = {"main branch forward": 0.5, "layer forward": 0.5, "layer forward + backward with KL": 0.35}
DENSE_OF = dict.fromkeys(BARS, "dense forward") | {"layer forward + backward with KL": "dense forward + backward"}


def make_variants(shape: Shape) -> dict[str, Callable[[], object]]:
    """Return the calls to time, by name."""
    generator = torch.Generator().manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(1, heads, shape.seqlen, shape.head_dim, generator=generator)

    q, k, v = random(shape.num_heads), random(shape.num_kv_heads), random(shape.num_kv_heads)
    index_q, index_k = random(shape.num_kv_heads), random(1)
    grad = random(shape.num_heads)
    settings = {"block_size": shape.block_size, "topk": shape.topk}
    ids = flexmsa.select_blocks(index_q, index_k, **settings)

    def dense() -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def dense_train() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out, leaves, grad)

    def train() -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v, index_q, index_k)]
        out, aux = flexmsa.attention(*leaves, **settings, return_aux=AuxRequest(index_loss=True))
        torch.autograd.grad((out, aux.index_loss), leaves, (grad, torch.ones(())))

    return {
        "dense forward": dense,
        "main branch forward": lambda: flexmsa.block_sparse_attention(q, k, v, ids, block_size=shape.block_size),
        "layer forward": lambda: flexmsa.attention(q, k, v, index_q, index_k, **settings),
        "dense forward + backward": dense_train,
        "layer forward + backward with KL": train,
    }


def measure(shape: Shape, repeats: int) -> dict[str, list[float]]:
    """Return each variant's seconds per round, after one warm-up of all variants on a short input."""
    for variant in make_variants(Shape(2048, shape.num_heads, shape.num_kv_heads, shape.head_dim)).values():
        variant()
    variants = make_variants(shape)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(repeats):
        for name, variant in variants.items():
            print(f"\r{shape.seqlen} tokens, round {number + 1} of {repeats}: {name:<40}", end="", flush=True)
            begin = time.perf_counter()
            variant()
            seconds[name].append(time.perf_counter() - begin)
    print("\r" + " " * 80 + "\r", end="")
    return seconds


def compare(shape: Shape, seconds: dict[str, list[float]]) -> list[dict]:
    """Return a row per variant of ours: its time, its ratio to dense, the limit, and the share of the limit."""
    flops = shape.flops()
    rows = []
    for name, bar in BARS.items():
        dense = DENSE_OF[name]
        ours, theirs = statistics.median(seconds[name]), statistics.median(seconds[dense])
        limit = flops[dense] / flops[name]
        heads = f"{shape.num_heads}/{shape.num_kv_heads}, D={shape.head_dim}"
        times = {"seconds": ours, "dense_seconds": theirs, "ratio": theirs / ours, "limit": limit}
        goal = {"share": theirs / ours / limit, "bar": bar}
        rounds = {"ours": seconds[name], "dense": seconds[dense]}
        rows.append({"seqlen": shape.seqlen, "heads": heads, "variant": name, **times, **goal, "rounds": rounds})
    return rows


def peak_memory(seqlen: int, variant: str) -> float:
    """Peak MiB of one variant beyond its inputs, measured in a new process."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_memory_here, (seqlen, variant))


def _peak_memory_here(seqlen: int, variant: str) -> float:
    make_variants(Shape(512, num_heads=4, num_kv_heads=1, head_dim=64))[variant]()
    run = make_variants(Shape(seqlen, num_heads=4, num_kv_heads=1, head_dim=64))[variant]
    before = _high_water()
    run()
    return _high_water() - before


def _high_water() -> float:
    """Peak MiB of this process, on Linux from /proc: getrusage starts with the peak of the parent process."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def describe_machine() -> dict:
    """The processor, threads and versions of the measurement."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    versions = {"torch": torch.__version__, "flexmsa": flexmsa.__version__}
    return {"cpu": model, "threads": torch.get_num_threads(), **versions}


def print_table(rows: list[dict]) -> None:
    columns = " {:>6} {:>12}  {:<33} {:>8} {:>8} {:>7} {:>7} {:>6}  {}"
    print(columns.format("tokens", "heads", "variant", "ours", "dense", "ratio", "limit", "share", "bar"))
    for row in rows:
        times = (f"{row[key]:.2f}s" for key in ("seconds", "dense_seconds"))
        ratios = (f"{row[key]:.2f}x" for key in ("ratio", "limit"))
        verdict = f"{row['bar']} {'reached' if row['share'] >= row['bar'] else 'MISSED'}"
        share = f"{row['share']:.2f}"
        print(columns.format(row["seqlen"], row["heads"], row["variant"], *times, *ratios, share, verdict))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="rounds (default 3, about 15 minutes on 2 cores)")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of cpu.json and cpu.png (default out)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, float32, block 128, topk 16")
    rows: list[dict] = []
    for seqlen in options.lengths:
        shape = SHAPES[seqlen]
        rows += compare(shape, measure(shape, options.repeats))
        result = {"machine": machine, "rows": rows}
        (options.out / "cpu.json").write_text(json.dumps(result, indent=1))
    print_table(rows)
    memory = {
        name: {seqlen: peak_memory(seqlen, name) for seqlen in (8192, 16384, 32768)}
        for name in ("layer forward", "layer forward + backward with KL")
    }
    print("\npeak memory beyond the inputs, 4/1 heads, D=64 (linear if it doubles with the length)")
    for name, by_length in memory.items():
        print(f"  {name:<33}", ", ".join(f"{n // 1024}K: {mib:.0f} MiB" for n, mib in by_length.items()))
    (options.out / "cpu.json").write_text(
        json.dumps({"machine": machine, "rows": rows, "memory_mib": memory}, indent=1)
    )
    try:
        cpu_plot.draw(rows, machine, options.out / "cpu.png")
    except ImportError:
        print("no picture: pip install flexmsa[plot]")
    print(f"written to {options.out}/")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
