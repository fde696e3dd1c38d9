"""Decoding against the dense definition in float64, from caches whose unused slots hold NaN."""

import math
from dataclasses import replace

import pytest
import torch
from helpers import dense_attention, dense_selection, hide_unowned, plain

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.fp8 import Cache
from flexmsa.kernels.triton.common.target import target_of
from flexmsa.kernels.triton.selection.launch import choose_config, rank_blocks
from flexmsa.kernels.triton.serving import launch as decode
from flexmsa.kernels.triton.serving.config import default_config

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CASES = {
    # name: (Hkv, G, Sq, Sk, D, Di, block_size, topk, sequences or None, dtype)
    "several tokens": (4, 3, 2, 300, 16, 16, 16, 4, None, torch.float32),
    "filled parts": (1, 5, 1, 300, 80, 16, 48, 3, [[0, 0, 1, 0, 100], [1, 0, 1, 20, 290]], torch.float32),
    "M3 group": (3, 16, 3, 200, 16, 96, 128, 16, [[0, 0, 3, 0, 2], [1, 0, 3, 20, 190]], torch.float32),
    "chunk": (2, 3, 20, 300, 16, 16, 16, 4, [[0, 0, 20, 0, 300], [1, 0, 20, 20, 50]], torch.float32),
    "parts of a block": (1, 2, 1, 700, 16, 16, 160, 3, None, torch.float32),
    "one head": (1, 1, 4, 300, 96, 16, 16, 3, None, torch.float16),
    "queries of their own": (
        2, 2, 3, 90, 16, 16, 16, 3,
        [[0, 0, 1, 0, 80], [0, 1, 2, 0, 80], [0, 2, 3, 0, 81], [1, 0, 1, 0, 90], [1, 1, 2, 0, 17], [1, 2, 3, 0, 0]],
        torch.float32,
    ),
    "packed": (
        2, 2, 6, 60, 16, 16, 16, 2,
        [[0, 0, 1, 0, 9], [0, 1, 4, 9, 50], [0, 4, 6, 50, 60], [1, 0, 2, 0, 0], [1, 2, 6, 5, 60]], torch.float32,
    ),
}  # fmt: skip


def poisoned_inputs(case):
    """The tensors of a case, NaN in the cache slots that no sequence owns."""
    groups, group_size, seqlen_q, seqlen_k, head_dim, depth, block_size, topk, table, dtype = case
    sequences = plain(2, seqlen_q, seqlen_k) if table is None else torch.tensor(table, dtype=torch.int32)

    def vectors(heads, length, size):
        return torch.randn(2, heads, length, size).to(dtype)

    q, index_q = vectors(groups * group_size, seqlen_q, head_dim), vectors(groups, seqlen_q, depth)
    keys = vectors(groups, seqlen_k, head_dim), vectors(groups, seqlen_k, head_dim), vectors(1, seqlen_k, depth)
    k, v, index_k = hide_unowned(sequences, *keys)
    return q, k, v, index_q, index_k, sequences, block_size, topk


def config_of(q, k, block_size, topk):
    """The shipped configuration of the attention."""
    groups = k.shape[1]
    sizes = q.shape[1] // groups, q.shape[3]
    problem = decode.attend_problem(groups, q.dtype, *sizes, block_size=block_size, topk=topk)
    return default_config(problem, target_of(q.device), num_rows=q.shape[0] * q.shape[2] * groups)


def assert_attention(found, wanted, dtype):
    """Both are (out, lse): a few units in the last place of dtype."""
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1].double(), wanted[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_decode(case, monkeypatch):
    monkeypatch.setattr(decode, "FEW_ROWS", 8192)
    q, k, v, index_q, index_k, sequences, block_size, topk = poisoned_inputs(case)
    scale = q.shape[-1] ** -0.5
    ids = kernels.select_blocks(index_q, index_k, sequences, SelectionRule(block_size, topk))
    out, lse = kernels.attend_blocks(q, k, v, ids, sequences, block_size, scale)
    assert torch.equal(ids, dense_selection(index_q, index_k, sequences, SelectionRule(block_size, topk)))
    wanted = dense_attention(q, k.nan_to_num(), v.nan_to_num(), ids, sequences, block_size, scale)
    assert_attention((out, lse), wanted, q.dtype)
    assert (out[lse == -float("inf")] == 0).all()


@pytest.mark.parametrize(
    ("name", "num_lists", "splits"),
    [*((name, 2, 1) for name in CASES), ("several tokens", 150, 3), ("filled parts", 150, 3), ("M3 group", 150, 3)],
)
def test_attention_merges_lists(name, num_lists, splits, monkeypatch):
    """Where the keys of a query were split, the attention finds the chosen blocks by itself, and writes their ids."""
    monkeypatch.setattr(decode, "FEW_ROWS", 8192)
    q, k, v, index_q, index_k, sequences, block_size, topk = poisoned_inputs(CASES[name])
    config = choose_config(index_q, index_k, sequences, SelectionRule(block_size, topk))
    config = replace(config, num_splits=num_lists)
    ids, lists = rank_blocks(index_q, index_k, sequences, SelectionRule(block_size, topk), config=config)
    config = replace(config_of(q, k, block_size, topk), num_splits=splits)
    ids.fill_(-7)
    with monkeypatch.context() as patch:
        patch.setattr(decode, "merge_splits", None)
        chosen = decode.Chosen(ids, lists)
        found = decode.attend(q, k, v, Cache(), chosen, sequences, block_size, 0.3, config)
    assert torch.equal(ids, dense_selection(index_q, index_k, sequences, SelectionRule(block_size, topk)))
    wanted = dense_attention(q, k.nan_to_num(), v.nan_to_num(), ids, sequences, block_size, 0.3)
    assert_attention(found, wanted, q.dtype)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_wild_query_does_not_look_blind(number, splits):
    """-inf in the lse says that a query sees no key; a sum of probabilities that is NaN does not."""
    q, k, v, index_q, index_k, sequences, block_size, topk = poisoned_inputs(CASES["several tokens"])
    q[:, 0, 0, 0] = number
    ids = kernels.select_blocks(index_q, index_k, sequences, SelectionRule(block_size, topk))
    config = replace(config_of(q, k, block_size, topk), num_splits=splits)
    out, lse = decode.attend(q, k, v, Cache(), decode.Chosen(ids), sequences, block_size, 0.3, config)
    assert out[:, 0, 0].isnan().all() and lse[:, 0, 0].isnan().all()
    assert out[:, 1:].isfinite().all() and lse[:, 1:].isfinite().all()


def test_long_lists_are_merged_once(monkeypatch):
    q, k, v, index_q, index_k, sequences, block_size, topk = poisoned_inputs(CASES["several tokens"])
    rule = SelectionRule(block_size, topk)
    found = kernels.select_and_attend(q, index_q, k, v, index_k, sequences, rule, 0.3)
    monkeypatch.setattr(decode, "LONGEST_MERGED", 0)
    merged_once = kernels.select_and_attend(q, index_q, k, v, index_k, sequences, rule, 0.3)
    assert torch.equal(found[2], merged_once[2])
    wanted = dense_attention(q, k.nan_to_num(), v.nan_to_num(), found[2], sequences, block_size, 0.3)
    for each in (found, merged_once):
        assert_attention(each[:2], wanted, q.dtype)


@pytest.mark.parametrize("splits", [1, 3, 8])
def test_any_ids_and_splits(splits):
    q, k, v, _, _, sequences, block_size, _ = poisoned_inputs(CASES["several tokens"])
    ids = torch.tensor([-1, 3, 99, 2**31 - 1, 0, -(2**31), 18, -1], dtype=torch.int32).expand(2, 4, 2, 8)
    config = replace(config_of(q, k, block_size, 8), num_splits=splits)
    found = kernels.attend_blocks(q, k, v, ids, sequences, block_size, 0.3, config=config)
    seen = ids.where((ids >= 0) & (ids < 19), -1)
    assert_attention(found, dense_attention(q, k, v, seen, sequences, block_size, 0.3), q.dtype)


def test_strides():
    q, k, v, _, _, sequences, block_size, _ = poisoned_inputs(CASES["several tokens"])
    ids = torch.tensor([0, 5, 18], dtype=torch.int32).expand(2, 4, 2, 3)

    def shuffled(x):
        return x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)

    found = kernels.attend_blocks(shuffled(q), shuffled(k), shuffled(v), ids, sequences, block_size, 0.3)
    assert_attention(found, dense_attention(q, k, v, ids, sequences, block_size, 0.3), q.dtype)
