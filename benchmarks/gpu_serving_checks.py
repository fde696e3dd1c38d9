"""Checks of serving on a GPU before it is timed: a part of `benchmarks/gpu.py`.

Schedules of operations on caches; decoding steps with large offsets, at the same time, and with empty rows.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_serving import BLOCK, DEPTH, FP8, GROUPS, RULE, SCALE, TOPK, caches, select, step
from flexmsa.kernels.triton import select_blocks
from flexmsa.kernels.triton.selection.work_counters import work_counters
from flexmsa.kernels.triton.serving import launch as decode
from flexmsa.testing import Schedule, check_schedule

SCHEDULES = [
    Schedule((("append", (100, 37)), ("append", (1, 1)), ("trim", (0, 3)), ("append", (4, 0)), ("append", (1, 1)))),
    # batch, Hkv, G, D, Di, block_size, topk, initial blocks, capacity
    Schedule(
        (("append", (300, 150)), ("reorder", (1, 1)), ("append", (16, 5)), ("append", (1, 1))),
        *(2, 4, 16, 128, 128, 32, 5, 0, 512),
    ),
    Schedule(
        (("append", (700, 0)), ("share", (0, 1)), ("append", (1, 1)), ("append", (8, 8))),
        *(2, 2, 5, 80, 96, 48, 4, 0, 800),
    ),
    Schedule(
        (("append", (900, 880, 3)), ("append", (1, 1, 1)), ("append", (2, 0, 2))), 3, 1, 1, 64, 64, 128, 2, 0, 1024
    ),
    # Shapes of the Hopper kernel, with many splits.
    Schedule(
        (
            *(("append", (2400, 1300)), ("append", (1, 1)), ("append", (4, 2)), ("trim", (130, 0))),
            *(("append", (16, 16)), ("share", (0, 1)), ("append", (1, 1))),
        ),
        *(2, 4, 16, 128, 128, 128, 5, 0, 3072),
    ),
    Schedule(
        (("append", (2000, 0, 63)), ("append", (1, 1, 1)), ("append", (3, 0, 3))), 3, 3, 8, 128, 128, 64, 16, 0, 2048
    ),
]


def serving_errors() -> Iterator[str]:
    """The errors of caches, appends and decoding."""
    for few_rows in (decode.FEW_ROWS, 0):
        # Beyond this number of rows, chunks of a prompt use other kernels.
        with mock.patch.object(decode, "FEW_ROWS", few_rows):
            yield from schedule_errors(
                SCHEDULES,
                {"dtype": "bfloat16"},
                {"dtype": "float16", "paged": True},
                {"dtype": "bfloat16", "paged": True, "index_dtype": "float8_e4m3fn"},
                {"dtype": "bfloat16", "index_dtype": "float8_e4m3fn", "fp8_keys": True},
                {"dtype": "bfloat16", "index_dtype": "int8"},
                {"dtype": "float16", "paged": True, "index_dtype": "int8", "fp8_keys": True},
            )
    # The plain PyTorch kernels, the default on devices without Triton.
    formats = {"dtype": "bfloat16"}, {"dtype": "bfloat16", "paged": True}, {"dtype": "float32", "fp8_keys": True}
    yield from schedule_errors(SCHEDULES[:3], *formats, backend="torch")
    yield from long_errors()
    yield from counter_errors()
    yield from overlapping_errors()


def schedule_errors(schedules: list[Schedule], *formats: dict[str, Any], backend: str | None = None) -> Iterator[str]:
    """The errors of the schedules with caches of these formats."""
    for schedule, changes in product(schedules, formats):
        try:
            check_schedule(replace(schedule, **changes), "cuda", backend)
        except AssertionError as error:
            yield f"serving, backend {backend}, {changes}: {error}"


def long_errors() -> Iterator[str]:
    """Steps at M3's shape over a million keys, against dense attention in float64."""
    for dtype, tokens in product((torch.bfloat16, FP8, torch.int8), (1, 4, 16)):
        (q, index_q), cache = caches(1, 1 << 20, tokens, dtype, copies=1)[0]
        # Small integers, whose products are exact in any order.
        index_q.copy_(torch.randint(-3, 4, index_q.shape, device="cuda"))
        index_q[..., 5] = 127  # so that int8 holds the other numbers
        cache.index_k.copy_(torch.randint(-3, 4, cache.index_k.shape, device="cuda"))
        if cache.index_k_scale is not None:
            cache.index_k_scale.fill_(1 if dtype == torch.int8 else 127)  # 1, or its code
        name = f"{tokens} tokens, a million keys, {dtype}"
        out, _, ids = step((q, index_q), cache)
        if not torch.equal(ids, select((q, index_q), cache)):
            yield f"{name}: the selection alone differs"
        if not all(map(torch.equal, (out, ids), step((q, index_q), cache)[::2])):
            yield f"{name}: not repeatable"
        index_k = cache.index_k.double() if cache.index_k_scale is None else cache.contiguous()[2].double()
        for token, group in product(range(tokens), range(GROUPS)):
            scores = (index_k[0, 0] @ index_q[0, group, token].double()).view(-1, BLOCK).amax(-1)
            scores[-1] = torch.inf
            wanted = scores.sort(descending=True, stable=True).indices[:TOPK].sort().values
            if not torch.equal(ids[0, group, token].long(), wanted):
                yield f"{name}, {token}, {group}: {int((ids[0, group, token] != wanted).sum())} ids differ"
            k, v = (x[0, group].view(-1, BLOCK, DEPTH)[wanted].flatten(0, 1).double() for x in (cache.k, cache.v))
            seen = len(k) - tokens + 1 + token
            heads = slice(group * 16, group * 16 + 16)
            right = (q[0, heads, token].double() @ k[:seen].T * SCALE).softmax(-1) @ v[:seen]
            error = (out[0, heads, token].double() - right).abs().max().item()
            if error > 8 * torch.finfo(torch.bfloat16).eps * right.abs().max().item():
                yield f"{name}, {token}, {group}: off by {error:.1e}"


def counter_errors() -> Iterator[str]:
    """Steps with more sequences than multiprocessors, some of them empty, must leave all work counters at zero."""
    ((q, index_q), cache) = caches(300, 4096, 1, torch.bfloat16, copies=1)[0]
    cache.kv_lens[::7] = 0
    ids = select((q, index_q), cache)
    for row in (0, 8, 299):
        one, sequences = slice(row, row + 1), cache.newest(1)[row : row + 1].clone()
        sequences[:, 0] = 0
        if not torch.equal(select_blocks(index_q[one], cache.index_k[one], sequences, RULE), ids[one]):
            yield f"row {row} of many: the selection differs from that of the row alone"
    if any(work_counters(number, ids.device).any() for number in (1, 300)):
        yield "counters are not left at zero"


def overlapping_errors() -> Iterator[str]:
    """Steps on one cache at the same time: in two captured graphs, and without a graph on a third stream."""
    made = caches(2, 100000, 1, torch.bfloat16, copies=3)
    news, cache = [new for new, _ in made], made[0][1]
    wanted = [step(new, cache) for new in news]
    streams = [torch.cuda.Stream() for _ in news]
    graphs, found = [], []
    for new, stream in zip(news[:2], streams, strict=False):
        graphs.append(torch.cuda.CUDAGraph())
        torch.cuda.synchronize()
        with torch.cuda.graph(graphs[-1], stream=stream):
            found.append([step(new, cache) for _ in range(8)])
    torch.cuda.synchronize()
    for _ in range(20):
        for graph, stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            loose = [step(news[2], cache) for _ in range(8)]
        torch.cuda.synchronize()
        for right, steps in zip(wanted, [*found, loose], strict=True):
            if not all(torch.equal(*pair) for each in steps for pair in zip(right, each, strict=True)):
                yield "steps at the same time disturb each other"
