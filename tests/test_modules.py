"""MSAttention and MSACache."""

import pytest
import torch
from helpers import assert_refused, lengths

from flexmsa import MSACache, MSAConfig, MSAttention
from flexmsa._rope import rotate, rotation

CONFIG = MSAConfig(32, num_heads=6, num_kv_heads=2, head_dim=16, index_head_dim=8, block_size=8, topk=3, rotary_dim=4)


@pytest.fixture
def layer():
    return MSAttention(CONFIG)


def test_the_loss_trains_the_index_branch_and_nothing_else(layer):
    x = torch.randn(2, 40, 32, requires_grad=True)
    out, loss = layer(x)
    loss.backward(retain_graph=True)
    trained = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert trained == {n for n, _ in layer.named_parameters() if n.startswith("index_")}
    assert x.grad is None
    layer.zero_grad()
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all((p.grad is None) == name.startswith("index_") for name, p in layer.named_parameters())


def test_the_warm_up_is_a_switch(layer):
    x = torch.randn(1, 60, 32)
    sparse, _ = layer(x)
    layer.topk = None
    dense, loss = layer(x)
    assert torch.equal(sparse[:, :24], dense[:, :24]) or torch.allclose(sparse[:, :24], dense[:, :24], atol=1e-5)
    assert not torch.allclose(sparse[:, 24:], dense[:, 24:], atol=1e-3)
    assert loss.isfinite()


@pytest.mark.parametrize("topk", [3, None])
@pytest.mark.parametrize("steps", [[40], [1, 39], [25, 1, 1, 5, 8], [20, 20]])
def test_generation_from_the_cache_equals_the_whole(layer, topk, steps):
    layer.topk = topk
    x = torch.randn(2, 40, 32)
    with torch.no_grad():
        whole, _ = layer(x)
        cache = layer.new_cache(2, capacity=50)
        pieces = [layer(piece, cache=cache) for piece in x.split(steps, dim=1)]
    assert all(loss is None for _, loss in pieces)
    torch.testing.assert_close(torch.cat([out for out, _ in pieces], dim=1), whole)


def test_an_empty_batch(layer):
    out, loss = layer(torch.zeros(0, 5, layer.config.hidden_size))
    assert out.shape == (0, 5, layer.config.hidden_size) and loss == 0


def test_left_padding_changes_nothing_for_a_prompt(layer):
    x = torch.randn(1, 30, 32)
    pad = 11
    padded = torch.cat([torch.full((1, pad, 32), 5.0), x], dim=1)
    alone, alone_loss = layer(x)
    out, loss = layer(padded, kv_starts=lengths(pad))
    torch.testing.assert_close(out[:, pad:], alone)
    torch.testing.assert_close(loss, alone_loss)
    with torch.no_grad():
        cache = layer.new_cache(1, capacity=64, kv_starts=lengths(pad))
        pieces = [layer(piece, cache=cache)[0] for piece in padded.split([36, 5], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1)[:, pad:], alone)


def test_packed_documents_stay_apart(layer):
    x = torch.randn(1, 50, 32)
    out, _ = layer(x, cu_seqlens=lengths(0, 1, 20, 50))
    for first, last in ((0, 1), (1, 20), (20, 50)):
        torch.testing.assert_close(out[:, first:last], layer(x[:, first:last])[0])


def test_the_loss_is_computed_in_training_or_on_request(layer):
    x = torch.randn(1, 10, 32)
    assert layer(x)[1] is not None
    layer.eval()
    assert layer(x)[1] is None
    assert layer(x, with_index_loss=True)[1] is not None


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 0])
def test_norm_and_rope_are_optional(qk_norm, rotary_dim):
    config = MSAConfig(16, 2, 1, head_dim=8, index_head_dim=8, qk_norm=qk_norm, rotary_dim=rotary_dim, bias=True)
    out, loss = MSAttention(config)(torch.randn(1, 6, 16))
    assert out.isfinite().all() and loss.isfinite()


def test_rope_depends_on_distance_alone(layer):
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(at, other):
        first, second = (rotation(torch.tensor([[position]]), 6, 100.0) for position in (at, other))
        return (rotate(q, *first) * rotate(k, *second)).sum()

    torch.testing.assert_close(score(7, 3), score(104, 100))
    assert not torch.isclose(score(7, 3), score(8, 3))


def test_a_misused_layer_says_so(layer):
    with pytest.raises(ValueError, match="x: expected"):
        layer(torch.randn(4, 32))
    with pytest.raises(ValueError, match="cache: expected alone"):
        layer(torch.randn(1, 4, 32), cache=layer.new_cache(1, 8), kv_starts=lengths(0))
    with pytest.raises(ValueError, match="cache: expected at most 8 more tokens in row 0, got 9"):
        layer(torch.randn(1, 9, 32), cache=layer.new_cache(1, 8))


def _tokens(count, batch=2):
    return tuple(torch.randn(batch, h, count, d) for h, d in ((2, 16), (2, 16), (1, 8)))


@pytest.mark.parametrize(
    "bad",
    [
        lambda k, v, i: (k[:1], v, i),
        lambda k, v, i: (k, v[:, :1], i),
        lambda k, v, i: (k, v, i[..., :4]),
        lambda k, v, i: (k, v[:, :, 1:], i),
        lambda k, v, i: (k, v, i.double()),
        lambda k, v, i: (k, v, i[0]),
        lambda k, v, i: tuple(x.repeat(1, 1, 4, 1) for x in (k, v, i)),
    ],
)
def test_a_refused_append_leaves_the_cache_as_it_was(bad):
    cache = MSACache(2, 2, 16, 8, capacity=20)
    cache.append(*_tokens(7))
    assert_refused(cache, lambda: cache.append(*bad(*_tokens(5))), "expected", (ValueError, TypeError))
    assert cache.kv_lens.tolist() == [7, 7]
