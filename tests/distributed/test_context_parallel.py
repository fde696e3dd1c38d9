"""Attention of sequences that are cut over processes: the same as on one."""

from itertools import product

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from flexmsa import AuxRequest, attention
from flexmsa.distributed import SequenceShards, context_parallel_attention

from .processes import run

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
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    documents = case.get("cu_seqlens")
    offsets = None if documents is None else torch.tensor(documents, dtype=torch.int32)
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
    return exact, [(x - y).nan_to_num().abs().max().item() for x, y in pairs]


def _sum(x):
    x = x.clone()
    torch.distributed.all_reduce(x)
    return x


def run_all():
    return [together(*case) for case in product(CASES, LAYOUTS)]


@pytest.fixture(scope="module", params=[2, 4], ids=["2 processes", "4 processes"])
def found(request):
    results = run(request.param, run_all)
    return dict(zip(product(CASES, LAYOUTS), zip(*results, strict=True), strict=True))


@pytest.mark.parametrize("case", list(product(CASES, LAYOUTS)), ids=", ".join)
def test_as_on_one_process(case, found):
    for exact, errors in found[case]:
        assert exact and max(errors) < 1e-12, errors
