"""A selection certified from int8 scores, as a prototype on a GPU: `python -m benchmarks.gpu_selection_8_bits`.

docs/notes/selection-8-bits.md describes the steps and what they took, docs/math.md proves the bounds, and
`benchmarks/selection_8_bits.py` is the definition in plain PyTorch. One sequence of finite numbers, in whole blocks,
with one forced block, the newest. Marked rows are counted, not scored.
"""

import statistics
from functools import partial
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

import flexmsa
from benchmarks import gpu_decode_8_bits_kernels as decoding
from benchmarks import gpu_quantise_8_bits as quantising
from benchmarks import gpu_selection_8_bits_kernels as kernels
from flexmsa.kernels.triton.common.launch import Launch, Options

TOPK, BLOCK, PLACES = 16, 128, kernels.PLACES.value
CHOOSE, AGAIN = (2, 4, 128, 32), (128, 3, 4)


def launch(kernel: Any, grid: tuple[int, ...], arguments: list[Any], warps: int = 4, **constants: Any) -> None:
    """Launch a kernel on its arguments, in its order, and its constants, by name."""
    names = [name for name in kernel.arg_names if name not in constants]
    given = dict(zip(names, arguments, strict=True))
    ordered = {name: constants[name] for name in kernel.arg_names if name in constants}
    Launch(kernel, (*grid, *(1,) * (3 - len(grid))), given, ordered, Options(warps, 3)).run()


def hadamard(size: int, like: torch.Tensor) -> torch.Tensor:
    """The matrix of +-1."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix.to(like)


class Parts:
    """The launches of a selection for index_q [1, groups, S, D] and index_k [1, 1, S, D], by chunks of tokens."""

    def __init__(self, index_q: torch.Tensor, index_k: torch.Tensor, chunk: int) -> None:
        _, self.groups, self.seqlen, self.depth = index_q.shape
        self.index_q, self.index_k, self.rows = index_q, index_k, chunk * self.groups
        self.blocks = index_k.shape[2] // BLOCK
        every = self.groups * self.seqlen

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=index_q.device)

        self.hadamard = hadamard(self.depth, index_q)
        self.queries = quantising.Queries(empty(every, self.depth, dtype=torch.int8), *(empty(every) for _ in range(3)))
        numbers = empty(index_k.shape[2], self.depth, dtype=torch.int8)
        self.keys = quantising.Keys(numbers, *(empty(self.blocks) for _ in range(3)), empty(2))
        self.maxima = empty(self.blocks, self.rows, dtype=torch.int16)
        self.bits = empty(self.blocks, self.rows // 32, dtype=torch.int32)
        entries, begins, lengths, total = (
            empty(number, dtype=torch.int32) for number in (PLACES * self.rows, self.blocks, self.blocks, 1)
        )
        self.lists = kernels.Lists(entries, begins, lengths, total)
        near, used = (empty(self.rows, dtype=torch.int32) for _ in range(2))
        places, over = empty(PLACES, self.rows, dtype=torch.int64), empty(self.rows // 32, dtype=torch.int32)
        self.known = kernels.Rows(empty(self.rows), near, used, places, over)
        self.ids = empty(1, self.groups, self.seqlen, TOPK, dtype=torch.int32)
        self.marked = empty(every, dtype=torch.int8)

    def first_rows(self) -> range:
        """The first row of each chunk."""
        return range(0, self.groups * self.seqlen, self.rows)

    def chunk(self, first: int) -> kernels.Chunk:
        """The kernels' record of a chunk."""
        return kernels.Chunk(first, self.rows // 32, self.seqlen)

    def seen(self, first: int) -> int:
        """The blocks that a chunk sees."""
        return (first + self.rows) // self.groups // BLOCK

    def quantise(self) -> None:
        sizes = {"GROUPS": self.groups, "ROWS": 64, "D": self.depth}
        grid = (self.groups * self.seqlen // 64,)
        launch(
            quantising.quantise_queries_kernel, grid, [self.index_q, self.hadamard, self.queries, self.seqlen], **sizes
        )
        launch(quantising.quantise_keys_kernel, (self.blocks,), [self.index_k, self.hadamard, self.keys], D=self.depth)
        if not self.index_q.is_meta:
            torch.stack((self.keys.error.amax(), self.keys.norm.amax()), out=self.keys.worst)

    def scan(self, first: int) -> None:
        shape, strides = list(self.keys.numbers.shape), [self.depth, 1]
        tiles = TensorDescriptor(self.keys.numbers, shape, strides, [BLOCK, self.depth])
        arguments = [self.queries.numbers, tiles, self.maxima, self.chunk(first)]
        launch(kernels.scan_kernel, (self.rows // 128,), arguments, GROUPS=self.groups, D=self.depth, STAGES=4)

    def choose(self, first: int) -> None:
        arguments = [self.maxima, self.queries, self.keys, self.known, self.bits, self.lists.total, self.chunk(first)]
        words, warps, classes, ahead = CHOOSE
        sizes = {"GROUPS": self.groups, "COUNT": TOPK - 1, "WORDS": words, "CLASSES": classes, "AHEAD": ahead}
        launch(kernels.choose_kernel, (self.rows // 32 // words,), arguments, warps, **sizes)

    def gather(self, first: int) -> None:
        arguments = [self.bits, self.known.over, self.lists, self.chunk(first)]
        launch(kernels.list_kernel, (self.seen(first),), arguments, GROUPS=self.groups, WORDS=1024)

    def again(self, first: int) -> None:
        rows, stages, each = AGAIN
        shares = max(1, self.rows * 40 // (self.seen(first) * rows * each))
        arguments = [self.index_q, self.index_k, self.lists, self.known, self.chunk(first)]
        sizes = {"GROUPS": self.groups, "ROWS": rows, "D": self.depth, "STAGES": stages}
        launch(kernels.again_kernel, (shares, self.seen(first)), arguments, **sizes)

    def certify(self, first: int) -> None:
        arguments = [self.known, self.queries.scale, self.ids, self.marked, self.chunk(first)]
        sizes = {"GROUPS": self.groups, "ROWS": 128, "COUNT": TOPK - 1}
        launch(kernels.certify_kernel, (self.rows // 128,), arguments, **sizes)

    def steps(self) -> list[Any]:
        """The launches of a chunk of rows, in order."""
        return [self.scan, self.choose, self.gather, self.again, self.certify]

    def run(self) -> None:
        self.quantise()
        for first in self.first_rows():
            run_steps(self.steps(), first)


def timed(call: Any) -> float:
    """Milliseconds of one call."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def milliseconds(call: Any, repeats: int = 5) -> float:
    """The median time of a call, after two to warm up."""
    call()
    call()
    return statistics.median(timed(call) for _ in range(repeats))


def chunk_of_length(seqlen: int) -> int:
    """Tokens of a chunk, whose buffers are about a GiB at most."""
    return min(seqlen, max(8192, 2**32 // seqlen))


def prefill(index_q: torch.Tensor, index_k: torch.Tensor, title: str) -> None:
    """Print whether ids are those of bf16, and the time of each step, all chunks' launches one behind the other."""
    parts = Parts(index_q, index_k, chunk_of_length(index_q.shape[2]))
    parts.run()
    wanted = flexmsa.select_blocks(index_q, index_k)
    same = (parts.ids == wanted).all(-1)[0]
    marked = parts.marked.view(parts.seqlen, parts.groups).T != 0
    again = parts.lists.lengths.sum().item() / parts.rows
    print(
        f"{title} {parts.seqlen}: {marked.float().mean().item():.3%} marked, {int((~same & ~marked).sum())} certified "
        f"but wrong of {same.numel()} rows; {again:.1f} again in the last chunk"
    )
    repeats = 9 if parts.seqlen < 500_000 else 1
    total = milliseconds(parts.run, repeats)
    today = milliseconds(partial(flexmsa.select_blocks, index_q, index_k), repeats)
    times = dict.fromkeys((step.__name__ for step in parts.steps()), 0.0)
    for first in parts.first_rows():
        # The steps one by one, each behind those before it, so that the launch of a step does not count.
        parts.scan(first)
        done = 0.0
        for number in range(1, len(times) + 1):
            so_far = milliseconds(partial(run_steps, parts.steps()[:number], first), 3 if repeats > 1 else 1)
            times[parts.steps()[number - 1].__name__] += so_far - done
            done = so_far
    found = ", ".join(f"{name} {time:.3f}" for name, time in times.items())
    print(
        f"  quantise {milliseconds(parts.quantise):.3f}, {found}; all {total:.3f}, bf16 today {today:.3f} ms",
        flush=True,
    )


def run_steps(steps: list[Any], first: int) -> None:
    for step in steps:
        step(first)


def microseconds(call: Any) -> float:
    """The time of a call, replayed from a graph of 20."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(20):
            call()
    return milliseconds(graph.replay) * 50


def decode(num_keys: int) -> None:
    """Print the times of a decoding step's scan and second scores, for the first of 16 tokens."""
    index_q = torch.randn(1, 4, 16, 128, device="cuda", dtype=torch.bfloat16)
    index_k = torch.randn(1, 1, num_keys, 128, device="cuda", dtype=torch.bfloat16)
    parts = Parts(index_q, index_k, 16)
    parts.quantise()
    rough = torch.zeros(4, parts.blocks, device="cuda")
    places = torch.zeros(4, 32, 8, dtype=torch.int64, device="cuda")
    arguments = [parts.queries.numbers, parts.keys.numbers, parts.keys.scale, rough, parts.blocks]
    sizes = {"ROWS": 4, "D": 128, "STAGES": 3}
    scan = partial(launch, decoding.decode_scan_kernel, (132 * 4,), arguments, **sizes)
    known = [rough, parts.queries.per_error, parts.queries.per_norm, parts.keys.worst]
    arguments = [*known, index_q[:, :, 0].contiguous(), index_k, places, parts.blocks]
    sizes = {"EACH": triton.next_power_of_2(parts.blocks) // 32, "COUNT": TOPK - 1, "D": 128, "SHARES": 32, "MOST": 8}
    again = partial(launch, decoding.decode_again_kernel, (32, 4), arguments, 8, **sizes)
    first, second = microseconds(scan), microseconds(again)
    print(f"decode {num_keys}: scan {first:.1f} us, again {second:.1f} us of {int((places != 0).sum()) / 4} blocks")


def main() -> int:
    torch.manual_seed(0)
    for seqlen in (32768, 131072, 1048576):
        index_q = torch.randn(1, 4, seqlen, 128, device="cuda", dtype=torch.bfloat16)
        index_k = torch.randn(1, 1, seqlen, 128, device="cuda", dtype=torch.bfloat16)
        prefill(index_q, index_k, "normal")
        if seqlen == 131072:
            prefill(index_q, index_k[:, :, :1].expand_as(index_k).contiguous(), "all equal")
            prefill(*(torch.randint(-3, 4, x.shape, device="cuda").bfloat16() for x in (index_q, index_k)), "integers")
    decode(1 << 20)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
