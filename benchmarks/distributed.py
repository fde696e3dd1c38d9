"""Several GPUs: check against one process, then time training steps and decoding.

    torchrun --nproc-per-node N -m benchmarks.distributed [--heads 64/4/128 ...] [--tokens 131072 ...] [--out FOLDER]

A step is forward and backward of the attention with the index loss in the backward, in bf16, batch 1, head-tail. Beside
it stand the same step on one process, if it fits, and the *share*: the same step of each process with all keys already
there, so that nothing is sent. Efficiency is the time of one process over N times that of the step; exposed is the part
of the step beyond the slowest share. Dense is forward and backward of scaled_dot_product_attention inside torch's
`context_parallel()`. Then come a step of a model (`distributed_model`) and decoding (`distributed_decode`). Without
GPUs it runs with gloo, in fp32, which checks the command and no more.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

import flexmsa
from flexmsa import AuxRequest, _core
from flexmsa._sequences import Sequences
from flexmsa.distributed import SequenceShards, context_parallel_attention
from flexmsa.kernels.rules import SelectionRule

BLOCK, TOPK = 128, 16
PARTS = "attention", "model", "decode"
GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
REQUEST = AuxRequest(index_loss=True, block_indices=True)
# What `differentiate` returns beside the loss.
RESULTS = "out", "grad q", "grad k", "grad v", "grad index_q", "grad index_k"
# Longer ones do not fit, with as many KV heads as query heads and gradients in fp32.
LONGEST_DENSE = 1 << 17
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


class Results(NamedTuple):
    """Of the sum of out and the loss."""

    out: Tensor
    ids: Tensor
    loss: Tensor
    grads: tuple[Tensor, ...]


def differentiate(tensors: list[Tensor], attend: Callable[..., Any]) -> Results:
    """What a training step computes."""
    value = torch.zeros((), device=DEVICE)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, aux = attend(*leaves, return_aux=REQUEST, index_loss_value=value)
    grads = torch.autograd.grad((out, aux.index_loss), leaves, (torch.ones_like(out), None))
    return Results(out.detach(), aux.block_indices, value, grads)


def sparse(*tensors: Tensor, **how: Any) -> Any:
    """The attention on one process."""
    return flexmsa.attention(*tensors, block_size=BLOCK, topk=TOPK, **how)


def dense(whole: list[Tensor], mesh: DeviceMesh) -> Callable[[], Tensor]:
    """A process's step of dense attention by cuDNN, which takes as many KV heads as query heads here."""
    shards = SequenceShards(whole[0].shape[2], mesh)
    q, k, v = (shards.shard(x, dim=2) for x in whole[:3])
    groups = q.shape[1] // k.shape[1]
    own = [q.contiguous(), *(x.repeat_interleave(groups, dim=1) for x in (k, v))]

    def run() -> Tensor:
        # What is cut here is only to say how many tokens there are: q, k and v have been cut.
        tokens = torch.empty(2 * mesh.size(), device=DEVICE)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION), context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[0]):
            leaves = [x.detach().requires_grad_() for x in own]
            # By its module: context_parallel() replaces it there.
            out = F.scaled_dot_product_attention(*leaves, is_causal=True)
            torch.autograd.grad(out, leaves, torch.ones_like(out))
        return out.detach()

    return run


def dense_errors(heads: Heads, mesh: DeviceMesh, tokens: int = 4096) -> list[str]:
    """Whether dense attention on several processes is that of one."""
    whole = make_inputs(heads, tokens)
    right = F.scaled_dot_product_attention(*whole[:3], is_causal=True, enable_gqa=True).float()
    out = SequenceShards(tokens, mesh).unshard(dense(whole, mesh)(), dim=2).float()
    error = (out - right).norm() / right.norm()
    return [] if error < TOLERANCE else [f"dense: off by {error:.1e}"]


def share(whole: list[Tensor], shards: SequenceShards) -> Callable[[], object]:
    """A process's step with all keys there."""
    q, index_q = (shards.shard(whole[place], dim=2) for place in (0, 3))
    sequences = Sequences(q, shards.seqlen, table=shards.fragments, ranges=shards.ranges)
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
    """What differs from one process, for each cut: the ids, out, the loss or a gradient."""
    whole = make_inputs(heads, tokens)
    documents = torch.tensor([0, tokens // 7, tokens // 2, tokens], dtype=torch.int32, device="cpu")
    wrong = []
    for layout, offsets in (("head-tail", None), ("contiguous", None), ("head-tail", documents)):
        shards = SequenceShards(tokens, mesh, layout=layout, cu_seqlens=offsets)  # type: ignore[arg-type]
        alone = partial(sparse, cu_seqlens=None if offsets is None else offsets.to(DEVICE))
        right, got = differentiate(whole, alone), step(whole, shards)()
        name = f"{heads}, {tokens}, {layout}{'' if offsets is None else ', packed'}"
        wrong += [f"{name}: {error}" for error in differences(right, got, shards)]
    return wrong


def differences(right: Results, got: Results, shards: SequenceShards) -> list[str]:
    """What of a process's step is not its part of one process's."""
    world, wrong = shards.mesh.size(), []
    if not torch.equal(shards.unshard(got.ids, dim=2), right.ids):
        wrong.append("other ids")
    # The index loss is W times a process's part.
    factors = 1, 1, 1, 1, world, world
    tensors = zip(RESULTS, (got.out, *got.grads), (right.out, *right.grads), factors, strict=True)
    for name, part, x, factor in tensors:
        difference = (shards.unshard(part, dim=2).float() / factor - x.float()).norm() / x.float().norm()
        if not difference < TOLERANCE:
            wrong.append(f"{name} off by {difference:.1e}")
    loss = got.loss.clone()
    dist.all_reduce(loss)
    if not abs(loss / world / right.loss - 1) < 1e-3:
        wrong.append(f"loss {loss / world} for {right.loss}")
    return wrong


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """The median time of the slowest process, after calls until memory is allocated and clocks have risen."""
    for _ in range(max(1, repeats - 2)):
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


def time_if_it_fits(call: Callable[[], object], repeats: int) -> float | None:
    """The time of a call, None if there is not enough memory."""
    try:
        return milliseconds(call, repeats)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def time_dense(heads: Heads, tokens: int, mesh: DeviceMesh) -> float | None:
    """The time of dense attention, None without GPUs, and for longer sequences."""
    if not GPU or tokens > LONGEST_DENSE:
        return None
    return milliseconds(dense(make_inputs(heads, tokens), mesh), 3)


def measure(heads: Heads, tokens: int, mesh: DeviceMesh) -> dict[str, Any]:
    """The times of one shape, and the most memory of any process."""
    shards, repeats = SequenceShards(tokens, mesh), 5 if tokens < 200_000 else 3
    alone = time_if_it_fits(partial(differentiate, make_inputs(heads, tokens), sparse), repeats)
    part = milliseconds(share(make_inputs(heads, tokens), shards), repeats)
    run = step(make_inputs(heads, tokens), shards)
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    together = milliseconds(run, repeats)
    gib = peak_gib()
    row = {"heads": str(heads), "tokens": tokens, "processes": mesh.size(), "one_ms": alone, "share_ms": part}
    row |= {"step_ms": together, "exposed": 1 - part / together, "memory_gib": gib}
    row |= {"efficiency": None if alone is None else alone / together / mesh.size()}
    return row | {"dense_ms": time_dense(heads, tokens, mesh)}


def peak_gib() -> float:
    """The most memory that any process has allocated."""
    memory = torch.tensor(torch.cuda.max_memory_allocated() / 2**30 if GPU else 0.0, device=DEVICE)
    dist.all_reduce(memory, dist.ReduceOp.MAX)
    return memory.item()


def errors_of(options: argparse.Namespace, mesh: DeviceMesh) -> list[str]:
    """What any part computes otherwise than one process."""
    from . import distributed_decode, distributed_model

    found = [error for text in options.heads for error in check(Heads.parse(text), 3000 if GPU else 600, mesh)]
    found += dense_errors(Heads.parse(options.heads[0]), mesh) if GPU else []
    found += distributed_model.layer_errors(mesh)
    found += distributed_model.model_errors(mesh)
    return found + distributed_decode.errors(Heads.parse(options.heads[0]), mesh)


def main(argv: list[str] | None = None) -> int:
    from . import distributed_decode, distributed_model

    parser = argparse.ArgumentParser(prog="python -m benchmarks.distributed", description=__doc__.splitlines()[0])
    small = [] if GPU else [1024]
    parser.add_argument("--heads", nargs="+", default=["64/4/128", "32/8/128"] if GPU else ["4/2/32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=small or [1 << 17, 1 << 19, 1 << 20])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is timed")
    parser.add_argument("--out", type=Path, default=Path("out/distributed"), help="folder of the results")
    options = parser.parse_args(argv)
    if GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    mesh = init_device_mesh(DEVICE, (int(os.environ["WORLD_SIZE"]),))
    errors = errors_of(options, mesh)
    if errors:
        print("\n".join(errors), flush=True)
        return 1
    machine = torch.cuda.get_device_name() if GPU else platform.machine()
    results: dict[str, Any] = {"machine": f"{mesh.size()} x {machine}", "torch": torch.__version__}
    results |= {part: [] for part in PARTS}

    def report(part: str, row: dict[str, Any]) -> None:
        results[part].append(row)
        if dist.get_rank() == 0:
            cells = (f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}" for name, x in row.items())
            print("  ".join(cells), flush=True)
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "distributed.json").write_text(json.dumps(results, indent=1))

    for text in options.heads if "attention" in options.parts else ():
        for tokens in options.tokens:
            report("attention", measure(Heads.parse(text), tokens, mesh))
    if "model" in options.parts:
        report("model", distributed_model.measure(options.tokens[0], mesh))
    for text in options.heads if "decode" in options.parts else ():
        report("decode", distributed_decode.measure(Heads.parse(text), options.tokens[-1], mesh))
    return 0


if __name__ == "__main__":
    code = main()
    dist.destroy_process_group()
    raise SystemExit(code)
