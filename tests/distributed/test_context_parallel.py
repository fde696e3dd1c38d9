"""Attention of sequences that are cut over processes: the same as on one."""

import itertools
import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.experimental import context_parallel
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

from benchmarks import distributed as benchmark
from benchmarks import gpu_shares
from flexmsa import AuxRequest, MSAConfig, MSAttention, _core, attention, ops
from flexmsa._sequences import Sequences
from flexmsa.distributed import ContextParallel, SequenceShards, context_parallel_attention
from flexmsa.kernels.rules import SelectionRule

from .processes import device_type, run

DOCUMENTS = (0, 3, 3, 21, 46, 64)
ALL = AuxRequest(lse=True, block_indices=True, index_loss=True)
LAYOUTS = ("head-tail", "contiguous")
CASES = {
    "whole": {},
    "lengths that do not divide": {"seqlen": 59},
    "two rows": {"batch_size": 2},
    "packed": {"cu_seqlens": DOCUMENTS},
    "packed, padded at the end": {"cu_seqlens": (0, 3, 10, 29), "seqlen": 29},
    "left padding": {"batch_size": 2, "kv_starts": (5, 37)},
    "warm-up": {"topk": None, "cu_seqlens": DOCUMENTS},
    "loss in the backward": {"deferred": True},
}


def inputs(seqlen, batch_size):
    torch.manual_seed(0)
    heads = 4, 2, 2, 2, 1
    return [torch.randn(batch_size, h, seqlen, 8, dtype=torch.float64, requires_grad=True) for h in heads]


def settings(case):
    starts = case.get("kv_starts")
    kv_starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    return {"block_size": 4, "topk": case.get("topk", 3), "kv_starts": kv_starts}


def cut(case, layout):
    mesh = init_device_mesh(device_type(), (torch.distributed.get_world_size(),))
    documents = case.get("cu_seqlens")
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32, device="cpu")
    sizes = {"batch_size": case.get("batch_size", 1), "cu_seqlens": offsets}
    return SequenceShards(case.get("seqlen", 64), mesh, **sizes, layout=layout)


def gradients(out, loss, tensors):
    """Of a sum whose terms depend on the place of the output."""
    weights = torch.linspace(-1, 1, out.shape[2], dtype=out.dtype)[None, None, :, None]
    return torch.autograd.grad(((out * weights).sum(), loss), tensors)


def alone(case):
    """The results of one process."""
    tensors = inputs(case.get("seqlen", 64), case.get("batch_size", 1))
    documents = case.get("cu_seqlens")
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    out, aux = attention(*tensors, **settings(case), cu_seqlens=offsets, return_aux=ALL)
    return out, aux, gradients(out, aux.index_loss, tensors)


def together(name, layout):
    """Whether ids are those of one process and padding gives 0; and the differences of all else."""
    case = CASES[name]
    shards = cut(case, layout)
    out, aux, grads = alone(case)
    whole = inputs(case.get("seqlen", 64), case.get("batch_size", 1))
    value = torch.zeros((), dtype=torch.float64)
    how = {"index_loss_value": value if case.get("deferred") else None}
    parts = [shards.shard(x, dim=2) for x in whole]
    part, found = context_parallel_attention(*parts, shards, **settings(case), return_aux=ALL, **how)
    weights = shards.shard(torch.linspace(-1, 1, out.shape[2], dtype=out.dtype), dim=0)[None, None, :, None]
    world = shards.mesh.size()
    # Parameters are averaged over processes: here, a tensor of the whole row stands for a parameter.
    partial = torch.autograd.grad((world * (part * weights).sum(), found.index_loss), whole)
    averages = [_sum(grad) / world for grad in partial]
    loss = _sum(value if case.get("deferred") else found.index_loss.detach()) / world
    real = shards.tokens >= 0
    ids = found.block_indices is None or torch.equal(
        found.block_indices[:, :, real], aux.block_indices[:, :, shards.tokens[real]]
    )
    pairs = [
        (part[:, :, real], out[:, :, shards.tokens[real]]),
        (found.lse[:, :, real], aux.lse[:, :, shards.tokens[real]]),
        (shards.unshard(part, dim=2), out),
        (loss, aux.index_loss),
        *zip(averages, grads, strict=True),
    ]
    exact = ids and not part[:, :, ~real].any().item()
    return exact, [torch.where(x == y, 0.0, x - y).abs().max().item() for x, y in pairs]


def _sum(x):
    x = x.clone()
    torch.distributed.all_reduce(x)
    return x


CONFIG = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8, index_head_dim=8, block_size=4, topk=3)


def new_layer(**changes):
    torch.manual_seed(1)
    return MSAttention(replace(CONFIG, **changes)).double()


WRAPPED = list(product(("ddp", "fsdp"), (False, True)))


def train_layer(wrap, in_backward):
    """Differences of a layer that averages its gradients from one process: of its gradients and out, and its loss."""
    documents = torch.tensor(DOCUMENTS, dtype=torch.int32)
    torch.manual_seed(2)
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    weights = torch.linspace(-1, 1, 64, dtype=torch.float64)[None, :, None]
    layer = new_layer()
    out, loss = layer(x, cu_seqlens=documents)
    ((out * weights).sum() + loss).backward()
    shards = cut({"cu_seqlens": DOCUMENTS}, "head-tail")
    parallel = new_layer(loss_in_backward=in_backward)
    parallelize_module(parallel, shards.mesh, ContextParallel())
    world = shards.mesh.size()
    wrapped = DistributedDataParallel(parallel) if wrap == "ddp" else fully_shard(parallel, mesh=shards.mesh)
    part, part_loss = wrapped(shards.shard(x), shards=shards)
    (world * (part * shards.shard(weights)).sum() + part_loss).backward()
    value = _sum((parallel.index_loss_value if in_backward else part_loss).detach().double()) / world
    parameters = zip(parallel.parameters(), layer.parameters(), strict=True)
    grads = ((p.grad.full_tensor() if wrap == "fsdp" else p.grad, q.grad) for p, q in parameters)
    pairs = [(shards.unshard(part), out), *grads]
    return [(a - b).abs().max().item() for a, b in pairs], (value - loss).abs().item()


def compile_layer():
    """Differences of a compiled layer from an eager one, in out, loss and gradients, for parts of two lengths.

    And without gradients, and with a frozen index branch.
    """
    layer, errors = new_layer(), []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for case in ({"cu_seqlens": DOCUMENTS}, {"seqlen": 51}):
        shards, generator = cut(case, "head-tail"), torch.Generator(device_type()).manual_seed(3)
        x = shards.shard(torch.randn(1, shards.seqlen, 32, dtype=torch.float64, generator=generator))
        found = []
        for run_layer in (layer, compiled):
            out, loss = run_layer(x, shards=shards)
            found.append((out, loss, *torch.autograd.grad(out.square().sum() + loss, layer.parameters())))
        errors += [(a - b).abs().max().item() for a, b in zip(*found, strict=True)]
    shards = cut({}, "head-tail")
    x = shards.shard(torch.linspace(-1, 1, 64 * 32, dtype=torch.float64).view(1, 64, 32))
    with torch.no_grad():
        errors.append((compiled(x, shards=shards)[0] - layer(x, shards=shards)[0]).abs().max().item())
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("index" not in name)
    errors.append((compiled(x, shards=shards)[0] - layer(x, shards=shards)[0]).abs().max().item())
    return errors


def refuse():
    """The messages of calls that would take a part as the whole."""
    shards, messages = cut({}, "head-tail"), []
    layer = new_layer()
    parallelize_module(layer, shards.mesh, ContextParallel())
    x = torch.randn(1, 64, 32, dtype=torch.float64)
    inputs_of_one = [x.detach() for x in inputs(64, 1)]

    def inside():
        mesh = shards.mesh
        buffer = torch.zeros(1, 64, 4)
        with context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1]):
            attention(*inputs_of_one, block_size=4, topk=3)

    calls = (
        lambda: layer(shards.shard(x)),
        inside,
        lambda: new_layer()(shards.shard(x), shards=shards, cu_seqlens=torch.tensor(DOCUMENTS)),
        lambda: context_parallel_attention(*inputs_of_one, shards),
        lambda: shards.shard(x[:, :9]),
        lambda: SequenceShards(64, shards.mesh, cu_seqlens=torch.tensor([0, 63], device="cpu")),
        lambda: SequenceShards(64, shards.mesh, layout="striped"),
        lambda: SequenceShards(64, shards.mesh, length_multiple=0),
        lambda: new_layer().eval()(shards.shard(x), shards=shards, cache=new_layer().double().new_cache(1, 64)),
        lambda: new_layer()(shards.shard(x), shards=shards, kv_starts=torch.tensor([65], dtype=torch.int32)),
        lambda: cut({"cu_seqlens": DOCUMENTS}, "head-tail").row_positions(torch.tensor([3])),
        lambda: new_layer()(
            shards.shard(x), shards=cut({"cu_seqlens": DOCUMENTS}, "head-tail"), kv_starts=torch.tensor([3])
        ),
    )
    for call in calls:
        try:
            call()
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def measure(folder):
    """What the benchmark returns; the first process writes the results."""
    return benchmark.main(["--out", folder, "--tokens", "300"])


def cut_evenly():
    """The most tokens of a process, of many documents whose lengths do not divide; and a tensor of one dimension."""
    lengths = (1, 2, 3, 5) * 50
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cpu")
    mesh = init_device_mesh(device_type(), (torch.distributed.get_world_size(),))
    shards = SequenceShards(int(offsets[-1]), mesh, cu_seqlens=offsets)
    whole = torch.arange(shards.seqlen)
    return shards.length * mesh.size() / shards.seqlen, torch.equal(shards.unshard(shards.shard(whole, 0), 0), whole)


# How the messages of `refuse` begin.
REFUSALS = (
    "shards: expected SequenceShards of the mesh of ContextParallel, got None",
    "flexmsa inside torch's context_parallel()",
    "cu_seqlens: expected None with shards, which know the documents",
    "q, k: expected 1 rows of",
    "x: expected 64 tokens along dimension 1, got [1, 9, 32]",
    "cu_seqlens: expected offsets that rise from 0 to 64, got [0, 63]",
    'layout: expected "head-tail" or "contiguous"',
    "length_multiple: expected an int >= 1, got 0",
    "cache: expected alone, got it with cu_seqlens, kv_starts, shards",
    "kv_starts, kv_lens: expected 0 <= kv_starts <= kv_lens <= 64",
    "kv_starts: expected None with cu_seqlens",
    "kv_starts: expected None with cu_seqlens",
)


def run_all():
    """All that the test looks at; with four processes, which take longer to do the same, what may differ from two."""
    two = torch.distributed.get_world_size() == 2
    layouts = LAYOUTS if two else ["head-tail"]
    return {
        "attention": {case: together(*case) for case in product(CASES, layouts)},
        "averaged": {case: train_layer(*case) for case in WRAPPED} if two else {},
        "compiled": compile_layer() if two else [],
        "cut": cut_evenly(),
        "refused": refuse(),
    }


@pytest.mark.parametrize("rank", range(3))
@pytest.mark.parametrize("seqlen", [65, 4, 1])
def test_a_part_is_selected_as_a_sequence_of_its_length(seqlen, rank, monkeypatch):
    """Kernels for long sequences are chosen by lengths that the host knows."""
    select, calls = ops.select_blocks, []

    def noted(index_q, index_k, table, *how):
        calls.append((index_q.shape[2], index_k.shape[2], table.tolist()))
        return select(index_q, index_k, table, *how)

    _, _, _, index_q, index_k = (x.detach() for x in inputs(seqlen, 1))
    with gpu_shares.shards_of(seqlen, rank, 3, None) as shards:
        index_q, ranges = shards.shard(index_q, 2), [part for part in shards.ranges if part[0] < part[1]]
        known, unknown = (Sequences(index_q, seqlen, table=shards.fragments, ranges=x) for x in (shards.ranges, None))
        monkeypatch.setattr(ops, "select_blocks", noted)
        ids, expected = (_core.select_blocks(index_q, index_k, x, SelectionRule(4, 3), None) for x in (known, unknown))
    # One sequence each, whose queries are its last tokens.
    parts = [(stop - start, stop, [[0, 0, stop - start, 0, stop]]) for start, stop in ranges]
    assert calls == [*parts, (shards.length, seqlen, shards.fragments.tolist())]
    own = [token for part in ranges for token in range(*part)]
    assert shards.tokens[: len(own)].tolist() == own
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process(world):
    for found in run(world, run_all):
        assert len(found["attention"]) == len(CASES) * (2 if world == 2 else 1)
        for case, (exact, errors) in found["attention"].items():
            assert exact and all(error < 1e-12 for error in errors), (case, errors)
        assert len(found["averaged"]) == (len(WRAPPED) if world == 2 else 0)
        for (wrap, in_backward), (errors, loss) in found["averaged"].items():
            assert all(error < 1e-12 for error in errors), (wrap, in_backward, errors)
            # In the backward, the value is kept in float32.
            assert loss < (1e-6 if in_backward else 1e-12), (wrap, in_backward)
        assert len(found["compiled"]) > 8 or world == 4
        assert all(error < 1e-12 for error in found["compiled"]), found["compiled"]
        padded, same = found["cut"]
        assert same and padded < 1.1
        for message, start in zip(found["refused"], REFUSALS, strict=True):
            assert message.startswith(start), message


def test_the_benchmark(tmp_path):
    assert run(2, measure, str(tmp_path)) == [0, 0]
    results = json.loads((tmp_path / "distributed.json").read_text())
    for part in ("attention", "model"):
        (row,) = results[part]
        assert row["processes"] == 2 and row["step_ms"] > 0 and row["efficiency"] > 0
    (row,) = results["decode"]
    assert min(row["one_us"], row["heads_us"], row["keys_us"]) > 0
