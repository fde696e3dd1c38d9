"""Packed documents with fewer queries than keys, and documents without tokens, on every backend of a CPU."""

import itertools

import pytest
import torch
from helpers import lengths, make_inputs
from torch.nn.attention.flex_attention import flex_attention

import flexmsa
from flexmsa import AuxRequest, MSAConfig, MSAttention, flex, pack_gqa, unpack_gqa
from flexmsa._sequences import check_sequences
from flexmsa.testing import Case, check_case

EVERYTHING = AuxRequest(lse=True, block_indices=True, index_loss=True)
# Of these keys, the queries are the last of each document; some have none, one has no keys either.
QUERIES, KEYS = (0, 5, 5, 21, 21, 30), (0, 5, 14, 50, 50, 90)
FULL, FILLED_UP = (0, 1, 20, 50), (0, 0, 1, 1, 1, 20, 50, 50, 50)
backends = pytest.mark.parametrize("backend", ["torch", "reference"])
topks = pytest.mark.parametrize("topk", [2, None])


def step(inputs, backend, topk, **offsets):
    """The results of a training step and their gradients."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    settings = {"block_size": 8, "topk": topk, "backend": backend, "return_aux": EVERYTHING}
    out, aux = flexmsa.attention(*inputs, **settings, **offsets)
    loss = out.square().sum() + aux.lse.masked_fill(~aux.lse.isfinite(), 0.0).sum() + aux.index_loss
    ids = torch.empty(0) if topk is None else aux.block_indices
    return out, aux.lse, aux.index_loss, ids, *torch.autograd.grad(loss, inputs)


@backends
@topks
def test_the_last_queries_of_documents_equal_documents_alone(backend, topk):
    inputs = make_inputs(90)
    queries = [key for q, k in zip(*map(itertools.pairwise, (QUERIES, KEYS)), strict=True) for key in _last(q, k)]
    ragged = [x[:, :, queries] if n in (0, 3) else x for n, x in enumerate(inputs)]
    offsets = {"cu_seqlens_q": lengths(*QUERIES), "cu_seqlens_k": lengths(*KEYS)}
    out, lse, _, ids, *_ = step(ragged, backend, topk, **offsets)
    for (first, stop), (k_first, k_stop) in zip(*map(itertools.pairwise, (QUERIES, KEYS)), strict=True):
        if first < stop:
            alone = inputs.rows(slice(k_stop - (stop - first), k_stop), slice(k_first, k_stop))
            expected = step(alone, backend, topk)
            torch.testing.assert_close(out[:, :, first:stop], expected[0])
            torch.testing.assert_close(lse[:, :, first:stop], expected[1])
            assert topk is None or torch.equal(ids[:, :, first:stop], expected[3])


def _last(queries, keys):
    return range(keys[1] - (queries[1] - queries[0]), keys[1])


@backends
@topks
def test_the_last_queries_of_documents_agree_with_the_oracle(backend, topk):
    sizes = {"num_kv_heads": 2, "group_size": 3, "block_size": 8, "topk": topk}
    check_case(Case(seqlen_q=30, seqlen_k=90, cu_seqlens_q=QUERIES, cu_seqlens_k=KEYS, **sizes), backend=backend)


@backends
@topks
def test_documents_without_tokens_change_nothing(backend, topk):
    inputs = make_inputs(50)
    expected = step(inputs, backend, topk, cu_seqlens=lengths(*FULL))
    found = step(inputs, backend, topk, cu_seqlens=lengths(*FILLED_UP))
    assert all(map(torch.equal, found, expected))
    both = {"cu_seqlens_q": lengths(*FILLED_UP), "cu_seqlens_k": lengths(*FILLED_UP)}
    assert all(map(torch.equal, step(inputs, backend, topk, **both), expected))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_takes_the_offsets_of_queries_and_keys():
    inputs = make_inputs(90)
    q, index_q = inputs.q[:, :, :30], inputs.index_q[:, :, :30]
    offsets = {"cu_seqlens_q": lengths(*QUERIES), "cu_seqlens_k": lengths(*KEYS)}
    ids = flexmsa.select_blocks(index_q, inputs.index_k, block_size=8, topk=2, **offsets)
    sequences = check_sequences(q, 90, None, None, None, **offsets)
    mask = flex.selection_block_mask(ids, 6, 8, sequences, with_backward=False)
    found = unpack_gqa(flex_attention(pack_gqa(q, 2), *inputs[1:3], block_mask=mask), 6)
    how = {"block_size": 8, "backend": "reference"}
    torch.testing.assert_close(found, flexmsa.block_sparse_attention(q, *inputs[1:3], ids, **how, **offsets))


def test_a_layer_takes_documents_without_tokens():
    layer = MSAttention(MSAConfig(32, 4, 2, head_dim=16, index_head_dim=16, block_size=8, topk=2))
    x = torch.randn(1, 50, 32)
    results = [layer(x, cu_seqlens=lengths(*offsets), with_index_loss=True) for offsets in (FULL, FILLED_UP)]
    assert all(map(torch.equal, *results))


def test_single_steps_take_the_offsets_of_queries_and_keys():
    q, k, v, index_q, index_k = make_inputs(90)
    q, index_q = q[:, :, :30], index_q[:, :, :30]
    how = {"block_size": 8, "cu_seqlens_q": lengths(*QUERIES), "cu_seqlens_k": lengths(*KEYS)}
    out, aux = flexmsa.attention(q, k, v, index_q, index_k, topk=2, return_aux=EVERYTHING, **how)
    ids = flexmsa.select_blocks(index_q, index_k, topk=2, **how)
    assert torch.equal(ids, aux.block_indices)
    assert torch.equal(flexmsa.block_sparse_attention(q, k, v, ids, **how), out)
    assert torch.equal(flexmsa.index_loss(q, k, index_q, index_k, ids, aux.lse, **how), aux.index_loss)
