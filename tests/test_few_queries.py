"""Few queries over many keys, without a cache: right, as `decode` has it, and no work that grows with the keys."""

import math
from functools import partial

import pytest
import torch
from helpers import lengths, make_inputs
from torch.utils._python_dispatch import TorchDispatchMode

import flexmsa
from flexmsa.kernels import torch as kernels
from flexmsa.kernels.torch import inverse_index
from flexmsa.kernels.torch.tile import max_tokens
from flexmsa.testing import Case, check_case

RAGGED = {"batch": 2, "kv_starts": (0, 37), "kv_lens": (300, 251)}
BLOCK, TOPK = 16, 4


@pytest.mark.parametrize("batch", [{}, RAGGED], ids=["whole rows", "ragged"])
@pytest.mark.parametrize("queries", [1, 3, 16, 24])
@pytest.mark.parametrize("seed", [0, 1], ids=["for few queries", "for many"])
def test_results_and_gradients(queries, batch, seed):
    heads = {"num_kv_heads": 2, "group_size": 3}
    check_case(Case(seqlen_q=queries, seqlen_k=300, topk=TOPK, block_size=BLOCK, seed=seed, **heads, **batch))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("values", ["zeros", "ties", "huge"])
def test_16_bits(values, dtype):
    """Where scores are equal, eager PyTorch's loss is exact, and shows how exact the lse is that ours is made from."""
    check_case(Case(group_size=2, seqlen_q=3, seqlen_k=100, topk=TOPK, dtype=dtype, values=values))


@pytest.mark.parametrize("least_filled", [0, math.inf], ids=["by block number", "by rank"])
@pytest.mark.parametrize("settings", [{}, {"batch": 3, "kv_starts": (0, 50, 99)}, {"cu_seqlens": (0, 1, 44, 100)}])
def test_both_orders_of_rounds(least_filled, settings, monkeypatch):
    monkeypatch.setattr(inverse_index, "LEAST_FILLED", least_filled)
    check_case(Case(num_kv_heads=2, group_size=2, seqlen_q=100, seqlen_k=100, block_size=8, topk=5, **settings))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 3, 16, 40])
def test_the_same_bits_as_decode(queries, dtype):
    inputs = make_inputs(300, dtype=dtype)
    q, k, v, index_q, index_k = inputs._replace(q=inputs.q[:, :, -queries:], index_q=inputs.index_q[:, :, -queries:])
    cache = flexmsa.MSACache(1, 2, 16, 16, capacity=300, dtype=dtype)
    cache.append(k, v, index_k)
    aux = flexmsa.AuxRequest(lse=True, block_indices=True)
    settings = {"block_size": BLOCK, "topk": TOPK, "return_aux": aux}
    expected, expected_aux = flexmsa.decode(q, cache, index_q, **settings)
    for requires_grad in (False, True):
        leaves = [x.detach().requires_grad_(requires_grad) for x in (q, k, v, index_q, index_k)]
        out, aux = flexmsa.attention(*leaves, **settings)
        assert torch.equal(out, expected)
        assert torch.equal(aux.lse, expected_aux.lse) and torch.equal(aux.block_indices, expected_aux.block_indices)


class Work(TorchDispatchMode):
    """Counts the elements that operators write."""

    INDEXED = ("index_copy_", "index_add_")

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name.removeprefix("aten::") in self.INDEXED:
            self.elements += args[3].numel()
            return result
        results = result if isinstance(result, (tuple, list)) else (result,)
        for returned, x in zip(func._schema.returns, results, strict=False):
            is_view = returned.alias_info is not None and not returned.alias_info.is_write
            if isinstance(x, torch.Tensor) and not is_view:
                self.elements += x.numel()
        return result


def work_of(seqlen_k, queries):
    """Elements written by the forward, the backward and the loss, without the gradients of all keys themselves."""
    inputs = make_inputs(seqlen_k, head_dim=64)
    q, k, v, index_q, index_k = inputs._replace(q=inputs.q[:, :, -queries:], index_q=inputs.index_q[:, :, -queries:])
    sequences = flexmsa.ops.sequence_table(q, None, None, None, seqlen_k)
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(seqlen_k // BLOCK, generator=generator)[:TOPK] for _ in range(2 * queries)])
    ids = ids.int().view(1, 2, queries, TOPK)
    with Work() as forward:
        out, lse = kernels.attend_blocks(q, k, v, ids, sequences, BLOCK, 0.1)
    with Work() as backward:
        kernels.block_sparse_attention_backward(out, None, q, k, v, out, lse, ids, sequences, BLOCK, 0.1)
    with Work() as loss:
        kernels.index_loss(q, k, index_q, index_k, ids, lse, sequences, BLOCK, 0.1, 0.1, True)
    return {
        "forward": forward.elements,
        "backward": backward.elements - k.numel() - v.numel(),
        "loss": loss.elements - index_k.numel(),
    }


@pytest.mark.parametrize("queries", [1, 16, 24])
def test_the_work_does_not_grow_with_the_keys(queries):
    few, many = work_of(2048, queries), work_of(32768, queries)
    for name, elements in few.items():
        assert many[name] < 1.25 * elements, name


def test_vmap():
    """Few queries take the way of training there: vmap has no rule for operators that write their arguments."""
    torch.manual_seed(0)
    tensors = [torch.randn(2, 1, heads, 40, 16) for heads in (4, 2, 2, 2, 1)]
    tensors[0], tensors[3] = tensors[0][:, :, :, -3:], tensors[3][:, :, :, -3:]
    attend = partial(flexmsa.attention, block_size=8, topk=2)
    found = torch.vmap(attend)(*tensors)
    torch.testing.assert_close(found, torch.stack([attend(*row) for row in zip(*tensors, strict=True)]))


def test_few_queries_make_few_tiles():
    """A tile per block number would be 500."""
    ids = torch.stack([torch.randperm(1024, generator=torch.Generator().manual_seed(i))[:TOPK] for i in range(256)])
    sequences = lengths(0, 0, 64, 0, 1024 * BLOCK)[None]
    index = inverse_index.InverseIndex(sequences, ids.int().view(1, 4, 64, TOPK), BLOCK, 1, 4, 64)
    (tokens,) = index.token_ranges(16, 128)
    assert len(list(index.tiles(tokens, max_tokens(16, 128, BLOCK)))) <= 2 * TOPK
