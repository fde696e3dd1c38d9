"""Steps of an engine over pages on a GPU: decoding, and decodes beside a chunk of a prompt, in CUDA graphs.

    python -m benchmarks.gpu_pages [--quick] [--out FILE]

First checks: each sequence's ids and results are those of the functions without pages, with e4m3 pages too. Then times
of `attend_pages`: decoding beside `decode` from a contiguous cache, and a mixed batch beside its parts, 32 decodes of
100K keys and a chunk of 2048 tokens. Every sequence has its own pages, in random order, between those of the others.
bf16, blocks of 128, topk 16. `write_pages` is timed by itself.
"""

import argparse
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import flexmsa
from flexmsa import AuxRequest, MSACache, PagedBatch, PagePools

PAGE, DEPTH, TOPK = 128, 128, 16
FP8 = torch.float8_e4m3fn
HEADS = ((64, 4), (32, 8))
DECODES = {"1 x 128K": (1, 131072), "1 x 1M": (1, 1 << 20), "32 x 100K": (32, 100_000)}
CHUNK, CONTEXTS = 2048, (100_000, 2048)
# Rows of ids that may differ where two sums in another order are nearly equal.
FLIPS = 1e-4
# Of a row's largest score: by how much less a selected block may score, as Hopper adds e4m3 products up with 14 bits.
E4M3_SLACK = 2**-11
# Bytes of caches that calls take in turns: more than the L2 cache.
RESIDENT = 200 << 20


class Step:
    """A step: `tokens[r]` new tokens of sequence r, which then has `lens[r]` keys."""

    def __init__(
        self,
        heads: tuple[int, int],
        lens: list[int],
        tokens: list[int],
        num_decodes: int | None = 0,
        stored: tuple[torch.dtype, torch.dtype] = (torch.bfloat16, torch.bfloat16),
    ) -> None:
        """num_decodes: None for a step without offsets; stored: the dtypes of the pages, and of those of index keys."""
        self.lens, self.tokens = lens, tokens
        num_heads, groups = heads
        needed = [-(-count // PAGE) for count in lens]
        order = iter(torch.randperm(sum(needed)).tolist())
        table = torch.full((len(lens), max(needed) + 3), -1, dtype=torch.int32)
        for row, count in enumerate(needed):
            table[row, :count] = torch.tensor([next(order) for _ in range(count)])
        both = draw(sum(needed), groups, PAGE, 2 * DEPTH).to(stored[0])
        self.pools = PagePools(*both.split(DEPTH, dim=3), draw(sum(needed), 1, PAGE, DEPTH).to(stored[1]))
        offsets = torch.tensor([0, *tokens]).cumsum(0).int().cuda()
        places = [(r, p) for r, count in enumerate(lens) for p in range(count - tokens[r], count)]
        self.slots = torch.tensor([int(table[r, p // PAGE]) * PAGE + p % PAGE for r, p in places]).cuda()
        self.page_table, kv_lens = table.cuda(), torch.tensor(lens).int().cuda()
        ragged = (offsets, num_decodes) if num_decodes is not None else (None, 0)
        sizes = {"num_tokens": sum(tokens), "num_decodes": ragged[1]}
        self.batch = PagedBatch(self.page_table, kv_lens, ragged[0], **sizes)
        self.q, self.index_q = draw(sum(tokens), num_heads, DEPTH), draw(sum(tokens), groups, DEPTH)
        self.new = [draw(sum(tokens), count, DEPTH) for count in (groups, groups, 1)]
        self.out = torch.empty_like(self.q)

    def attend(self) -> Tensor:
        return flexmsa.attend_pages(self.q, self.index_q, self.pools, self.batch, out=self.out)

    def write(self) -> None:
        flexmsa.write_pages(*self.new, self.pools, self.slots)

    def errors(self, name: str) -> list[str]:
        """Differences from the functions without pages, of up to four sequences and the last."""
        request = AuxRequest(block_indices=True)
        out, aux = flexmsa.attend_pages(self.q, self.index_q, self.pools, self.batch, return_aux=request)
        first, other, rows, largest = 0, 0, 0, 0.0
        for row, (count, tokens) in enumerate(zip(self.lens, self.tokens, strict=True)):
            part, first = slice(first, first + tokens), first + tokens
            if 3 < row < len(self.lens) - 1:
                continue
            pages = self.page_table[row, : -(-count // PAGE)].long()
            stored = self.pools.k, self.pools.v, self.pools.index_k
            k, v, index_k = (x[pages].transpose(0, 1).flatten(1, 2)[None, :, :count].bfloat16() for x in stored)
            k, v, index_k = k.contiguous(), v.contiguous(), index_k.contiguous()
            q, index_q = (x[part].transpose(0, 1)[None].contiguous() for x in (self.q, self.index_q))
            ids = aux.block_indices[part].transpose(0, 1)[None].contiguous()
            expected = flexmsa.select_blocks(index_q, index_k)
            differ = (ids != expected).any(-1)
            if self.pools.index_k.dtype == FP8:
                differ &= worst_loss(index_q, index_k, ids, expected) > E4M3_SLACK
            other, rows = other + int(differ.sum()), rows + ids[..., 0].numel()
            exact = flexmsa.block_sparse_attention(q, k, v, ids)[0].transpose(0, 1)
            largest = max(largest, float((exact.float() - out[part].float()).abs().max() / exact.float().abs().max()))
        print(f"{name}: {other} of {rows} rows of ids differ; out by {largest:.1e} of its largest number", flush=True)
        # Two roundings to bf16.
        return [] if other <= FLIPS * rows and largest <= 2**-7 else [f"{name}: wrong"]


def worst_loss(index_q: Tensor, index_k: Tensor, ids: Tensor, expected: Tensor) -> Tensor:
    """By how much blocks of `ids` score below those of `expected`, rank by rank, of the row's largest score."""
    scores = torch.einsum("bgsd,bhkd->bgsk", index_q.float(), index_k.float())
    seqlen, keys = scores.shape[2:]
    hidden = torch.ones(seqlen, keys, dtype=torch.bool, device=scores.device).triu(1 + keys - seqlen)
    scores = scores.masked_fill(hidden, float("-inf"))
    blocks = torch.nn.functional.pad(scores, (0, -keys % PAGE), value=float("-inf")).unflatten(-1, (-1, PAGE)).amax(-1)
    taken, best = (
        blocks.gather(-1, each.clamp_min(0).long()).masked_fill(each < 0, 0.0).sort(-1).values
        for each in (ids, expected)
    )
    return (best - taken).amax(-1) / blocks.amax(-1).abs()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def graph_us(calls: list[Callable[[], object]], repeats: int = 20) -> float:
    """Median microseconds of a call, in a graph of at least 8 that are made in turns."""
    from benchmarks.gpu_serving import graph_time

    return 1e3 * graph_time(calls, repeats)


def host_us(call: Callable[[], object], repeats: int = 20) -> float:
    """Median microseconds that the host takes for a call; the GPU is not waited for."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = perf_counter()
        call()
        times.append((perf_counter() - start) * 1e6)
    return median(times)


def launches(call: Callable[[], object]) -> int:
    """The number of kernels, fills and copies of a call."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in found.key_averages() if event.device_time_total > 0)


def floor_us(heads: tuple[int, int], lens: list[int], tokens: list[int], machine: dict) -> float:
    """The larger of the products' time and memory's, as if each key were read once."""
    num_heads, groups = heads
    score = sum(2 * groups * DEPTH * n * (2 * count - n + 1) / 2 for n, count in zip(tokens, lens, strict=True))
    attend = sum(4 * num_heads * DEPTH * n * min(count, TOPK * PAGE) for n, count in zip(tokens, lens, strict=True))
    chosen = sum(min(n * TOPK * PAGE, count) * groups * 2 * DEPTH for n, count in zip(tokens, lens, strict=True))
    read = 2 * (sum(lens) * DEPTH + chosen + 2 * sum(tokens) * num_heads * DEPTH)
    return 1e6 * max((score + attend) / machine["flops"], read / machine["bandwidth"])


def contiguous_us(heads: tuple[int, int], count: int, keys: int, copies: int) -> float:
    """Microseconds of `decode` from contiguous caches."""
    num_heads, groups = heads
    calls = []
    for _ in range(copies):
        cache = MSACache(count, groups, DEPTH, DEPTH, capacity=keys, dtype=torch.bfloat16, device="cuda")
        for x in (cache.k, cache.v, cache.index_k):
            x.normal_()
        cache.kv_lens.fill_(keys - 1)
        cache.append(*(draw(count, heads, 1, DEPTH) for heads in (groups, groups, 1)))
        q, index_q = draw(count, num_heads, 1, DEPTH), draw(count, groups, 1, DEPTH)
        calls.append(lambda q=q, cache=cache, index_q=index_q: flexmsa.decode(q, cache, index_q))
    return graph_us(calls)


def measure_decodes(heads: tuple[int, int], machine: dict, report: Callable[..., None], quick: bool) -> list[str]:
    errors = []
    for name, (count, keys) in DECODES.items():
        keys = min(keys, 8192) if quick else keys
        copies = max(1, -(-RESIDENT // (count * keys * DEPTH * 2)))
        sizes = [keys] * count, [1] * count
        steps = [Step(heads, *sizes, num_decodes=None) for _ in range(copies)]
        errors += steps[0].errors(f"{heads}, decode {name}")
        row = {"us": graph_us([step.attend for step in steps]), "write": graph_us([step.write for step in steps])}
        row |= {"host": host_us(steps[0].attend), "launches": launches(steps[0].attend)}
        del steps
        row["contiguous"] = contiguous_us(heads, count, keys, copies)
        report("decode", name, heads, **row, floor=floor_us(heads, *sizes, machine))
        torch.cuda.empty_cache()
    return errors


def measure_mixed(heads: tuple[int, int], machine: dict, report: Callable[..., None], quick: bool) -> list[str]:
    errors = []
    count, keys = DECODES["32 x 100K"]
    keys = 4096 if quick else keys
    for context in CONTEXTS:
        context = min(context, 4096) if quick else context
        both = [keys] * count + [context], [1] * count + [CHUNK]
        ways = {
            "mixed": (*both, count),
            "mixed, without num_decodes": (*both, 0),
            "decodes": ([keys] * count, [1] * count, None),
            "chunk": ([context], [CHUNK], 0),
        }
        for way, (lens, tokens, num_decodes) in ways.items():
            step = Step(heads, lens, tokens, num_decodes)
            if way.startswith("mixed"):
                errors += step.errors(f"{heads}, {way}, chunk at {context}")
            row = {"us": graph_us([step.attend]), "write": graph_us([step.write]), "host": host_us(step.attend)}
            row |= {"launches": launches(step.attend), "context": context}
            report(way, f"chunk at {context}", heads, **row, floor=floor_us(heads, lens, tokens, machine))
            del step
            torch.cuda.empty_cache()
    return errors


def check_dtypes(heads: tuple[int, int]) -> list[str]:
    """Pages in e4m3 without scales, of all keys or of some, as vLLM's MiniMax-M3 may have them; nothing is timed."""
    errors, steps = (
        [],
        {"decodes": ([6000, 77], [1, 1], None), "decodes and a chunk": ([6000, 6100, 900], [1, 1, 300], 2)},
    )
    for (name, sizes), stored in product(steps.items(), ((FP8, FP8), (FP8, torch.bfloat16), (torch.bfloat16, FP8))):
        errors += Step(heads, *sizes, stored=stored).errors(f"{heads}, {name}, {stored[0]}, index keys {stored[1]}")
    return errors


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_pages", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short sequences, to try the benchmark")
    parser.add_argument("--out", type=Path, help="a JSON file to write after every row")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_pages needs a GPU: torch.cuda.is_available() is False", file=sys.stderr)
        return 2
    from benchmarks.gpu import ceilings, environment

    flops, bandwidth = ceilings()
    machine = {**environment(), "flops": flops, "bandwidth": bandwidth}
    rows: list[dict[str, Any]] = []

    def report(way: str, name: str, heads: tuple[int, int], **more: Any) -> None:
        rows.append({"way": way, "name": name, "heads": list(heads), **more})
        said = ", ".join(f"{key} {value:.1f}" for key, value in more.items() if key != "context")
        print(f"{heads[0]}/{heads[1]} {way}, {name}: {said}", flush=True)
        if options.out:
            options.out.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))

    torch.manual_seed(0)
    errors: list[str] = []
    for heads in HEADS:
        errors += check_dtypes(heads)
        errors += measure_decodes(heads, machine, report, options.quick)
        errors += measure_mixed(heads, machine, report, options.quick)
    print(*errors or ["all checks passed"], sep="\n")
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
