"""The Triton kernels through the public functions, against the NumPy oracle."""

import pytest
import torch
from hypothesis import given, settings

import flexmsa
from flexmsa.checkpoint import save_selection_policy
from flexmsa.kernels.triton.serving import launch as serving
from flexmsa.testing import Case, check_case, oracle
from flexmsa.testing.strategies import cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(
    case=cases(dtypes=("float32", "float16"), head_dims=(16, 80), block_sizes=(16, 48), max_tokens=120, warmup=False)
)
def test_selection_agrees_with_the_oracle(case):
    inputs, arguments = case.inputs("cpu")
    expected = oracle.attention(*(x.double().numpy() for x in inputs), **arguments)
    arguments = {name: value for name, value in arguments.items() if "scale" not in name}
    found = flexmsa.select_blocks(*inputs[3:], **arguments, backend="triton")
    assert torch.equal(found.long(), torch.from_numpy(expected.block_indices))


def test_decode_agrees_with_the_cpu_kernels():
    generator = torch.Generator().manual_seed(0)
    cache = flexmsa.MSACache(2, 2, 16, 16, capacity=90, kv_starts=torch.tensor([0, 7]))
    cache.append(*(torch.randn(2, h, 75, 16, generator=generator) for h in (2, 2, 1)))
    q, index_q = (torch.randn(2, h, 3, 16, generator=generator) for h in (6, 2))
    aux = flexmsa.AuxRequest(lse=True, block_indices=True)
    found, expected = (
        flexmsa.decode(q, cache, index_q, block_size=16, topk=3, backend=backend, return_aux=aux)
        for backend in ("triton", "torch")
    )
    assert torch.equal(found[1].block_indices, expected[1].block_indices)
    torch.testing.assert_close((found[0], found[1].lse), (expected[0], expected[1].lse))


SIZES = {"head_dims": (16, 32), "block_sizes": (5, 16, 48), "max_tokens": 60, "max_blocks": 4}


@settings(max_examples=9, derandomize=True, deadline=None, database=None)
@given(case=cases(dtypes=("float32",), **SIZES))
def test_training_agrees_with_the_oracle(case):
    check_case(case, backend="triton")


@settings(max_examples=4, derandomize=True, deadline=None, database=None)
@given(case=cases(dtypes=("float16",), **SIZES))
def test_half_precision_agrees_with_the_oracle(case):
    check_case(case, backend="triton")


@pytest.mark.parametrize("queries", [1, 3, 16])
def test_few_queries_train_without_the_tiles_of_the_forward(queries, monkeypatch):
    monkeypatch.setattr(serving, "block_sparse_attention_forward", None)
    ragged = {"batch": 2, "kv_starts": (0, 13), "kv_lens": (100, 77)}
    check_case(Case(num_kv_heads=2, group_size=3, seqlen_q=queries, seqlen_k=100, **ragged), backend="triton")


def loss_of(inputs, topk=2):
    aux = flexmsa.AuxRequest(index_loss=True)
    out, aux = flexmsa.attention(*inputs, block_size=8, topk=topk, backend="triton", return_aux=aux)
    return out.square().sum() + aux.index_loss


@pytest.mark.parametrize("topk", [2, None])
def test_one_graph_for_every_length(topk):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_of, fullgraph=True, dynamic=True, backend=counter)
    for seqlen in (20, 33):
        inputs = [x.requires_grad_() for x in Case(group_size=3, seqlen_q=seqlen, seqlen_k=seqlen).inputs("cpu")[0]]
        found, expected = (torch.autograd.grad(run(inputs, topk), inputs) for run in (compiled, loss_of))
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert counter.frame_count == 1


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing_gives_the_same_gradients(selective):
    from functools import partial

    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    inputs = [x.requires_grad_() for x in Case(group_size=3, seqlen_q=40, seqlen_k=40, values="ties").inputs("cpu")[0]]
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, save_selection_policy)} if selective else {}
    found = torch.autograd.grad(checkpoint(loss_of, inputs, use_reentrant=False, **contexts), inputs)
    for x, y in zip(found, torch.autograd.grad(loss_of(inputs), inputs), strict=True):
        assert torch.equal(x, y)


def test_operators_keep_their_contracts():
    inputs = Case(group_size=3, seqlen_q=20, seqlen_k=20).inputs("cpu")[0]
    q, k, v, index_q, index_k = (x.requires_grad_() for x in inputs)
    sequences = flexmsa.ops.sequence_table(q, None, None, None, 20)
    ids = flexmsa.select_blocks(index_q, index_k, block_size=8, topk=2)
    settings = (sequences, 8, 0.3, "triton")
    torch.library.opcheck(torch.ops.flexmsa.block_sparse_attention, (q, k, v, ids, *settings))
    lse = flexmsa.ops.block_sparse_attention(q, k, v, ids, *settings)[1].detach()
    loss = q.detach(), k.detach(), index_q, index_k, ids, lse, sequences, None, 8, 0.3, 0.3, True, "triton"
    torch.library.opcheck(torch.ops.flexmsa.index_loss, loss)
