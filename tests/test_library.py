"""Operators are made below custom_op: they import no compiler, and tell autograd and Dynamo what custom_op tells."""

import subprocess
import sys

import pytest
import torch
from helpers import make_inputs
from torch._dynamo.testing import CompileCounterWithBackend

import flexmsa
from flexmsa import ops
from flexmsa.kernels import torch as torch_kernels

SEQUENCES = torch.tensor([[0, 0, 8, 0, 8]], dtype=torch.int32)
FIRST_STEP = """
import sys
import torch
before = set(sys.modules)
import flexmsa
q, index = torch.randn(1, 2, 8, 16, requires_grad=True), torch.randn(1, 1, 8, 16, requires_grad=True)
aux = flexmsa.AuxRequest(index_loss=True)
out, aux = flexmsa.attention(q, q[:, :1], q[:, :1], index, index, block_size=4, topk=2, return_aux=aux)
(out.sum() + aux.index_loss).backward()
cache = flexmsa.MSACache(1, 1, 16, 16, capacity=8)
with torch.no_grad():
    cache.append(q[:, :1], q[:, :1], index)
    flexmsa.decode(q, cache, index, block_size=4, topk=2)
assert q.grad is not None and index.grad is not None
print(*(name for name in sys.argv[1:] if name in set(sys.modules) - before))
"""


def test_the_first_step_does_not_import_the_compiler():
    heavy = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "sympy", "triton")
    found = subprocess.run([sys.executable, "-c", FIRST_STEP, *heavy], capture_output=True, text=True, check=True)
    assert found.stdout.split() == []


def new_cache():
    cache = flexmsa.MSACache(1, 2, 16, 16, capacity=24)
    new = make_inputs(5)
    return cache, lambda: cache.append(new.k, new.v, new.index_k)


def versions(cache):
    return [x._version for x in (cache.k, cache.v, cache.index_k, cache.kv_lens)]


@pytest.mark.parametrize("compiled", [False, True])
def test_an_append_is_a_write_for_autograd(monkeypatch, compiled):
    """Whatever the kernel is: those in Triton tell autograd nothing."""
    monkeypatch.setattr(torch_kernels, "append", lambda *args: None)
    cache, append = new_cache()
    if compiled:
        append = torch.compile(append, fullgraph=True, backend="aot_eager")
    before = versions(cache)
    weight = torch.ones(16, requires_grad=True)
    product = cache.k * weight
    append()
    assert all(now > then for now, then in zip(versions(cache), before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_an_append_in_inference_mode():
    with torch.inference_mode():
        cache, append = new_cache()
        append()
    assert cache.kv_lens.tolist() == [5]


def test_operators_without_a_gradient_raise_in_the_backward():
    q, k, v, index_q, index_k = make_inputs(8, requires_grad=True)
    out, _ = ops.block_sparse_attention(q, k, v, None, SEQUENCES, 4, 0.25, "torch")
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match=r"block_sparse_attention_backward.* has no gradient: second derivatives"):
        grad.sum().backward()
    ids = ops.select_blocks(index_q, index_k, SEQUENCES, 4, 2, 1, 0, "torch")
    assert not ids.requires_grad


def test_the_compiler_does_not_look_into_an_operator():
    """Where Dynamo gives up on a function, it still tries those that the function calls."""
    index_q, index_k = make_inputs(8)[3:]

    def select():
        with open(__file__):
            torch._dynamo.graph_break()
            return torch.ops.flexmsa.select_blocks(index_q, index_k, SEQUENCES, 4, 2, 1, 0, "torch")

    counter = CompileCounterWithBackend("eager")
    assert torch.equal(torch.compile(select, backend=counter)(), select())
    assert [node for graph in counter.graphs for node in graph.graph.nodes if node.op == "call_function"] == []
