"""The selection on a GPU: a part of `benchmarks/gpu.py`.

It is compared with its definition in float64, on integers, whose scores are exact in any order of summation. Then it is
timed at M3's shape; the floor is the time of the score products alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_serving import FP8
from benchmarks.gpu_training import BLOCK, DEPTH, GROUPS, TOPK
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.selection.launch import choose_config, select_blocks

SQUARE = [8192, 32768, 131072, 524288]
CHUNKS = [(338, 74578), (171, 55339), (1626, 93146), (16384, 47744)]
FLT_MAX = torch.finfo(torch.float32).max


def plain(batch, seqlen_q, seqlen_k, device):
    """The table of sequences of an unpacked batch."""
    rows = [[b, 0, seqlen_q, 0, seqlen_k] for b in range(batch)]
    return torch.tensor(rows, dtype=torch.int32, device=device)


def dense_ids(index_q, index_k, sequences, rule, queries=None):
    """block_indices by the definition, in float64, for all queries or the given ones."""
    block_size, topk = rule.block_size, rule.topk
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
            best[:, rule.is_forced(torch.arange(blocks, device=best.device), blocks - 1)] = float("inf")
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
    (1, 2, 3, 20000, 64, 16, 100, 1, 0),
]


def integers(*shape, dtype, device="cuda"):
    """Small integers, whose scores are exact in any order of summation, and often equal."""
    return torch.randint(-3, 4, shape, device=device).to(dtype)


def with_dtypes(shapes):
    """Every shape in bf16, and the first two also in fp16 and fp32."""
    return [*product(shapes, [torch.bfloat16]), *product(shapes[:2], [torch.float16, torch.float32])]


def selection_errors(device="cuda", cases=None):
    """The selections that differ from the definition or between two runs, with and without a split."""
    for shape, dtype in cases or with_dtypes(SELECTIONS):
        batch, groups, seqlen_q, seqlen_k, depth = shape[:5]
        rule = SelectionRule(*shape[5:])
        index_q = integers(batch, groups, seqlen_q, depth, dtype=dtype, device=device)
        index_k = integers(batch, 1, seqlen_k, depth, dtype=dtype, device=device)
        sequences = plain(batch, seqlen_q, seqlen_k, device)
        config = choose_config(index_q, index_k, sequences, rule)
        wanted = dense_ids(index_q, index_k, sequences, rule)
        for splits in (config.num_splits, 1 if config.num_splits > 1 else 5):
            variant = replace(config, num_splits=splits)
            found = [select_blocks(index_q, index_k, sequences, rule, config=variant) for _ in range(2)]
            if not all(torch.equal(ids, wanted) for ids in found):
                yield f"selection {shape} {dtype} {variant}: {int((found[0] != wanted).sum())} ids differ"


def packed_errors(device="cuda"):
    """Documents in one row, one of them a single token; NaN in unused positions of the cache."""
    lengths = torch.tensor([1, 700, 3, 1300, 44])
    ends = lengths.cumsum(0)
    table = torch.stack([0 * ends, ends - lengths, ends, ends - lengths + 9, ends + 9], 1)
    sequences = table.to(device, torch.int32)
    total = int(ends[-1])
    index_q = integers(1, 4, total, 128, dtype=torch.bfloat16, device=device)
    index_k = integers(1, 1, total + 50, 128, dtype=torch.bfloat16, device=device)
    index_k[:, :, :9] = index_k[:, :, total + 9 :] = float("nan")
    wanted = dense_ids(index_q, index_k, sequences, SelectionRule(64, 4))
    if not torch.equal(select_blocks(index_q, index_k, sequences, SelectionRule(64, 4)), wanted):
        yield "selection of packed documents"


def large_errors():
    """Spot checks of large offsets and tile counts, and of e4m3 queries and keys, at M3's shape."""
    shapes = [(131072, 131072), *CHUNKS, (1, 1 << 20)]
    cases = [*product(shapes, [torch.bfloat16]), *product([(1000, 1000), (20000, 20000), (40, 3000)], [FP8])]
    for (seqlen_q, seqlen_k), dtype in cases:
        index_q, index_k, sequences = index_inputs(1, seqlen_q, seqlen_k, integers)
        queries = sorted({0, seqlen_q // 3, seqlen_q // 2, max(0, seqlen_q - 130), seqlen_q - 1})
        found = select_blocks(index_q.to(dtype), index_k.to(dtype), sequences, SelectionRule(BLOCK, TOPK))
        wanted = dense_ids(index_q, index_k, sequences, SelectionRule(BLOCK, TOPK), queries)
        if not torch.equal(found[:, :, queries], wanted[:, :, queries]):
            yield f"selection of {seqlen_q} queries over {seqlen_k} keys, {dtype}"


def normals(*shape, dtype):
    return torch.randn(shape, device="cuda", dtype=dtype)


def index_inputs(batch, seqlen_q, seqlen_k, draw=normals) -> tuple[Tensor, Tensor, Tensor]:
    """index_q, index_k and sequences at M3's shape."""
    index_q = draw(batch, GROUPS, seqlen_q, DEPTH, dtype=torch.bfloat16)
    index_k = draw(batch, 1, seqlen_k, DEPTH, dtype=torch.bfloat16)
    return index_q, index_k, plain(batch, seqlen_q, seqlen_k, "cuda")


def selection_floor(seqlen_q: int, seqlen_k: int, flops: float) -> float:
    """Milliseconds of the score products alone."""
    pairs = seqlen_q * seqlen_k - seqlen_q * (seqlen_q - 1) // 2
    return 2 * GROUPS * DEPTH * pairs / flops * 1e3


def selection_time(
    timer: Callable[..., float], index_q: Tensor, index_k: Tensor, sequences: Tensor, config=None
) -> float:
    """Milliseconds of one selection."""
    call = partial(select_blocks, index_q, index_k, sequences, SelectionRule(BLOCK, TOPK), config=config)
    return timer(call, repeats=3 if index_q.shape[2] > 200_000 else 20)


def selection_times(
    timer: Callable[..., float], flops: float, quick: bool
) -> Iterator[tuple[str, float, float, dict[str, object]]]:
    """(name, milliseconds, floor in milliseconds, configuration of the launch)."""
    for seqlen_q, seqlen_k in [(s, s) for s in SQUARE if not (quick and s > 200_000)] + CHUNKS:
        floor = selection_floor(seqlen_q, seqlen_k, flops)
        index_q, index_k, sequences = index_inputs(1, seqlen_q, seqlen_k)
        for label, dtype, share in (("", torch.bfloat16, 1.0), ("e4m3 ", FP8, 0.5)):
            inputs = index_q.to(dtype), index_k.to(dtype), sequences
            config = choose_config(*inputs, SelectionRule(BLOCK, TOPK))
            time = selection_time(timer, *inputs)
            share = 0.5 if config.certified else share
            yield f"{label}{seqlen_q} x {seqlen_k}", time, floor * share, asdict(config)


def sweep_times(timer: Callable[..., float]) -> Iterator[tuple[str, float | str]]:
    """Times of the selection with other tiles, warps and stages, and with several blocks per update of the top-k."""
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
        inputs = index_inputs(1, seqlen, seqlen)
        base = replace(choose_config(*inputs, SelectionRule(BLOCK, TOPK)), certified=False)
        for name, change in variants.items():
            try:
                time = selection_time(timer, *inputs, config=replace(base, **change))
            except Exception as error:  # a variant may not fit the GPU: report it and continue
                time = f"{type(error).__name__}: {str(error)[:80]}"
            yield f"{seqlen}, {name}", time
