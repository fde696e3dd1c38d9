"""The two ways to add up attention: plain sums where they are exact, a running softmax elsewhere."""

import pytest
import torch
from helpers import lengths, make_inputs

import flexmsa
from flexmsa.kernels.torch.softmax import PlainAttention
from flexmsa.testing import assert_close


def results(inputs, **settings):
    q, k, v, index_q, index_k = inputs
    ids = flexmsa.select_blocks(index_q, index_k, block_size=16, topk=3, **settings)
    settings |= {"block_size": 16, "return_aux": flexmsa.AuxRequest(lse=True)}
    return {
        name: flexmsa.block_sparse_attention(*(x.to(dtype) for x in (q, k, v)), ids, backend=backend, **settings)
        for name, backend, dtype in (
            ("ours", None, q.dtype),
            ("exact", "reference", torch.float64),
            ("baseline", "reference", q.dtype),
        )
    }


def check(inputs, **settings):
    found = results(inputs, **settings)
    (out, aux), (exact, exact_aux), (baseline, baseline_aux) = (found[name] for name in ("ours", "exact", "baseline"))
    assert_close("out", out, exact, baseline)
    assert_close("lse", aux.lse, exact_aux.lse, baseline_aux.lse)
    return PlainAttention.is_exact(out, aux.lse)


@pytest.mark.parametrize(("factor", "plain"), [(1.0, "all"), (40.0, "some"), (1000.0, "none")])
@pytest.mark.parametrize("settings", [{}, {"cu_seqlens": lengths(0, 1, 40, 96)}])
def test_both_ways_equal_the_reference(factor, plain, settings):
    inputs = make_inputs(96)
    share = check(inputs._replace(q=inputs.q * factor), **settings).float().mean()
    assert {"all": share == 1, "some": 0 < share < 1, "none": share < 0.1}[plain]


@pytest.mark.parametrize("score", [-200.0, -54.0, 0.0, 50.0, 200.0])
def test_scores_of_any_magnitude(score):
    """Weights far from 1: up to both limits of plain sums, and beyond."""
    inputs = make_inputs(96)
    direction = torch.ones(16) / 4
    q, k = (score * direction).expand_as(inputs.q), 4 * direction + inputs.k / 1000
    inputs = inputs._replace(q=q, k=k, v=inputs.v / 100)
    assert bool(check(inputs).all()) == (abs(score) < 55)


def test_a_row_depends_on_its_own_keys_alone():
    """If one query and one key of a document overflow, other documents keep their bits."""
    inputs, settings = make_inputs(96), {"cu_seqlens": lengths(0, 48, 96)}
    calm = results(inputs, **settings)["ours"][0]
    inputs.q[:, :, 20] *= 1000
    inputs.k[:, :, 10] *= 1000
    assert torch.equal(results(inputs, **settings)["ours"][0][:, :, 48:], calm[:, :, 48:])


def test_values_that_plain_sums_cannot_hold():
    inputs = make_inputs(96)
    check(inputs._replace(q=inputs.q * 20, v=inputs.v * 1e30))
