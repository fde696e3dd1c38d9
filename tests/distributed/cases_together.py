"""Sequences that are cut over processes, beside other kinds of parallel: all equals one process's, in float64."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from flexmsa.distributed import (
    ContextParallel,
    SequenceShards,
    context_parallel_attention,
    global_index_loss_count,
    register_fsdp_methods,
    tensor_parallel_plan,
)

from .cases_tensor_parallel import LENGTHS, assert_same, gradients, inputs, new_layer, step


def cut(mesh, lengths, tokens=24, rows=2):
    documents = LENGTHS[lengths].get("cu_seqlens")
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32, device="cpu")
    return SequenceShards(tokens, mesh, batch_size=rows if documents is None else 1, cu_seqlens=offsets)


def total(x, mesh):
    x = x.detach().clone()
    torch.distributed.all_reduce(x, group=mesh.get_group())
    return x


def check_heads_and_tokens(mesh, in_backward, lengths, sequence_parallel):
    """Tokens over "dp", heads over "tp"."""
    expected = step(new_layer(in_backward=in_backward), *inputs(lengths))
    layer = new_layer(in_backward=in_backward)
    parallelize_module(layer, mesh["tp"], tensor_parallel_plan(layer, sequence_parallel=sequence_parallel))
    parallelize_module(layer, mesh["dp"], ContextParallel())
    x, weight, given = inputs(lengths)
    shards, world = cut(mesh["dp"], lengths), mesh["dp"].size()
    given.pop("cu_seqlens", None)
    part, weight = shards.shard(x.detach()), shards.shard(weight)
    if sequence_parallel:
        part, weight = (y.chunk(2, dim=1)[mesh["tp"].get_local_rank()] for y in (part, weight))
    found = step(layer, part.clone().requires_grad_(), weight * world, {**given, "shards": shards})
    for name in ("x", "out"):
        if sequence_parallel:
            parts = [torch.empty_like(found[name]) for _ in range(2)]
            torch.distributed.all_gather(parts, found[name].contiguous(), group=mesh["tp"].get_group())
            found[name] = torch.cat(parts, dim=1)
        found[name] = shards.unshard(found[name]).detach()
    found["x"] /= world
    for name, x in found.items():
        if name not in ("x", "out"):
            found[name] = total(x, mesh["dp"]) / world
    assert_same(found, expected)


def check_few_heads(mesh):
    layer = new_layer(num_kv_heads=1)
    parallelize_module(layer, mesh["tp"], tensor_parallel_plan(layer))
    shards = cut(mesh["dp"], "plain")
    with pytest.raises(ValueError, match=r"shards: expected at least 2 KV heads .*, got 1; use fewer"):
        layer(shards.shard(inputs("plain")[0]), shards=shards)


def check_batches_and_tokens(mesh, in_backward, checkpointed):
    """FSDP2 over all processes, tokens over "tp", batches over "dp", two micro-batches of unequal lengths each."""
    names = ("plain", "padded"), ("packed", "packed")
    batches = [[inputs(name, seed=3 * row + n) for n, name in enumerate(found)] for row, found in enumerate(names)]
    layer = new_layer(in_backward=in_backward)
    count = sum(layer.index_loss_count(x, **given) for row in batches for x, _, given in row)
    for x, weight, given in (batch for row in batches for batch in row):
        out, loss = layer(x, **given, index_loss_count=count)
        ((out * weight).sum() + loss).backward()
    expected = gradients(layer)

    layer = new_layer(in_backward=in_backward)
    parallelize_module(layer, mesh["tp"], ContextParallel())
    fully_shard(layer, mesh=mesh._flatten("all"), reshard_after_forward=checkpointed)
    here = mesh["dp"].get_local_rank()
    shards = [cut(mesh["tp"], name) for name in names[here]]
    steps = []
    for (x, weight, given), cuts in zip(batches[here], shards, strict=True):
        given.pop("cu_seqlens", None)
        steps.append((cuts.shard(x.detach()), cuts.shard(weight), {**given, "shards": cuts}))
    counts = sum(layer.index_loss_count(x, **given) for x, _, given in steps)
    counts = global_index_loss_count(counts, mesh["dp"])
    for x, weight, given in steps:
        out, loss = layer(x, **given, index_loss_count=counts)
        ((out * weight).sum() * mesh.size() + loss).backward()
    assert_same(gradients(layer), expected)


class Bytes(TorchDispatchMode):
    """What this process receives of others, in bytes, by collective."""

    def __init__(self, world):
        super().__init__()
        self.world, self.received = world, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2]
        if name in ("all_gather_into_tensor_coalesced", "all_to_all_single"):
            results = out if isinstance(out, list) else [out]
            size = sum(x.numel() * x.element_size() for x in results) * (self.world - 1) // self.world
            self.received[name] = self.received.get(name, 0) + size
        return out


def check_bytes(mesh):
    """Those that docs/distributed.md states, in 16 bits."""
    tokens, groups, size = 32, 2, 8
    shards, world = SequenceShards(tokens, mesh), mesh.size()
    own = [torch.randn(1, heads, tokens // world, size).bfloat16().requires_grad_() for heads in (4, 2, 2, 2, 1)]
    numbers = (world - 1) * tokens * (2 * groups * size + size) // world
    with Bytes(world) as forward:
        out = context_parallel_attention(*own, shards, block_size=4, topk=2)
    assert sum(forward.received.values()) == 2 * numbers, forward.received
    # Without a loss, index_k has no gradient.
    with Bytes(world) as backward:
        out.sum().backward()
    assert sum(backward.received.values()) == 2 * (numbers - (world - 1) * tokens * size // world), backward.received


class Stage(nn.Module):
    """A part of a model: it hands on the tokens, and the sum of the index losses so far, [1]."""

    def __init__(self, seed):
        super().__init__()
        self.layer = new_layer()
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.mul_(1 + 0.1 * seed)

    def forward(self, x, index_loss):
        out, loss = self.layer(x)
        return x + out, index_loss + loss.reshape(1)


def check_pipeline(mesh, schedule):
    """Two stages, four micro-batches."""
    x, weight, _ = inputs("plain", rows=4)
    x = x.detach()
    micro_batches, stages = x.shape[0], [Stage(0), Stage(1)]

    def loss_of(output, weight):
        return (output[0] * weight).sum() + output[1].sum()

    total_loss = 0.0
    for row, part in zip(x.split(1), weight.split(1), strict=True):
        output = row, torch.zeros(1, dtype=x.dtype)
        for stage in stages:
            output = stage(*output)
        loss = loss_of(output, part) / micro_batches
        loss.backward()
        total_loss += loss.detach()
    here = mesh.get_local_rank()
    expected = {name: p.grad.clone() for name, p in stages[here].named_parameters()}
    stages[here].zero_grad()
    stage = PipelineStage(stages[here], here, 2, torch.get_default_device(), group=mesh.get_group())
    losses: list = []
    run = schedule(stage, micro_batches, loss_fn=loss_of)
    if here == 0:
        run.step(x, torch.zeros(micro_batches, dtype=x.dtype))
    else:
        run.step(target=weight, losses=losses)
        torch.testing.assert_close(torch.stack(losses).mean().detach(), total_loss, rtol=1e-12, atol=0)
    assert_same({name: p.grad for name, p in stages[here].named_parameters()}, expected)


def check_methods_under_fsdp(mesh):
    """`project` and `generate` gather the weights, and let a forward that calls them have the weights to its end."""
    layer, (x, _, _) = new_layer().eval(), inputs("plain")
    x = x.detach()

    def results(layer, cache):
        with torch.no_grad():
            found = [*layer.project(x), layer.generate(x[:, :20], cache)[0], layer(x[:, 20:21], cache=cache)[0]]
        return [*found, layer(x)[0]]

    expected = results(layer, layer.new_cache(2, 24))
    with pytest.raises(ValueError, match="call this after fully_shard"):
        register_fsdp_methods(layer)
    caches = [layer.new_cache(2, 24) for _ in range(2)]
    fully_shard(layer, mesh=mesh)
    with pytest.raises(RuntimeError, match="DTensor"), torch.no_grad():
        layer.project(x)
    layer(x)
    register_fsdp_methods(layer)
    for cache in caches:
        torch.testing.assert_close(results(layer, cache), expected, rtol=1e-12, atol=1e-13)


CASES = {
    "methods under FSDP2": (check_methods_under_fsdp,),
    "bytes": (check_bytes,),
    **{f"pipeline {schedule.__name__}": (check_pipeline, schedule) for schedule in (ScheduleGPipe, Schedule1F1B)},
}
CASES_OF_FOUR = {
    **{
        f"heads and tokens {case}": (check_heads_and_tokens, *case)
        for case in product((False, True), LENGTHS, (False, True))
    },
    "few heads and tokens": (check_few_heads,),
    **{
        f"batches and tokens {case}": (check_batches_and_tokens, *case)
        for case in product((False, True), (False, True))
    },
}
