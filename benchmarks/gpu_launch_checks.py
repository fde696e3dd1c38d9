"""Launches on a GPU: nothing compiles after the first use of a problem, on any device, whatever the addresses."""

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

import flexmsa
from flexmsa.kernels.triton.common.launch import num_compiled
from flexmsa.kernels.triton.selection import work_counters
from flexmsa.testing import assert_close

HEADS, KV_HEADS, DEPTH, TOPK = 16, 2, 128, 4
LENGTHS = (1000, 4096, 777, 9000, 2048, 130)


def inputs(seqlen: int, device: str = "cuda", offset: int = 0) -> list[Tensor]:
    """q, k, v, index_q and index_k, the first of their numbers `offset` elements behind an aligned address."""
    generator = torch.Generator().manual_seed(seqlen)

    def vectors(heads: int) -> Tensor:
        numbers = torch.randn(heads * seqlen * DEPTH, generator=generator).bfloat16()
        buffer = torch.empty(offset + numbers.numel(), dtype=torch.bfloat16, device=device)
        buffer[offset:] = numbers
        return buffer[offset:].view(1, heads, seqlen, DEPTH).requires_grad_()

    return [vectors(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, KV_HEADS, 1)]


def train(tensors: list[Tensor]) -> list[Tensor]:
    """out and the gradients of one layer's step."""
    wanted = flexmsa.AuxRequest(index_loss=True)
    out, aux = flexmsa.attention(*tensors, topk=TOPK, return_aux=wanted)
    return [out.detach(), *torch.autograd.grad(out.float().square().mean() + aux.index_loss, tensors)]


def decode(capacity: int, steps: int = 3) -> None:
    """A prompt and some tokens of it after one another."""
    cache = flexmsa.MSACache(1, KV_HEADS, DEPTH, DEPTH, capacity, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        for count in (capacity - steps, *[1] * steps):
            q, k, v, index_q, index_k = inputs(count)
            cache.append(k, v, index_k)
            flexmsa.decode(q, cache, index_q, topk=TOPK)


def compilations(call: Callable[[int], object], lengths: tuple[int, ...]) -> list[int]:
    """Kernels compiled by the first call, and by all others."""
    before = num_compiled()
    call(lengths[0])
    first = num_compiled()
    for length in lengths[1:]:
        call(length)
    return [first - before, num_compiled() - first]


def launch_errors() -> Iterator[str]:
    """Kernels that are compiled again for another length; results that depend on a device or on alignment."""
    for name, call in (("training", lambda seqlen: train(inputs(seqlen))), ("decoding", decode)):
        first, later = compilations(call, LENGTHS)
        print(f"{name}: {first} kernels compiled by the first call, {later} by other lengths", flush=True)
        if later:
            yield f"{name}: {later} kernels compiled again for other lengths"
    yield from graph_errors()
    expected = train(inputs(1000))
    if not all(map(torch.equal, train(inputs(1000, offset=8)), expected)):
        yield "tensors 16 bytes behind an address: other results"
    yield from unaligned_errors()
    for number in range(1, torch.cuda.device_count()):
        found = train(inputs(1000, f"cuda:{number}"))
        if not all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(found, expected, strict=True)):
            yield f"cuda:{number}: other results than on cuda:0"


def graph_errors() -> Iterator[str]:
    """A decoding step whose first run is the one before torch.compile captures a graph, beside the eager step."""
    q, k, v, index_q, index_k = (x.detach() for x in inputs(3000))
    newest = q[:, :, -1:].contiguous(), k, v, index_q[:, :, -1:].contiguous(), index_k
    work_counters._counters_of.cache_clear()
    work_counters._reserves.clear()
    step = torch.compile(partial(flexmsa.attention, topk=TOPK), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for run in range(4):
            out = step(*newest).clone()
            if not torch.equal(out, flexmsa.attention(*newest, topk=TOPK)):
                yield f"run {run} of a captured decoding step: other results than the eager step"


def unaligned_errors() -> Iterator[str]:
    """Attention to fixed blocks from tensors that the bulk copy engine cannot read, beside that from aligned ones."""
    seqlen = 1000
    newest = torch.arange(seqlen, device="cuda")[:, None] // 128 - torch.arange(TOPK, device="cuda")
    ids = newest.clamp(min=-1).int().expand(1, KV_HEADS, seqlen, TOPK)
    aligned, shifted = ([x.detach() for x in inputs(seqlen, offset=offset)[:3]] for offset in (0, 1))
    exact = flexmsa.block_sparse_attention(*(x.double() for x in aligned), ids)
    try:
        out = flexmsa.block_sparse_attention(*shifted, ids)
        assert_close("out", out, exact, flexmsa.block_sparse_attention(*aligned, ids))
    except AssertionError as error:
        yield f"tensors 2 bytes behind an address: {error}"


def host_times() -> Iterator[tuple[str, float]]:
    """Milliseconds of the host for one append, one launch, and for one decoding step."""
    cache = flexmsa.MSACache(1, KV_HEADS, DEPTH, DEPTH, 65536, dtype=torch.bfloat16, device="cuda")
    q, k, v, index_q, index_k = (x.detach() for x in inputs(1))

    def step() -> None:
        cache.append(k, v, index_k)
        flexmsa.decode(q, cache, index_q, topk=TOPK)

    with torch.no_grad():
        cache.append(*(x.detach() for x in inputs(30000)[1:3]), inputs(30000)[4].detach())
        yield "append", host_time(lambda: cache.append(k, v, index_k))
        yield "a decoding step", host_time(step)


def host_time(call: Callable[[], object], calls: int = 200, repeats: int = 7) -> float:
    """Milliseconds of the host per call, the least of several series between which the GPU catches up."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(calls):
            call()
        times.append((perf_counter() - start) / calls * 1e3)
    torch.cuda.synchronize()
    return min(times)
