"""Serving and dense attention on a GPU: a part of `benchmarks/gpu.py`, checked by `gpu_serving_checks`.

A decoding step, selection from a whole cache and attention to the chosen blocks, is timed in a CUDA graph. The calls in
a graph use in turn caches that together exceed the L2 cache. M3's shape: 64 query heads, 4 KV heads, head dim 128,
blocks of 128 keys, topk 16, bf16 queries.
"""

from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import flexmsa
from benchmarks.gpu_training import BLOCK, DEPTH, GROUPS, HEADS, TOPK, Timer
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton import attend_blocks, select_and_attend, select_blocks

RULE = SelectionRule(BLOCK, TOPK)
SCALE = DEPTH**-0.5
FP8 = torch.float8_e4m3fn
# How index keys are kept, and the bytes of one.
INDEX_KEYS = {"bf16": (torch.bfloat16, 2 * DEPTH), "e4m3": (FP8, DEPTH + 1), "int8": (torch.int8, DEPTH + 4)}
# The shapes with a promised speed, then the grid of workloads.json; batch, keys, new tokens.
STEPS = [(1, 131072, 1), (1, 1 << 20, 1), (4, 1 << 20, 1), (8, 131072, 1), (16, 131072, 1)]
# Many short sequences, where a step reads mostly keys and values: batch, keys.
SHORT = [(16, 32768), (64, 16384)]
GRID = [
    (batch, keys, tokens)
    for batch in (1, 8, 32, 128)
    for keys in (4000, 10000, 50000, 100000, 200000, 1000000)
    for tokens in (1, 4, 8)
    if batch * keys <= 16_000_000
]
# Prefill calls of workloads.json: queries, keys after the append, number of such calls in production.
CHUNKS = [
    (16384, 47744, 2477),
    (338, 74578, 1418),
    (16384, 84480, 1347),
    (171, 55339, 1325),
    (1626, 93146, 565),
    (1404, 46844, 492),
    (347, 131547, 312),
    (9844, 48884, 110),
    (16384, 173824, 35),
]


def captured(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of the calls, which run once before it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def graph_time(calls: list[Callable[[], object]], repeats: int = 30) -> float:
    """Median milliseconds per call in a CUDA graph that repeats the calls until it has at least 8.

    With a single call, the launch time of the graph would matter.
    """
    calls = calls * -(-8 // len(calls))
    graph = captured(calls)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / len(calls))
    return median(times)


Step = tuple[Tensor, Tensor]


def caches(
    batch: int,
    keys: int,
    tokens: int,
    index_dtype: torch.dtype,
    copies: int | None = None,
    spread: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
) -> list[tuple[Step, flexmsa.MSACache]]:
    """Full caches that together exceed the L2 cache, with (q, index_q); rows are shorter by a share up to `spread`."""
    if copies is None:
        copies = min(64, max(1, -(-(300 << 20) // (batch * keys * DEPTH * index_dtype.itemsize))))
    made = []
    for _ in range(copies):
        cache = flexmsa.MSACache(batch, GROUPS, DEPTH, DEPTH, keys, dtype=dtype, index_dtype=index_dtype, device="cuda")
        for stored, scale in ((cache.k, cache.k_scale), (cache.v, cache.v_scale), (cache.index_k, cache.index_k_scale)):
            if scale is None:
                stored.normal_()
            elif stored.dtype == torch.int8:
                stored.copy_(torch.randn(stored.shape, dtype=torch.bfloat16, device="cuda").mul_(40).clamp_(-127, 127))
                scale.fill_(1 / 40)
            else:
                stored.copy_(torch.randn(stored.shape, dtype=torch.bfloat16, device="cuda").mul_(100).clamp_(-448, 448))
                scale.fill_(120)  # 2^-7
        cache.kv_lens.copy_((keys * (1 - spread * torch.rand(batch, device="cuda"))).int())
        q = torch.randn(batch, HEADS, tokens, DEPTH, dtype=torch.bfloat16, device="cuda")
        index_q = torch.randn(batch, GROUPS, tokens, DEPTH, dtype=torch.bfloat16, device="cuda")
        made.append(((q, index_q), cache))
    return made


def select(new: Step, cache: flexmsa.MSACache, sequences: Tensor | None = None) -> Tensor:
    sequences = cache.newest(new[1].shape[2]) if sequences is None else sequences
    return select_blocks(new[1], cache.index_k, sequences, RULE, None, cache.index_k_scale)


def step(new: Step, cache: flexmsa.MSACache, sequences: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    q, index_q = new
    sequences = cache.newest(q.shape[2]) if sequences is None else sequences
    branches = q, index_q, cache.k, cache.v, cache.index_k, sequences
    return select_and_attend(*branches, RULE, SCALE, None, cache.k_scale, cache.v_scale, cache.index_k_scale)


def time_step(
    batch: int,
    keys: int,
    tokens: int,
    index_dtype: torch.dtype,
    spread: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, float]:
    """Milliseconds of a step and of its two parts."""
    filled = caches(batch, keys, tokens, index_dtype, None, spread, dtype)
    made = [(new, cache, cache.newest(tokens)) for new, cache in filled]
    ids = select(*made[0])

    def attend(new: Step, cache: flexmsa.MSACache, sequences: Tensor, ids: Tensor) -> None:
        scales = None, cache.k_scale, cache.v_scale
        attend_blocks(new[0], cache.k, cache.v, ids, sequences, BLOCK, SCALE, *scales)

    return {
        "step": graph_time([lambda each=each: step(*each) for each in made]),
        "selection": graph_time([lambda each=each: select(*each) for each in made]),
        "attention": graph_time([lambda each=each: attend(*each, ids) for each in made]),
    }


def dense_step(batch: int, keys: int) -> dict[str, float | None]:
    """Milliseconds of dense attention of one new token, by backend; None if the backend raises an error.

    FlexAttention uses its kernel for few queries, FlashDecoding, which splits the keys between programs.
    """
    q = torch.randn(batch, HEADS, 1, DEPTH, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(batch, GROUPS, keys, DEPTH, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    times: dict[str, float | None] = {}
    for name, backend in {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}.items():
        try:
            with sdpa_kernel(backend):
                times[name] = graph_time([lambda: scaled_dot_product_attention(q, k, v, enable_gqa=True)])
        except RuntimeError:
            times[name] = None
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    mask = create_block_mask(lambda b, h, query, key: key >= 0, None, None, 1, keys, device="cuda")
    try:
        times["flex"] = graph_time([lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)])
    except RuntimeError:
        times["flex"] = None
    return times


def read_time(size: int) -> float:
    """Milliseconds of summing `size` bytes, the simplest read, in a graph that also uses several buffers in turn."""
    buffers = [torch.ones(size // 4, device="cuda") for _ in range(max(2, (300 << 20) // size))]
    return graph_time([lambda x=x: x.sum() for x in buffers])


def step_bytes(batch: int, keys: int, tokens: int, index_bytes: float) -> float:
    """Bytes that a step must read: every index key once, and the chosen keys and values of each token and group."""
    chosen = 2 * GROUPS * min(keys, TOPK * BLOCK) * DEPTH * 2
    return batch * (keys * index_bytes + tokens * chosen)


def decode_times(bandwidth: float, quick: bool = False) -> Iterator[tuple[str, float | None, float | None]]:
    """(name, milliseconds, floor in milliseconds) of decoding steps."""
    for size in (256 << 20, 128 << 20):
        yield f"plain read of {size >> 20} MiB", read_time(size), size / bandwidth * 1e3
    for batch, keys, tokens in STEPS:
        for name, (dtype, width) in INDEX_KEYS.items():
            floor = step_bytes(batch, keys, tokens, width) / bandwidth * 1e3
            for part, time in time_step(batch, keys, tokens, dtype).items():
                yield f"{batch} x {keys}: {name} {part}", time, floor if part == "step" else None
        for name, dense in dense_step(batch, keys).items():
            yield f"{batch} x {keys}: dense {name}", dense, None
    for batch, keys in SHORT:
        for name, dtype in (("bf16", torch.bfloat16), ("e4m3", FP8)):
            times = time_step(batch, keys, 1, FP8, dtype=dtype)
            for part in ("step", "attention"):
                yield f"{batch} x {keys}: {part}, keys and values in {name}", times[part], None
    for batch, keys, tokens in [] if quick else GRID:
        # Rows are up to a fifth shorter than `keys`, on average a tenth.
        floor = step_bytes(batch, int(keys * 0.9), tokens, 2 * DEPTH) / bandwidth * 1e3
        yield f"{batch} x {keys} x {tokens}: step", time_step(batch, keys, tokens, torch.bfloat16, 0.2)["step"], floor


def chunk_times(timer: Timer) -> Iterator[tuple[str, float]]:
    """(name, milliseconds) of chunks of a prompt behind a cached prefix, and of dense attention."""
    for tokens, keys, _ in CHUNKS:
        ((q, index_q), cache) = caches(1, keys, tokens, torch.bfloat16, copies=1)[0]
        sequences = cache.newest(tokens)
        k, v, mask = cache.k, cache.v, causal_lower_right(tokens, keys)

        def ours(new: Step = (q, index_q), cache: flexmsa.MSACache = cache, sequences: Tensor = sequences) -> None:
            attend_blocks(new[0], cache.k, cache.v, select(new, cache, sequences), sequences, BLOCK, SCALE)

        yield f"{tokens} x {keys}: selection and attention", timer(ours)
        dense = partial(scaled_dot_product_attention, q, k, v, attn_mask=mask, enable_gqa=True)
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            yield f"{tokens} x {keys}: dense", timer(dense)


def chunk_calls() -> dict[str, dict[str, int]]:
    """The number of production calls that each chunk represents, by its name in `chunk_times`."""
    return {f"{tokens} x {keys}": {"calls": calls} for tokens, keys, calls in CHUNKS}
