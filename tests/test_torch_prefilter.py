"""The bf16 prefilter of the selection never rules out a block that may be chosen."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmsa.kernels import torch as torch_kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.torch import fp8, selection
from flexmsa.kernels.torch.index_keys import IndexKeys, Queries
from flexmsa.kernels.torch.packing import Scratch
from flexmsa.kernels.torch.prefilter import best_blocks, least_scores, rough_error, rough_maxima

BLOCK, TOPK = 8, 3
CASES = {
    # name: (Hkv, Sq, keys, largest integer, local, init)
    "one token": (4, 1, 1600, 9, 1, 0),
    "ties": (2, 1, 1600, 1, 1, 0),
    "tokens on both sides of a block boundary": (3, 3, 1593, 9, 1, 0),
    "forced": (2, 2, 1603, 9, 2, 1),
    "all forced": (1, 1, 1603, 9, 2, 1),
}


def selected(monkeypatch, used, *arguments):
    """The selection on a CPU with bf16 products, or without if `used` is None; `used` gets the prefilter's results."""

    def noting(*arguments):
        found = best_blocks(*arguments)
        used.append(found)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(selection, "multiplies_bf16", lambda: used is not None)
        patch.setattr(selection, "best_blocks", noting)
        return torch_kernels.select_blocks(*arguments)


def assert_same_selection(monkeypatch, used, index_q, index_k, scale=None, num_keys=400):
    sequences = torch.tensor([[0, 0, 1, 0, num_keys]], dtype=torch.int32)
    arguments = index_q, index_k, sequences, SelectionRule(BLOCK, TOPK), None, scale
    assert torch.equal(selected(monkeypatch, used, *arguments), selected(monkeypatch, None, *arguments))


def in_format(index_k, fp8_keys):
    """index_k and index_k_scale, as select_blocks takes them."""
    return fp8.quantize(index_k) if fp8_keys else (index_k, None)


def in_pages(x, table):
    pages = torch.empty_like(x).view(-1, 1, BLOCK, *x.shape[3:])
    pages[table[0].long()] = x.view(pages.shape)
    return pages


@pytest.mark.parametrize("fp8_keys", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_prefilter_changes_no_selection(case, paged, fp8_keys, monkeypatch):
    groups, seqlen_q, num_keys, largest, local, init = case
    # Integers, whose scores are exact in any order of summation, and need more than the 8 bits of a bf16 number.
    index_q = torch.randint(-largest, largest + 1, (1, groups, seqlen_q, 64)).bfloat16()
    index_k = torch.randint(-largest, largest + 1, (1, 1, 1608, 64)).bfloat16()
    # Keys with different scales.
    index_k *= torch.randint(1, 3, (1608, 1))
    index_k[:, :, num_keys:] = torch.nan
    index_k, scale = in_format(index_k, fp8_keys)
    table = None
    if paged:
        table = torch.randperm(201, dtype=torch.int32)[None]
        index_k, scale = (None if x is None else in_pages(x, table) for x in (index_k, scale))
    sequences = torch.tensor([[0, 0, seqlen_q, 0, num_keys]], dtype=torch.int32)
    arguments = index_q, index_k, sequences, SelectionRule(BLOCK, TOPK, local, init), table, scale
    used = []
    found = selected(monkeypatch, used, *arguments)
    assert torch.equal(found, selected(monkeypatch, None, *arguments))
    if largest > 1:
        assert len(used) == 1 and used[0] is not None


def test_subnormal_numbers_of_e4m3_keys(monkeypatch):
    index_q, index_k = torch.full((1, 2, 1, 16), 9.0).bfloat16(), torch.randint(-7, 8, (1, 1, 400, 16)).bfloat16()
    # Next to a key's first number, all but an 8 are subnormal. Without the subnormal ones, five blocks are best.
    index_k[..., 0], index_k[..., 1] = 2.0**17, 0
    index_k[0, 0, : 5 * BLOCK, 1] = 8
    index_q[..., 0], index_q[..., 1] = 0, 1
    index_k, scale = fp8.quantize(index_k)
    assert index_k[..., 2:].float().abs().max() == fp8.LARGEST_SUBNORMAL
    assert_same_selection(monkeypatch, [], index_q, index_k, scale)


@pytest.mark.parametrize("exponent", [-120, -79, -78, -77, -76, -75, -74, 60, 80])
def test_queries_of_any_magnitude(exponent, monkeypatch):
    index_q, index_k = torch.randint(-9, 10, (1, 2, 1, 16)).bfloat16(), torch.randint(-9, 10, (1, 1, 1600, 16))
    index_k, scale = fp8.quantize(index_k)
    assert_same_selection(monkeypatch, [], index_q * 2.0**exponent, index_k, scale, 1600)


@pytest.mark.parametrize("fp8_keys", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_keys_that_are_not_finite(bad, fp8_keys, monkeypatch):
    index_q, index_k = torch.ones(1, 2, 1, 16).bfloat16(), torch.randn(1, 1, 400, 16).bfloat16()
    index_k[0, 0, 77] = bad
    index_k, scale = in_format(index_k, fp8_keys)
    used = []
    assert_same_selection(monkeypatch, used, index_q, index_k, scale)
    # A key that scores -inf does not change the maximum of its block.
    assert (bad == -torch.inf and not fp8_keys) or used == [None]


def test_float32_queries_skip_the_prefilter(monkeypatch):
    used = []
    assert_same_selection(monkeypatch, used, torch.randn(1, 2, 1, 16), torch.randn(1, 1, 400, 16).bfloat16())
    assert not used


@given(st.integers(0, 2**31), st.sampled_from([1e-30, 1.0, 1e30]), st.integers(1, 4))
def test_the_best_blocks_are_not_ruled_out(seed, size, num_vectors):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_vectors, 64, generator=generator) * size
    forced = np.zeros((num_vectors, 64), bool)
    forced[:, 62:] = True
    rough = scores.bfloat16().float().numpy()
    limit = least_scores(rough, np.zeros(num_vectors), forced, ~forced, 4)
    best = scores[:, :62].topk(2).indices.numpy()
    assert (np.take_along_axis(rough, best, 1) >= limit[:, None]).all()


@pytest.mark.parametrize("fp8_keys", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize("block_size", [8, 12])
def test_rough_maxima(block_size, fp8_keys):
    keys, queries = torch.randn(1, 1, 6 * block_size, 16).bfloat16(), torch.randn(3, 16).bfloat16()
    keys[0, 0, 5 * block_size + 1 :] = torch.nan
    rule = SelectionRule(block_size, topk=2, num_local_blocks=1, num_init_blocks=0)
    tile = Queries(batch=0, start=0, stop=1, k_start=0, k_end=5 * block_size + 1, position=5 * block_size, num_blocks=6)
    scratch = Scratch(torch.float32)
    keys, scale = in_format(keys, fp8_keys)
    index_k = IndexKeys(keys, scale, None, [tile], 3, rule, scratch)
    found, error = rough_maxima(queries, index_k, rule, scratch), rough_error(queries, index_k)
    seen = keys.float() if scale is None else keys.float() * fp8.as_scales(scale).float()[..., None]
    exact = (seen[0, 0, : 5 * block_size] @ queries.float().T).view(5, block_size, 3).amax(1)
    torch.testing.assert_close(found[:5].amax(1).float(), exact, rtol=2.0**-8, atol=1e-5 + error.max())
    assert (found[5] == 0).all()
