"""Layers and a model on several GPUs: a part of `benchmarks/distributed.py`.

Layers with their heads over the processes (tensor parallel), with sharded parameters (FSDP2), and with sharded
parameters and tokens (FSDP2 and context parallel) are compared with one process. The model has the shape of
Qwen3-0.6B, converted, in the sparse phase, with activation checkpointing: the step of `gpu_model`, with its parameters
and the tokens of each row over all processes.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from flexmsa import MSAConfig, MSAttention
from flexmsa.distributed import ContextParallel, SequenceShards, tensor_parallel_plan

from .distributed import BLOCK, DEVICE, DTYPE, GPU, milliseconds, peak_gib, time_if_it_fits
from .gpu_model import SHAPE, Shape, has_transformers, make_sparse, tokens

# The model is in bf16 everywhere.
TOLERANCE = 3e-2 if GPU else 1e-4
MODEL_TOLERANCE = 3e-2
SMALL = Shape(layers=2, hidden=64, mlp=64, heads=4, kv_heads=2, head_dim=16, block_size=16, topk=4, device="cpu")
WAYS = "TP", "FSDP2", "FSDP2 and CP"


def relative(x: Tensor, right: Tensor) -> float:
    """The norm of the difference over that of `right`."""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return float((x.float() - right.float()).norm() / right.float().norm())


def layer_errors(mesh: DeviceMesh, seqlen: int = 2000) -> list[str]:
    """What a layer over the processes computes otherwise than by itself: out, the loss or a gradient."""
    config = MSAConfig(256, num_heads=16, num_kv_heads=4, head_dim=64, index_head_dim=64, block_size=BLOCK, topk=4)
    torch.manual_seed(0)
    x = torch.randn(1, seqlen, config.hidden_size, device=DEVICE, dtype=DTYPE)

    def run(way: str | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        torch.manual_seed(1)
        layer = MSAttention(config).to(DEVICE, DTYPE)
        names = [name for name, _ in layer.named_parameters()]
        part, given, world = x, {}, 1
        if way == "TP":
            parallelize_module(layer, mesh, tensor_parallel_plan(layer))
        if way == "FSDP2 and CP":
            parallelize_module(layer, mesh, ContextParallel())
            shards, world = SequenceShards(seqlen, mesh), mesh.size()
            part, given = shards.shard(x), {"shards": shards}
        if way is not None and "FSDP2" in way:
            fully_shard(layer, mesh=mesh)
        out, loss = layer(part, **given)
        (out.float().square().sum() * world / seqlen + loss).backward()
        grads = {name: p.grad for name, p in zip(names, layer.parameters(), strict=True)}
        total = loss.detach().clone()
        dist.all_reduce(total)
        return (given["shards"].unshard(out) if given else out).detach(), total / mesh.size(), grads

    right_out, right_loss, right = run(None)
    wrong = []
    for way in WAYS:
        out, loss, grads = run(way)
        found = {"out": relative(out, right_out), "loss": relative(loss, right_loss)}
        found |= {name: relative(grads[name], grad) for name, grad in right.items()}
        wrong += [f"layer, {way}, {name}: off by {x:.1e}" for name, x in found.items() if not x < TOLERANCE]
    return wrong


def parallel(model: Any, mesh: DeviceMesh) -> Any:
    """The model, with the parameters of each layer over the processes."""
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def step(model: Any, ids: Tensor, shards: SequenceShards) -> Tensor:
    """A process's step on its tokens of the row: the loss, W times its part of the mean."""
    model.zero_grad(set_to_none=True)
    targets = torch.cat([ids[:, 1:], ids.new_full((ids.shape[0], 1), -100)], dim=1)
    part = shards.shard(ids)
    inputs = {"position_ids": shards.row_positions(), "shards": shards, "use_cache": False}
    labels = {"labels": part, "shift_labels": shards.shard(targets, fill=-100)}
    count = targets.ne(-100).sum() / shards.mesh.size()
    loss = model(part, **inputs, **labels, num_items_in_batch=count).loss
    loss.backward()
    found: Tensor = loss.detach()
    return found


def model_errors(mesh: DeviceMesh) -> list[str]:
    """What a short model computes otherwise than on one process."""
    return list(_model_errors(mesh)) if has_transformers() else []


def _model_errors(mesh: DeviceMesh) -> Iterator[str]:
    from . import gpu_model

    shape = SMALL if not GPU else Shape(layers=2)
    seqlen = 4096 if GPU else 200
    torch.manual_seed(1)
    ids = tokens(shape, seqlen)
    model = make_sparse(shape)
    right_loss = gpu_model.step(model, ids)
    right = {name: p.grad for name, p in model.named_parameters()}
    model = parallel(make_sparse(shape), mesh)
    loss = step(model, ids, SequenceShards(seqlen, mesh))
    dist.all_reduce(loss)
    found = {"loss": relative(loss / mesh.size(), right_loss)}
    found |= {name: relative(p.grad, right[name]) for name, p in model.named_parameters()}
    for name, x in found.items():
        if not x < MODEL_TOLERANCE:
            yield f"model, FSDP2 and CP, {name}: off by {x:.1e}"


def measure(seqlen: int, mesh: DeviceMesh) -> dict[str, Any]:
    """Milliseconds of a step on one process and over all, and the most memory of any process."""
    from . import gpu_model

    shape = SHAPE if GPU else SMALL
    torch.manual_seed(1)
    ids = tokens(shape, seqlen)
    model, repeats = make_sparse(shape), 2 if GPU else 1
    one = time_if_it_fits(lambda: gpu_model.step(model, ids), repeats)
    row = {"tokens": seqlen, "processes": mesh.size(), "one_ms": one}
    model = parallel(model, mesh)
    shards = SequenceShards(seqlen, mesh)
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    together = milliseconds(lambda: step(model, ids, shards), repeats)
    row |= {"step_ms": together, "memory_gib": peak_gib()}
    return row | {"efficiency": None if one is None else one / together / mesh.size()}
