"""A row that is certified from int8 scores has the ids of 16 bits, whatever the keys are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flexmsa
from benchmarks.selection_8_bits import (
    SUMMED,
    block_maxima,
    certify,
    choose,
    exact_scores,
    growth,
    pad_keys,
    quantise,
    rotate,
    rough_scores,
    visible_blocks,
)

BLOCK, GROUPS, ROWS = 8, 2, 24


def normal(q, k, generator):
    pass


def integers(q, k, generator):
    k.copy_(torch.randint(-2, 3, k.shape, generator=generator))
    q.copy_(torch.randint(-2, 3, q.shape, generator=generator))


def all_equal(q, k, generator):
    k.copy_(k[:1].clone())


def nearly_equal(q, k, generator):
    k.copy_(k[:1] * (1 + 2.0**-8 * torch.randint(0, 2, k.shape, generator=generator)))


def one_huge_key(q, k, generator):
    k[len(k) // 3] *= 1e6


def huge_channel(q, k, generator):
    k[:, 0] *= 300
    q[..., 1] *= 300


def not_finite(q, k, generator):
    k[3, 1], k[len(k) // 2, 0], k[-1 - 2 * BLOCK, 0] = torch.nan, torch.inf, -torch.inf
    q[0, 5, 0], q[1, 7, 0] = torch.nan, torch.inf


def zeros(q, k, generator):
    k[: len(k) // 2] = 0
    q[:, ::3] = 0


def tiny(q, k, generator):
    k[: len(k) // 2] *= 1e-39
    q[:, ::2] *= 1e-39


def near_the_largest(q, k, generator):
    k[::5] *= 3e37
    q[:, ::4] *= 1e38


def errors_along_a_query(q, k, generator):
    """Keys whose rounding errors all point along one query, up or down by blocks: nearly as large as their bound."""
    turned = rotate(k)
    scale = turned.abs().amax(-1, keepdim=True) / 127
    steps = (turned / scale).round()
    up = (torch.arange(len(k)) // BLOCK % 2 * 2 - 1)[:, None] * rotate(q[0, -1]).sign()
    # The largest number makes the scale, and stays.
    turned = (steps + 0.45 * up * (steps.abs() < 127)) * scale
    k.copy_(rotate(turned)[:, : k.shape[1]] / growth(k.shape[1]))


KINDS = [
    *(normal, integers, all_equal, nearly_equal, one_huge_key, huge_channel, not_finite, zeros, tiny),
    *(near_the_largest, errors_along_a_query),
]


def draw(kind, size, num_keys, seed):
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(num_keys, size, generator=generator)
    q = torch.randn(GROUPS, ROWS, size, generator=generator)
    kind(q, k, generator)
    return q.bfloat16(), k.bfloat16()


def certified(q, k, topk, scores, shared):
    """(selected, certified): blocks [GROUPS, ROWS, blocks] without the newest one; scores of 16 bits."""
    visible = visible_blocks(ROWS, len(k), BLOCK)
    rough = rough_scores(quantise(q), quantise(pad_keys(k, BLOCK), shared), BLOCK)
    return certify(choose(rough, visible, topk - 1, k.shape[1]), scores, topk - 1)


cases = given(
    st.sampled_from(KINDS), st.sampled_from([16, 24, 64, 128]), st.integers(40, 400), st.integers(1, 8), st.booleans()
)


@cases
@settings(max_examples=150, deadline=None, derandomize=True)
def test_certified_rows_have_the_ids_of_flexmsa(kind, size, num_keys, topk, per_token):
    q, k = draw(kind, size, num_keys, seed=num_keys)
    # In fp64 both compute the same scores, but for orders of summation, which change no id of random numbers.
    scores = exact_scores(q, pad_keys(k, BLOCK), BLOCK)
    selected, sure = certified(q, k, topk, scores, 1 if per_token else BLOCK)
    ids = flexmsa.select_blocks(q.double()[None], k.double()[None, None], block_size=BLOCK, topk=topk)[0]
    wanted = torch.zeros(*selected.shape[:2], selected.shape[2] + 1, dtype=torch.bool)
    wanted.scatter_(2, torch.where(ids < 0, selected.shape[2], ids).long(), True)
    own = torch.arange(len(k) - ROWS, len(k)) // BLOCK
    wanted[:, torch.arange(ROWS), own] = False
    assert torch.equal(selected[sure], wanted[..., :-1][sure])
    if kind in (normal, one_huge_key, huge_channel):
        assert sure.double().mean() > 0.8


@cases
@settings(max_examples=150, deadline=None, derandomize=True)
def test_certified_rows_hold_for_any_rounding_of_16_bits(kind, size, num_keys, topk, per_token):
    """Scores may be off by half of what SUMMED allows, in whatever direction."""
    q, k = draw(kind, size, num_keys, seed=num_keys)
    padded = pad_keys(k, BLOCK).double()
    products = q.double() @ padded.mT
    largest = SUMMED / 2 * q.double().norm(dim=-1)[..., None] * padded.norm(dim=-1)
    signs = torch.randint(0, 2, products.shape, generator=torch.Generator().manual_seed(topk)) * 2 - 1
    scores = block_maxima(products + largest * signs, BLOCK)
    selected, sure = certified(q, k, topk, scores, 1 if per_token else BLOCK)
    hidden = ~visible_blocks(ROWS, len(k), BLOCK)
    order = scores.masked_fill(hidden, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[..., : topk - 1]
    wanted = torch.zeros_like(selected).scatter_(-1, order, True) & ~hidden
    assert torch.equal(selected[sure], wanted[sure])


@pytest.mark.parametrize("size", [16, 24, 64, 128, 256])
def test_the_bound_holds_and_can_be_reached(size):
    """The error of a score is within its bound. Errors of keys, half of the bound, are reached along a query."""
    q, k = draw(errors_along_a_query, size, 256, seed=size)
    rough = rough_scores(quantise(q), quantise(k, 1), BLOCK)
    share = (rough.score - exact_scores(q, k, BLOCK)).abs() / rough.bound
    assert share.max() <= 1
    assert share[0, -1].max() > 0.25
