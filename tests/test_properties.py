"""Properties that hold for any input, on every backend that runs on a CPU."""

import itertools

import pytest
import torch
from helpers import lengths, make_inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

import flexmsa
from flexmsa import AuxRequest
from flexmsa.testing import assert_close, check_case
from flexmsa.testing.cases import VALUES
from flexmsa.testing.strategies import cases, packed_lengths

# A sum of such numbers is infinite or NaN, depending on the order.
_OVERFLOWS = 3e38
EVERYTHING = AuxRequest(lse=True, block_indices=True, index_loss=True)


@settings(max_examples=80)
@given(case=cases())
def test_agrees_with_the_oracle(case):
    check_case(case, backend="torch")


# The reference multiplies keys that no query sees by 0.
@settings(max_examples=80)
@given(case=cases(values=tuple(kind for kind in VALUES if kind != "unseen NaN")))
def test_the_reference_agrees_with_the_oracle(case):
    check_case(case, backend="reference")


@settings(max_examples=40)
@given(case=cases(dtypes=("bfloat16", "float16")))
def test_half_precision_agrees_with_the_oracle(case):
    check_case(case, backend="torch")


@settings(max_examples=30)
@given(case=cases(block_sizes=(1, 2, 5, 16, 100), head_dims=(16, 72)))
def test_odd_block_sizes_agree_with_the_oracle(case):
    check_case(case, backend="torch")


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("group_size", [1, 4, 5])
@pytest.mark.parametrize("topk", [5, 40, None])
def test_selecting_every_block_is_dense_attention(backend, group_size, topk):
    q, k, v, index_q, index_k = make_inputs(70, batch=2, group_size=group_size)
    out = flexmsa.attention(q, k, v, index_q, index_k, block_size=16, topk=topk, backend=backend)
    dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    assert_close("out", out, exact, dense)


def test_an_unselected_key_changes_nothing_and_has_no_gradient():
    inputs = make_inputs(96, requires_grad=True)
    ids = flexmsa.select_blocks(inputs.index_q, inputs.index_k, block_size=16, topk=2)
    query = 90
    out = flexmsa.block_sparse_attention(*inputs[:3], ids, block_size=16)
    out[:, :3, query].sum().backward()
    chosen = torch.zeros(96, dtype=torch.bool)
    for block in ids[0, 0, query].tolist():
        chosen[block * 16 : block * 16 + 16] = True
    chosen[query + 1 :] = False
    assert not chosen.all()
    assert (inputs.k.grad[0, 0, ~chosen] == 0).all() and (inputs.v.grad[0, 0, ~chosen] == 0).all()
    assert (inputs.k.grad[0, 1] == 0).all()
    assert (inputs.v.grad[0, 0, chosen] != 0).all()

    changed_k, changed_v = inputs.k.detach().clone(), inputs.v.detach().clone()
    changed_k[0, 0, ~chosen], changed_v[0, 0, ~chosen] = 100.0, -100.0
    changed = flexmsa.block_sparse_attention(inputs.q, changed_k, changed_v, ids, block_size=16)
    assert torch.equal(changed[:, :3, query], out[:, :3, query])


@pytest.mark.parametrize("topk", [2, None])
def test_a_future_key_changes_nothing(topk):
    inputs = make_inputs(60)
    out = flexmsa.attention(*inputs, block_size=16, topk=topk, return_aux=EVERYTHING)
    cut = 37
    changed = [x.clone() for x in inputs]
    for x in changed[1:3] + changed[4:]:
        x[:, :, cut:] = 1e3
    later = flexmsa.attention(*changed, block_size=16, topk=topk, return_aux=EVERYTHING)
    assert torch.equal(out[0][:, :, :cut], later[0][:, :, :cut])
    assert torch.equal(out[1].lse[:, :, :cut], later[1].lse[:, :, :cut])
    if topk is not None:
        assert torch.equal(out[1].block_indices[:, :, :cut], later[1].block_indices[:, :, :cut])


def _assert_same_alone(packed, alone, queries, row=slice(None)):
    out, aux = packed
    assert_close("out", alone[0], out[row, :, queries].double(), out[row, :, queries])
    if aux.block_indices is not None:
        assert torch.equal(alone[1].block_indices, aux.block_indices[row, :, queries])


@settings(max_examples=25)
@given(data=st.data(), block_size=st.sampled_from([4, 16]), topk=st.sampled_from([1, 3, None]))
def test_a_packed_document_equals_the_document_alone(data, block_size, topk):
    total = data.draw(st.integers(1, 120))
    offsets = data.draw(packed_lengths(total))
    inputs = make_inputs(total)
    settings = {"block_size": block_size, "topk": topk, "return_aux": EVERYTHING}
    packed = flexmsa.attention(*inputs, **settings, cu_seqlens=lengths(*offsets))
    weighted_loss = 0.0
    for first, last in itertools.pairwise(offsets):
        if first == last:
            continue
        document = slice(first, last)
        alone = flexmsa.attention(*inputs.rows(document, document), **settings)
        _assert_same_alone(packed, alone, document)
        weighted_loss += float(alone[1].index_loss) * (last - first)
    assert float(packed[1].index_loss) == pytest.approx(weighted_loss / total, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("topk", [2, None])
def test_a_padded_row_equals_the_row_alone(topk):
    inputs = make_inputs(50, batch=3)
    starts = [0, 13, 50]
    settings = {"block_size": 8, "topk": topk, "return_aux": EVERYTHING}
    padded = flexmsa.attention(*inputs, **settings, kv_starts=lengths(*starts))
    for row, start in enumerate(starts):
        batch, rest = slice(row, row + 1), slice(start, 50)
        if start < 50:
            alone = flexmsa.attention(*inputs.rows(rest, rest, batch), **settings)
            _assert_same_alone(padded, alone, rest, batch)
        assert (padded[0][row, :, :start] == 0).all()
        assert (padded[1].lse[row, :, :start] == -torch.inf).all()
        if topk is not None:
            assert (padded[1].block_indices[row, :, :start] == -1).all()


@settings(max_examples=40)
@given(data=st.data(), bad=st.sampled_from([torch.nan, torch.inf, -torch.inf, _OVERFLOWS]))
def test_numbers_that_are_not_finite_give_valid_ids(data, bad):
    seqlen = data.draw(st.integers(1, 100))
    block_size, topk = data.draw(st.sampled_from([4, 16])), data.draw(st.integers(1, 8))
    _, _, _, index_q, index_k = make_inputs(seqlen, batch=2)
    for x in (index_q, index_k):
        share = data.draw(st.sampled_from([0.0, 0.1, 1.0]))
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(seqlen)) < share] = bad
    ids = flexmsa.select_blocks(index_q, index_k, block_size=block_size, topk=topk)
    newest = (torch.arange(seqlen) // block_size)[:, None]
    assert ((ids >= -1) & (ids <= newest)).all()
    visible = newest + 1
    assert ((ids >= 0).sum(-1) == visible.clamp(max=topk).squeeze(-1)).all()
    assert (ids.amax(-1) == newest.squeeze(-1)).all()
    if bad != _OVERFLOWS:
        reference = flexmsa.select_blocks(index_q, index_k, block_size=block_size, topk=topk, backend="reference")
        assert torch.equal(ids, reference)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_e4m3_index_inputs_equal_the_same_numbers_in_float32(backend):
    index_q, index_k = torch.randn(2, 3, 70, 32), torch.randn(2, 1, 70, 32)
    index_k[0, 0, 20] = torch.nan
    stored = [x.to(torch.float8_e4m3fn) for x in (index_q, index_k)]
    settings = {"block_size": 8, "topk": 3, "backend": backend}
    ids = flexmsa.select_blocks(*stored, **settings)
    assert torch.equal(ids, flexmsa.select_blocks(*(x.float() for x in stored), **settings))
    assert not torch.equal(ids, flexmsa.select_blocks(index_q, index_k, **settings))


def test_autocast_does_not_cast_e4m3():
    stored = [torch.randn(2, heads, 70, 32).to(torch.float8_e4m3fn) for heads in (3, 1)]
    ids = flexmsa.select_blocks(*stored, block_size=8, topk=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ids, flexmsa.select_blocks(*stored, block_size=8, topk=3))


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("topk", [2, None])
def test_gradients_stay_in_their_branch(backend, topk):
    inputs = make_inputs(40, requires_grad=True)
    out, aux = flexmsa.attention(*inputs, block_size=8, topk=topk, backend=backend, return_aux=EVERYTHING)
    main = torch.autograd.grad(out.sum() + aux.lse.sum(), inputs, allow_unused=True, retain_graph=True)
    assert all(x is not None and x.abs().sum() > 0 for x in main[:3])
    assert main[3] is None and main[4] is None
    index = torch.autograd.grad(aux.index_loss, inputs, allow_unused=True)
    assert index[0] is None and index[1] is None and index[2] is None
    assert all(x is not None and x.abs().sum() > 0 for x in index[3:])


def test_block_indices_may_be_unsorted_and_repeated():
    q, k, v, _, _ = make_inputs(40)
    tidy = torch.tensor([0, 2, -1, -1]).expand(1, 2, 40, 4)
    untidy = torch.tensor([2, -1, 0, 2]).expand(1, 2, 40, 4)
    for backend in ("torch", "reference"):
        expected = flexmsa.block_sparse_attention(q, k, v, tidy.int(), block_size=8, backend=backend)
        found = flexmsa.block_sparse_attention(q, k, v, untidy, block_size=8, backend=backend)
        torch.testing.assert_close(found, expected)


def test_unseen_cache_slots_may_hold_anything():
    inputs = make_inputs(64)
    settings = {"block_size": 16, "topk": 2, "kv_starts": lengths(5), "kv_lens": lengths(50)}
    queries = inputs.rows(slice(40, 50), slice(None))
    clean = flexmsa.attention(*queries, **settings, return_aux=EVERYTHING)
    for x in (inputs.k, inputs.v, inputs.index_k):
        x[:, :, :5], x[:, :, 50:] = torch.nan, torch.nan
    dirty = flexmsa.attention(*queries, **settings, return_aux=EVERYTHING)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1].block_indices, dirty[1].block_indices)
    assert torch.equal(clean[1].index_loss, dirty[1].index_loss)
