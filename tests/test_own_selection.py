"""Blocks that the user selects, in the layer and in the functions, and the scores of those that the library selects."""

from dataclasses import replace

import pytest
import torch
from helpers import dense_scored_blocks, randn

import flexmsa
from flexmsa import AuxRequest, MSAConfig, MSAttention, _core
from flexmsa._sequences import check_sequences

BLOCK = 8
SEQUENCES = {
    "plain": {},
    "left padding": {"kv_starts": torch.tensor([0, 13], dtype=torch.int32)},
    "part-filled": {"kv_lens": torch.tensor([90, 31], dtype=torch.int32)},
    "documents": {"cu_seqlens": torch.tensor([0, 5, 5, 47, 90], dtype=torch.int32)},
}


@pytest.mark.parametrize("lengths", SEQUENCES.values(), ids=SEQUENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_scores_of_the_selected_blocks(dtype, lengths, monkeypatch):
    # A few queries at a time.
    monkeypatch.setattr(_core, "_HELD", 2 * 5 * BLOCK * 16 * 7)
    batch = 1 if "cu_seqlens" in lengths else 2
    index_q, index_k = randn(batch, 2, 90, 16).to(dtype), randn(batch, 1, 90, 16, seed=1).to(dtype)
    index_k[0, 0, 3] = torch.nan
    index_k[0, 0, 60] = torch.inf
    settings = {"block_size": BLOCK, "topk": 5, **lengths}
    ids, scores = flexmsa.select_blocks(index_q, index_k, **settings, return_scores=True)
    assert torch.equal(ids, flexmsa.select_blocks(index_q, index_k, **settings))
    table = check_sequences(index_q, 90, *(lengths.get(name) for name in ("cu_seqlens", "kv_starts", "kv_lens"))).table
    every, right = dense_scored_blocks(index_q.double(), index_k.double(), table, BLOCK, 12)
    order = every.sort(dim=-1).indices
    every, right = every.gather(-1, order), right.gather(-1, order)
    at = torch.searchsorted(every.masked_fill(every < 0, 99).sort(dim=-1).values, ids.clamp(min=0))
    by_id = right.gather(-1, every.masked_fill(every < 0, 99).sort(dim=-1).indices)
    limit = torch.finfo(scores.dtype).max
    wanted = by_id.gather(-1, at).clamp(-limit, limit).masked_fill(ids < 0, -torch.inf)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_autocast_does_not_round_scores(dtype):
    index_q, index_k = randn(2, 2, 90, 16).to(dtype), randn(2, 1, 90, 16, seed=1).to(dtype)
    settings = {"block_size": BLOCK, "topk": 5, "return_scores": True}
    expected = flexmsa.select_blocks(index_q, index_k, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        found = flexmsa.select_blocks(index_q, index_k, **settings)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def layer_and_ids():
    torch.manual_seed(0)
    layer = MSAttention(MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8, index_head_dim=8, block_size=8, topk=2))
    x = torch.randn(2, 60, 32, requires_grad=True)
    newest = torch.arange(60)[:, None] // 8
    return layer, x, torch.cat([newest, newest - 2, newest * 0], dim=1).clamp(min=-1).expand(2, 2, 60, 3)


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_layer_trains_on_blocks_of_the_users(in_backward):
    """As the steps, called one by one."""
    layer, x, ids = layer_and_ids()
    layer.config = replace(layer.config, loss_in_backward=in_backward)
    out, loss = layer(x, block_indices=ids)
    (out.square().sum() + loss).backward()
    grads = {name: p.grad.clone() for name, p in layer.named_parameters()}
    if in_backward:
        assert loss == 0
        loss = layer.index_loss_value
    layer.zero_grad()
    q, k, v, index_q, index_k = layer.project(x)
    attended, aux = flexmsa.block_sparse_attention(q, k, v, ids, block_size=8, return_aux=AuxRequest(lse=True))
    expected = flexmsa.index_loss(q, k, index_q, index_k, ids, aux.lse, block_size=8)
    expected_out = layer.o_proj(attended.transpose(1, 2).flatten(2))
    (expected_out.square().sum() + expected).backward()
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(loss, expected)
    for name, p in layer.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-5)


def test_attention_to_given_blocks_selects_nothing(monkeypatch):
    layer, x, ids = layer_and_ids()
    monkeypatch.setattr(_core, "select_blocks", pytest.fail)
    aux = AuxRequest(block_indices=True)
    with torch.no_grad():
        _, found = flexmsa.attention(*layer.project(x), block_size=8, block_indices=ids, return_aux=aux)
    assert torch.equal(found.block_indices, ids)


def test_blocks_out_of_range_raise():
    layer, x, ids = layer_and_ids()
    with pytest.raises(ValueError, match=r"ids from -1 \(no block\) to 7"):
        layer(x, block_indices=ids + 5)
    with pytest.raises(ValueError, match="block_indices: expected"):
        layer(x, block_indices=ids[:, :, :5])
