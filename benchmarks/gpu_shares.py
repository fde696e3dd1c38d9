"""The work of each process of context parallel, timed on one GPU: a part of `benchmarks/gpu.py`.

W processes cut a sequence; the step of each runs by itself, with all keys already there, so that nothing is sent: its
queries' selection, attention and index loss, forward and backward. The slowest of them, beside one process's step over
W, says how evenly the cut divides the work. bf16, batch 1, cut head-tail, within every document where they are packed.
First the shares are compared with the whole.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import accumulate, cycle, takewhile

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from flexmsa.distributed import SequenceShards

from .distributed import DEVICE, GPU, RESULTS, Heads, Results, differentiate, make_inputs, share, sparse
from .gpu_training import Timer

CHECKED = Heads(8, 2, 64)
HEADS = (Heads(64, 4, 128), Heads(32, 8, 128))
TOKENS = (1 << 17, 1 << 19, 1 << 20)
PROCESSES = (2, 4, 8)
# The time of the slowest share, divided by one process's time over W.
BAR = 1.05
# Of the documents in batches that models were trained on.
# fmt: off
LENGTHS = (
    177404, 19204, 52523, 43104, 59411, 40270, 1300, 62264, 51860, 23188, 41755, 1955, 10572, 2468, 2101, 443, 2, 2703,
    9846, 17558, 1345, 2772, 31379, 33746, 576, 6718, 24429,
)
# fmt: on


@contextmanager
def shards_of(tokens: int, rank: int, world: int, cu_seqlens: Tensor | None) -> Iterator[SequenceShards]:
    """The cut of one of several processes, of which only this one runs."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield SequenceShards(tokens, init_device_mesh(DEVICE, (world,)), cu_seqlens=cu_seqlens)
    finally:
        dist.destroy_process_group()


def packed(tokens: int) -> Tensor:
    """[documents + 1] int32: documents of LENGTHS, again and again, the last one cut."""
    ends = takewhile(lambda end: end < tokens, accumulate(cycle(LENGTHS)))
    return torch.tensor([0, *ends, tokens], dtype=torch.int32)


def whole_step(whole: list[Tensor], cu_seqlens: Tensor | None) -> Results:
    """The step of one process."""
    documents = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens.to(whole[0].device)}
    return differentiate(whole, lambda *x, **more: sparse(*x, **documents, **more))


def share_errors(heads: Heads = CHECKED, tokens: int = 3000, world: int = 3) -> Iterator[str]:
    """Results of shares that differ from the whole: out and the gradient of q by place, those of keys as a sum."""
    whole = make_inputs(heads, tokens)
    for cu_seqlens in (None, torch.tensor([0, 1, tokens // 3, tokens // 3, tokens], dtype=torch.int32)):
        out, _, loss, grads = whole_step(whole, cu_seqlens)
        found_out, found = torch.zeros_like(out), [torch.zeros_like(x, dtype=torch.float32) for x in grads]
        found_loss = 0.0
        for rank in range(world):
            with shards_of(tokens, rank, world, cu_seqlens) as shards:
                local_out, _, local_loss, local = share(whole, shards)()
                seen = shards.tokens >= 0
                places, weight = shards.tokens[seen], seen.sum() / tokens
            found_out[:, :, places] = local_out[:, :, seen]
            found_loss += float(local_loss * weight)
            for number, (x, y) in enumerate(zip(found, local, strict=True)):
                part = y.float() * (weight if number > 2 else 1)
                if number in (0, 3):
                    x[:, :, places] += part[:, :, seen]
                else:
                    x += part
        for name, x, y in zip(RESULTS, (found_out, *found), (out, *grads), strict=True):
            error = float((x.double() - y.double()).norm() / y.double().norm())
            if not error < 1e-2:
                yield f"shares, {'plain' if cu_seqlens is None else 'packed'}, {name}: off by {error:.1e}"
        if not abs(found_loss / float(loss) - 1) < 1e-3:
            yield f"shares: loss {found_loss} for {float(loss)}"


def measured(call: Callable[[], object], timer: Timer) -> tuple[float, float]:
    """Milliseconds of a call, and its peak memory in GiB with its inputs."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ms = timer(call)
    return ms, torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0


def share_times(
    report: Callable[..., None], timer: Timer, tokens: tuple[int, ...] = TOKENS, heads: tuple[Heads, ...] = HEADS
) -> None:
    """Report one process's step, and for each number of processes the slowest share and the most memory."""
    for layout in heads:
        for length in tokens:
            for kind, cu_seqlens in (("plain", None), ("packed", packed(length))):
                if cu_seqlens is not None and len(cu_seqlens) == 2:
                    # The first document alone fills it.
                    continue
                whole = make_inputs(layout, length)
                name = f"shares {layout}, {length}, {kind}"
                alone, gib = measured(partial(whole_step, whole, cu_seqlens), timer)
                report(f"{name}: 1", alone, gib=gib)
                for world in PROCESSES:
                    found = [_time_share(whole, length, rank, world, cu_seqlens, timer) for rank in range(world)]
                    slowest, gib = (max(numbers) for numbers in zip(*found, strict=True))
                    report(f"{name}: {world}", slowest, gib=gib, ratio=slowest * world / alone, ratio_bar=BAR)
                del whole


def _time_share(
    whole: list[Tensor], length: int, rank: int, world: int, cu_seqlens: Tensor | None, timer: Timer
) -> tuple[float, float]:
    with shards_of(length, rank, world, cu_seqlens) as shards:
        return measured(share(whole, shards), timer)
