"""The Triton kernels on a GPU: right first, then timed beside their floors.

    python -m benchmarks.gpu [--only PART ...] [--quick] [--sweep] [--out out/gpu]

Times are medians. Training and prefill: CUDA events round one call, before which memory is overwritten for some
milliseconds, so that the L2 cache holds none of it and the host is ahead. Decode: a CUDA graph of calls that take turns
on caches which together exceed the L2 cache, divided by the number of calls. Floors come from ceilings measured in the
same run: a bf16 product of 8192^3 and a device copy. With --only, the rows of these parts replace those in
OUT/gpu.json, and the others stay, each part with the machine and the ceilings of its own run.
"""

import argparse
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import gpu_peers, gpu_plot
from benchmarks.gpu_results import Results
from benchmarks.gpu_serving import FP8, chunk_calls, chunk_times, decode_times, serving_errors
from benchmarks.gpu_training import PATTERNS, flex_times, floors, prefill_times, training_errors, training_times
from flexmsa.kernels import tuning
from flexmsa.kernels.triton.selection import choose_config, select_blocks

GROUPS, GROUP_SIZE, DEPTH, BLOCK, TOPK = 4, 16, 128, 128, 16
SQUARE = [8192, 32768, 131072, 524288]
CHUNKS = [(338, 74578), (171, 55339), (1626, 93146), (16384, 47744)]
LAYERS = [8192, 16384, 32768, 131072, 524288]
FLT_MAX = torch.finfo(torch.float32).max


def plain(batch, seqlen_q, seqlen_k, device):
    """The table of sequences of an unpacked batch."""
    rows = [[b, 0, seqlen_q, 0, seqlen_k] for b in range(batch)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def dense_ids(index_q, index_k, sequences, block_size, topk, local, init, queries=None):
    """block_indices by the definition, in float64; only of the given queries, if any."""
    batch, groups, seqlen_q, _ = index_q.shape
    ids = torch.full((batch, groups, seqlen_q, topk), -1, dtype=torch.int32, device=index_q.device)
    for b, q_start, q_end, k_start, k_end in sequences.tolist():
        for i in range(q_start, q_end) if queries is None else queries:
            visible = k_end - k_start - q_end + i + 1
            if visible <= 0:
                continue
            blocks = -(-visible // block_size)
            keys = index_k[b, 0, k_start : k_start + visible].double()
            scores = (index_q[b, :, i].double() @ keys.T).nan_to_num(-FLT_MAX).clamp(-FLT_MAX, FLT_MAX)
            scores = F.pad(scores, (0, blocks * block_size - visible), value=-FLT_MAX)
            best = scores.view(groups, blocks, block_size).amax(-1)
            best[:, :init] = best[:, max(0, blocks - local) :] = float("inf")
            chosen = best.sort(descending=True, stable=True).indices[:, :topk].sort().values
            ids[b, :, i, : chosen.shape[1]] = chosen.int()
    return ids


SELECTIONS = [
    # B, Hkv, Sq, Sk, Di, block_size, topk, local, init
    (1, 4, 1000, 1000, 128, 128, 4, 1, 0),
    (2, 1, 700, 1500, 96, 64, 16, 2, 1),
    (1, 3, 65, 5000, 80, 48, 8, 1, 0),
    (2, 8, 300, 300, 64, 16, 3, 1, 2),
    (1, 2, 100, 3000, 256, 256, 2, 1, 0),
    (1, 16, 33, 2000, 16, 96, 40, 1, 0),
    (3, 4, 1, 20000, 128, 128, 16, 1, 0),
    (1, 4, 200, 6000, 128, 8, 64, 1, 0),
]


def integers(*shape, dtype, device="cuda"):
    """Small integers: their scores are exact in any order of summation, and often equal."""
    return torch.randint(-3, 4, shape, device=device).to(dtype)


def with_dtypes(shapes):
    """Every shape in bf16, the first two in fp16 and fp32 also."""
    return [*product(shapes, [torch.bfloat16]), *product(shapes[:2], [torch.float16, torch.float32])]


def selection_errors(device="cuda", cases=None):
    """Names of the selections that differ from the definition or from themselves, with and without a split."""
    for shape, dtype in cases or with_dtypes(SELECTIONS):
        batch, groups, seqlen_q, seqlen_k, depth = shape[:5]
        rules = shape[5:]
        index_q = integers(batch, groups, seqlen_q, depth, dtype=dtype, device=device)
        index_k = integers(batch, 1, seqlen_k, depth, dtype=dtype, device=device)
        sequences = plain(batch, seqlen_q, seqlen_k, device)
        config = choose_config(index_q, index_k, sequences, rules[0], rules[1])
        wanted = dense_ids(index_q, index_k, sequences, *rules)
        for splits in (config.num_splits, 1 if config.num_splits > 1 else 5):
            variant = replace(config, num_splits=splits)
            found = [select_blocks(index_q, index_k, sequences, *rules, config=variant) for _ in range(2)]
            if not all(torch.equal(ids, wanted) for ids in found):
                yield f"selection {shape} {dtype} {variant}: {int((found[0] != wanted).sum())} ids differ"


def packed_errors(device="cuda"):
    """Documents in one row, of which one has a single token; unused cache slots hold NaN."""
    lengths = torch.tensor([1, 700, 3, 1300, 44])
    ends = lengths.cumsum(0)
    table = torch.stack([0 * ends, ends - lengths, ends, ends - lengths + 9, ends + 9], 1)
    sequences = table.to(device, torch.int32)
    total = int(ends[-1])
    index_q = integers(1, 4, total, 128, dtype=torch.bfloat16, device=device)
    index_k = integers(1, 1, total + 50, 128, dtype=torch.bfloat16, device=device)
    index_k[:, :, :9] = index_k[:, :, total + 9 :] = float("nan")
    wanted = dense_ids(index_q, index_k, sequences, 64, 4, 1, 0)
    if not torch.equal(select_blocks(index_q, index_k, sequences, 64, 4, 1, 0), wanted):
        yield "selection of packed documents"


def large_errors():
    """Spot checks where offsets and tile counts are large, and by e4m3 queries and keys, at M3's shape."""
    shapes = [(131072, 131072), *CHUNKS, (1, 1 << 20)]
    cases = [*product(shapes, [torch.bfloat16]), *product([(1000, 1000), (20000, 20000), (40, 3000)], [FP8])]
    for (seqlen_q, seqlen_k), dtype in cases:
        index_q, index_k, sequences = index_inputs(1, seqlen_q, seqlen_k, integers)
        queries = sorted({0, seqlen_q // 3, seqlen_q // 2, max(0, seqlen_q - 130), seqlen_q - 1})
        found = select_blocks(index_q.to(dtype), index_k.to(dtype), sequences, BLOCK, TOPK, 1, 0)
        wanted = dense_ids(index_q, index_k, sequences, BLOCK, TOPK, 1, 0, queries)
        if not torch.equal(found[:, :, queries], wanted[:, :, queries]):
            yield f"selection of {seqlen_q} queries over {seqlen_k} keys, {dtype}"


def normals(*shape, dtype):
    return torch.randn(shape, device="cuda", dtype=dtype)


def index_inputs(batch, seqlen_q, seqlen_k, draw=normals) -> tuple[Tensor, Tensor, Tensor]:
    """index_q, index_k and sequences at M3's shape."""
    index_q = draw(batch, GROUPS, seqlen_q, DEPTH, dtype=torch.bfloat16)
    index_k = draw(batch, 1, seqlen_k, DEPTH, dtype=torch.bfloat16)
    return index_q, index_k, plain(batch, seqlen_q, seqlen_k, "cuda")


# The host needs some milliseconds for the launches of a backward.
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
    a, b = normals(8192, 8192, dtype=torch.bfloat16), normals(8192, 8192, dtype=torch.bfloat16)
    flops = 2 * 8192**3 / (event_time(lambda: a @ b) * 1e-3)
    source = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / (event_time(lambda: target.copy_(source)) * 1e-3)
    return flops, bandwidth


def selection_floor(seqlen_q, seqlen_k, flops):
    """Milliseconds of the score products alone."""
    pairs = seqlen_q * seqlen_k - seqlen_q * (seqlen_q - 1) // 2
    return 2 * GROUPS * DEPTH * pairs / flops * 1e3


def time_selection(seqlen_q, seqlen_k, config=None, dtype=torch.bfloat16):
    index_q, index_k, sequences = index_inputs(1, seqlen_q, seqlen_k)
    index_q, index_k = index_q.to(dtype), index_k.to(dtype)
    repeats = 3 if seqlen_q > 200_000 else 20
    return event_time(
        lambda: select_blocks(index_q, index_k, sequences, BLOCK, TOPK, 1, 0, config=config), repeats=repeats
    )


def sweep(report):
    """Selection with other tiles, warps and stages, and with blocks ranked several at a time."""
    variants: dict[str, dict] = {
        "default": {},
        **{f"whole rows, period {p}": {"halves": False, "period": p} for p in (1, 4, 8, 16)},
        **{f"stages {s}": {"num_stages": s} for s in (2, 4)},
        "pointer loads": {"use_tma": False},
        "256 rows, 16 warps": {"num_warps": 16},
        "128 rows, 8 warps": {"rows": 128},
        "128 rows, 4 warps, 2 stages": {"rows": 128, "num_warps": 4, "num_stages": 2},
        "512 rows, 16 warps, 2 stages": {"rows": 512, "num_warps": 16, "num_stages": 2},
    }
    for seqlen in (32768, 131072):
        index_q, index_k, sequences = index_inputs(1, seqlen, seqlen)
        base = choose_config(index_q, index_k, sequences, BLOCK, TOPK)
        for name, change in variants.items():
            try:
                time = time_selection(seqlen, seqlen, replace(base, **change))
            except Exception as error:  # a variant may not fit the GPU: say so and go on
                time = f"{type(error).__name__}: {str(error)[:80]}"
            report(f"sweep {seqlen}, {name}", time)


def environment():
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Run:
    """Where a part's rows go, the ceilings that its floors come from, and how much to time."""

    report: Callable[..., None]
    flops: float
    bandwidth: float
    quick: bool
    sweep: bool


def time_selections(run: Run) -> None:
    if run.sweep:
        sweep(run.report)
    for seqlen_q, seqlen_k in [(s, s) for s in SQUARE if not (run.quick and s > 200_000)] + CHUNKS:
        config = choose_config(*index_inputs(1, seqlen_q, seqlen_k), BLOCK, TOPK)
        floor = selection_floor(seqlen_q, seqlen_k, run.flops)
        time = time_selection(seqlen_q, seqlen_k)
        run.report(f"selection {seqlen_q} x {seqlen_k}", time, floor, config=asdict(config))
        run.report(f"selection e4m3 {seqlen_q} x {seqlen_k}", time_selection(seqlen_q, seqlen_k, dtype=FP8), floor / 2)


def time_decoding(run: Run) -> None:
    for name, time, floor in decode_times(run.bandwidth, quick=run.quick):
        run.report(f"decode {name}", time, floor)


def time_chunks(run: Run) -> None:
    for name, time in chunk_times(event_time):
        run.report(f"chunk {name}", time)


def time_training(run: Run) -> None:
    for seqlen in LAYERS[:1] if run.quick else LAYERS:
        for name, floor in floors(seqlen, run.flops, run.bandwidth).items():
            run.report(f"floor {seqlen}: {name}", floor)
        timer = partial(event_time, repeats=20 if seqlen < 100_000 else 5)
        dense_timer = partial(event_time, repeats=1, warm_up=False) if seqlen > 200_000 else timer
        for name, time in training_times(seqlen, timer, dense_timer, launch_time, list(PATTERNS)):
            run.report(f"layer {seqlen}: {name}", time)


def time_prefill(run: Run) -> None:
    once = partial(event_time, repeats=1, warm_up=False)
    for name, time in prefill_times(1 << 20, once, ["random", "neighbours share"]):
        run.report(f"prefill {1 << 20}: {name}", time)


def time_flex(run: Run) -> None:
    for name, time in flex_times(32768, event_time, ["random", "neighbours share"]):
        run.report(f"layer 32768: {name}", time)


def time_peers(run: Run) -> None:
    nsa = gpu_peers.parallel_nsa()
    for seqlen in gpu_peers.LENGTHS[:1] if run.quick else gpu_peers.LENGTHS:
        timer = partial(event_time, repeats=20 if seqlen < 100_000 else 5)
        for name, time in gpu_peers.peer_times(seqlen, timer, nsa):
            run.report(f"peers {seqlen}: {name}", time)


SELECTION_CHECKS = (selection_errors, packed_errors, large_errors)
# What times a part, and what has to be right before it does.
PARTS: dict[str, tuple[Callable[[Run], None], tuple[Callable[[], Iterator[str]], ...]]] = {
    "selection": (time_selections, SELECTION_CHECKS),
    "decode": (time_decoding, (serving_errors,)),
    "chunks": (time_chunks, (serving_errors,)),
    "training": (time_training, (training_errors,)),
    "prefill": (time_prefill, (*SELECTION_CHECKS, training_errors)),
    "flex": (time_flex, (training_errors,)),
    "peers": (time_peers, (training_errors,)),
}
QUICK = ("selection", "decode", "chunks", "training")


def check(parts: list[str]) -> bool:
    """Print what is wrong with what the parts time; True if nothing is."""
    torch.manual_seed(0)
    checks = dict.fromkeys(errors for part in parts for errors in PARTS[part][1])
    errors = [error for found in checks for error in found()]
    print("\n".join(errors) if errors else "correct", flush=True)
    return not errors


def report(results: Results, part: str, name: str, milliseconds, floor=None, **more) -> None:
    """Keep a row and print it; a string in place of the time says why there is none."""
    results.add(part, {"name": name, "ms": milliseconds, "floor_ms": floor, **more})
    shown = milliseconds if isinstance(milliseconds, str) or milliseconds is None else f"{milliseconds:10.4f}"
    print(f"{name:42} {shown} {'' if floor is None else f'floor {floor:10.4f}'}", flush=True)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the parts to run in their order."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="for gpu.json and gpu.png (default out/gpu)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--sweep", action="store_true", help="in the part selection, time other configurations too")
    parser.add_argument("--quick", action="store_true", help=f"shorter lengths, and by default {', '.join(QUICK)} only")
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
