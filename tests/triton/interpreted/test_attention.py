"""The main branch's forward against the dense definition in float64, both orders of work."""

from dataclasses import replace

import pytest
import torch
from helpers import dense_attention, plain

from flexmsa.kernels import workspace
from flexmsa.kernels.triton.common import target as targets
from flexmsa.kernels.triton.common.fp8 import Cache
from flexmsa.kernels.triton.forward import launch
from flexmsa.kernels.triton.forward.config import default_config
from flexmsa.kernels.triton.forward.records import Inputs
from flexmsa.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Every tile is query-major, none is, or the tiles decide; then with the smallest workspace.
ORDERS = {"query-major": (64, 1 << 30), "key-major": (0, 1 << 30), "both": (3, 1 << 30), "many ranges": (3, 1)}


@pytest.fixture(params=ORDERS.values(), ids=ORDERS)
def order(request):
    limit, size = request.param
    workspace.set_workspace_limit(size)
    return limit


def forward(q, k, v, ids, sequences, block_size, scale, limit, **overrides):
    problem = launch.problem_of(Inputs(q, k, v, Cache(), sequences, scale), ids, block_size)
    config = default_config(problem, targets.target_of(q.device))
    tiles = {"longest_union": limit, "query_major_only": limit == 64, "query_major_rows": 32, "length": 4}
    config = replace(config, **tiles, **overrides)
    return launch.block_sparse_attention_forward(q, k, v, ids, sequences, block_size, scale, config)


def check(q, k, v, ids, sequences, block_size, limit, scale=0.3):
    out, lse = forward(q, k, v, ids, sequences, block_size, scale, limit)
    exact_out, exact_lse = dense_attention(q, k, v, ids, sequences, block_size, scale)
    assert_close("out", out, exact_out, exact_out.to(q.dtype))
    assert_close("lse", lse, exact_lse, exact_lse.float())


def inputs(batch, groups, group_size, seqlen_q, seqlen_k, head_dim, dtype=torch.float32):
    q = torch.randn(batch, groups * group_size, seqlen_q, head_dim).to(dtype)
    return q, *(torch.randn(batch, groups, seqlen_k, head_dim).to(dtype) for _ in range(2))


SHAPES = {
    # name: (B, Hkv, G, S, D, block_size, topk, dtype)
    "G 1": (2, 2, 1, 70, 16, 16, 3, torch.float32),
    "G 3, odd block": (1, 2, 3, 41, 16, 5, 4, torch.float32),
    "G 5, D 80": (1, 1, 5, 70, 80, 48, 2, torch.float32),
    "G 16": (1, 1, 16, 40, 16, 16, 2, torch.float16),
    "one token": (1, 2, 4, 1, 16, 16, 3, torch.float32),
    "heads in two parts, slots in two steps": (1, 1, 10, 30, 256, 4, 10, torch.float32),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_definition(order, shape):
    batch, groups, group_size, seqlen, head_dim, block_size, topk, dtype = shape
    q, k, v = inputs(batch, groups, group_size, seqlen, seqlen, head_dim, dtype)
    ids = torch.randint(-1, -(-seqlen // block_size), (batch, groups, seqlen, topk))
    check(q, k, v, ids, plain(batch, seqlen, seqlen), block_size, order)


def test_neighbours_that_share(order):
    q, k, v = inputs(1, 2, 2, 80, 80, 16)
    ids = torch.stack([torch.zeros(80), torch.arange(80) // 32, torch.arange(80) // 16], 1).int().expand(1, 2, 80, 3)
    check(q, k, v, ids, plain(1, 80, 80), 16, order)


def test_packed_documents(order):
    rows = [[0, 0, 1, 0, 1], [0, 1, 40, 1, 40], [0, 40, 60, 40, 60], [1, 0, 3, 0, 0], [1, 3, 60, 3, 60]]
    q, k, v = inputs(2, 2, 3, 60, 60, 16)
    ids = torch.randint(-1, 4, (2, 2, 60, 3), dtype=torch.int32)
    check(q, k, v, ids, torch.tensor(rows, dtype=torch.int32), 16, order)


def test_cache_slots_outside_the_sequence_do_not_leak(order):
    q, k, v = inputs(2, 1, 4, 9, 90, 16)
    for x in (k, v):
        x[0, :, 61:] = x[1, :, :20] = torch.nan
    ids = torch.randint(0, 5, (2, 1, 9, 3), dtype=torch.int32)
    check(q, k, v, ids, torch.tensor([[0, 0, 9, 3, 61], [1, 0, 9, 20, 90]], dtype=torch.int32), 16, order)


def test_every_visible_block(order):
    q, k, v = inputs(1, 2, 3, 50, 50, 16)
    rows = torch.tensor([[0, 0, 13, 0, 13], [0, 13, 50, 13, 50]], dtype=torch.int32)
    check(q, k, v, None, rows, 16, order)


def test_no_slots(order):
    q, k, v = inputs(1, 1, 2, 8, 8, 16)
    check(q, k, v, torch.empty(1, 1, 8, 0, dtype=torch.int32), plain(1, 8, 8), 4, order)


def test_strides(order):
    q = torch.randn(1, 30, 16, 6).permute(0, 3, 1, 2)
    k, v = torch.randn(1, 30, 2, 32).transpose(1, 2)[..., ::2], torch.randn(2, 1, 16, 30).permute(1, 0, 3, 2)
    ids = torch.randint(-1, 4, (3, 30, 2, 1)).permute(3, 2, 1, 0)
    check(q, k, v, ids, plain(1, 30, 30), 8, order)


def test_both_orders_repeat_bit_for_bit():
    q, k, v = inputs(1, 2, 3, 40, 40, 16)
    ids = torch.randint(-1, 4, (1, 2, 40, 3))
    for limit in (0, 3):
        first, second = (forward(q, k, v, ids, plain(1, 40, 40), 16, 0.3, limit) for _ in range(2))
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_large_values_and_scores_stay_finite(order):
    q, k, v = inputs(1, 1, 2, 40, 40, 16, torch.float16)
    ids = torch.randint(0, 3, (1, 1, 40, 2))
    check(q * 0, k, v.sign() * 60_000, ids, plain(1, 40, 40), 16, order)
    q, k, v = (x.float() for x in (q, k, v))
    k[:, :, 16:] *= 1e20
    out, _ = forward(q * 1e20, k, v, ids, plain(1, 40, 40), 16, 1.0, order)
    assert not out[:, :, :16].isnan().any()
