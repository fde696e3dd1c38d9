"""Context parallel on several GPUs: check against one process, then time a training step of a layer.

    torchrun --nproc-per-node N -m benchmarks.distributed [--heads 64/4/128 ...] [--tokens 131072 ...] [--out FOLDER]

A step is forward and backward of the attention with the index loss in the backward, in bf16, batch 1, head-tail. Beside
it stand the same step on one process, if it fits, and the *share*: the same step of each process with all keys already
there, so that nothing is sent. Efficiency is the time of one process over N times that of the step; exposed is the part
of the step beyond the slowest share. Without GPUs it runs with gloo, in fp32, which checks the command and no more.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import flexmsa
from flexmsa import AuxRequest, _core
from flexmsa._sequences import Sequences
from flexmsa.distributed import SequenceShards, context_parallel_attention
from flexmsa.kernels.rules import SelectionRule

BLOCK, TOPK = 128, 16
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
LOSS = AuxRequest(index_loss=True)
# What `differentiate` returns beside the loss.
RESULTS = "out", "grad q", "grad k", "grad v", "grad index_q", "grad index_k"
# Largest difference from one process, relative: rounding of 16 bits, and of sums in another order.
TOLERANCE = 1e-2 if GPU else 1e-4


class Heads(NamedTuple):
    """Query heads, KV heads, and the head dim of both branches."""

    queries: int
    groups: int
    dim: int

    @classmethod
    def parse(cls, text: str) -> "Heads":
        """From "64/4/128"."""
        return cls(*map(int, text.split("/")))

    def __str__(self) -> str:
        return "/".join(map(str, self))


def make_inputs(heads: Heads, tokens: int) -> list[Tensor]:
    """q, k, v, index_q and index_k of a whole row, the same on every process."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    numbers = heads.queries, heads.groups, heads.groups, heads.groups, 1
    shapes = ((1, tokens, number, heads.dim) for number in numbers)
    return [torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE).transpose(1, 2) for shape in shapes]


def differentiate(tensors: list[Tensor], attend: Callable[..., Any]) -> tuple[Tensor, Tensor, Any]:
    """out, the loss and the gradients of sum(out) + loss."""
    value = torch.zeros((), device=DEVICE)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, aux = attend(*leaves, return_aux=LOSS, index_loss_value=value)
    return out, value, torch.autograd.grad((out, aux.index_loss), leaves, (torch.ones_like(out), None))


def sparse(*tensors: Tensor, **how: Any) -> Any:
    """The attention on one process."""
    return flexmsa.attention(*tensors, block_size=BLOCK, topk=TOPK, **how)


def share(whole: list[Tensor], shards: SequenceShards) -> Callable[[], object]:
    """A process's step with all keys there."""
    q, index_q = (shards.shard(whole[place], dim=2) for place in (0, 3))
    sequences = Sequences.from_table(q, shards.seqlen, shards.fragments)
    scale = q.shape[3] ** -0.5
    settings = _core.Settings(BLOCK, scale, scale, SelectionRule(BLOCK, TOPK, 1, 0))

    def attend(*tensors: Tensor, return_aux: AuxRequest, index_loss_value: Tensor) -> Any:
        return _core.attention(*tensors, sequences, settings, return_aux, loss_value=index_loss_value)

    return lambda: differentiate([q, *whole[1:3], index_q, whole[4]], attend)


def step(whole: list[Tensor], shards: SequenceShards) -> Callable[[], Any]:
    """A process's step of context parallel."""
    parts = [shards.shard(x, dim=2) for x in whole]

    def attend(*tensors: Tensor, **how: Any) -> Any:
        return context_parallel_attention(*tensors, shards, block_size=BLOCK, topk=TOPK, **how)

    return lambda: differentiate(parts, attend)


def check(heads: Heads, tokens: int, mesh: DeviceMesh) -> list[str]:
    """What differs from one process: out, the loss or a gradient."""
    whole, wrong = make_inputs(heads, tokens), []
    right_out, right_loss, right = differentiate(whole, sparse)
    for layout in ("head-tail", "contiguous"):
        shards = SequenceShards(tokens, mesh, layout=layout)  # type: ignore[arg-type]
        out, loss, grads = step(whole, shards)()
        dist.all_reduce(loss)
        # The index loss is W times a process's part.
        factors = 1, 1, 1, 1, mesh.size(), mesh.size()
        for name, part, x, factor in zip(RESULTS, (out, *grads), (right_out, *right), factors, strict=True):
            difference = (shards.unshard(part, dim=2).float() / factor - x.float()).norm() / x.float().norm()
            if not difference < TOLERANCE:
                wrong.append(f"{heads}, {tokens}, {layout}: {name} off by {difference:.1e}")
        if not abs(loss / mesh.size() / right_loss - 1) < 1e-3:
            wrong.append(f"{heads}, {tokens}, {layout}: loss {loss / mesh.size()} for {right_loss}")
    return wrong


def milliseconds(call: Callable[[], object], repeats: int = 5) -> float:
    """The median time of the slowest process."""
    call()
    times = []
    for _ in range(repeats):
        if GPU:
            torch.cuda.synchronize()
        dist.barrier()
        begin = perf_counter()
        call()
        if GPU:
            torch.cuda.synchronize()
        times.append(1e3 * (perf_counter() - begin))
    slowest = torch.tensor(median(times), device=DEVICE)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return slowest.item()


def time_alone(heads: Heads, tokens: int) -> float | None:
    """The time of one process, None if the whole does not fit."""
    whole = make_inputs(heads, tokens)
    try:
        return milliseconds(lambda: differentiate(whole, sparse), 3)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def measure(heads: Heads, tokens: int, mesh: DeviceMesh) -> dict[str, Any]:
    """The times of one shape, and the most memory of any process."""
    shards = SequenceShards(tokens, mesh)
    alone = time_alone(heads, tokens)
    part = milliseconds(share(make_inputs(heads, tokens), shards))
    run = step(make_inputs(heads, tokens), shards)
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    together = milliseconds(run)
    memory = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0, device=DEVICE)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    row = {"heads": str(heads), "tokens": tokens, "processes": mesh.size(), "one_ms": alone, "share_ms": part}
    row |= {"step_ms": together, "exposed": 1 - part / together, "memory_gib": memory.item()}
    return row | {"efficiency": None if alone is None else alone / together / mesh.size()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.splitlines()[0])
    small = [] if GPU else [1024]
    parser.add_argument("--heads", nargs="+", default=["64/4/128", "32/8/128"] if GPU else ["4/2/32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=small or [1 << 17, 1 << 19, 1 << 20])
    parser.add_argument("--out", type=Path, default=Path("out/distributed"), help="folder of the results")
    options = parser.parse_args(argv)
    if GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(DEVICE, (int(os.environ["WORLD_SIZE"]),))
    first = dist.get_rank() == 0
    errors = [error for text in options.heads for error in check(Heads.parse(text), 3000 if GPU else 600, mesh)]
    if errors:
        print("\n".join(errors), flush=True)
        return 1
    machine = torch.cuda.get_device_name() if GPU else platform.machine()
    results: dict[str, Any] = {"machine": f"{mesh.size()} x {machine}", "torch": torch.__version__, "rows": []}
    for text in options.heads:
        for tokens in options.tokens:
            row = measure(Heads.parse(text), tokens, mesh)
            results["rows"].append(row)
            if first:
                cells = (f"{name} {x:.3g}" if isinstance(x, float) else f"{name} {x}" for name, x in row.items())
                print("  ".join(cells), flush=True)
                options.out.mkdir(parents=True, exist_ok=True)
                (options.out / "distributed.json").write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    code = main()
    dist.destroy_process_group()
    raise SystemExit(code)
