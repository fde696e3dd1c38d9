"""transformers' less common caches, and prompts that `generate` reads in chunks."""

import pytest
import torch
from integrations import converted, m3
from integrations.device import DEVICE
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache, cache_utils
from transformers.cache_utils import QuantizedLayer

pytestmark = pytest.mark.usefixtures("no_grad")
MODELS = {"m3": lambda: m3.make_m3("flexmsa", **m3.SMALL), "converted": converted.make_converted}
each_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


class HalfLayer(QuantizedLayer):
    """In place of quanto's, which is not installed: keeps the keys and values that it has seen in 16 bits."""

    def _quantize(self, tensor, axis):
        return tensor.bfloat16()

    def _dequantize(self, q_tensor):
        return q_tensor.float()


@pytest.fixture
def quantized(monkeypatch):
    """A function that returns a QuantizedCache for a model, which holds 8 tokens in full before it quantizes them."""
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", HalfLayer)
    return lambda model: QuantizedCache("quanto", model.config, residual_length=8)


@each_model
@pytest.mark.parametrize("cache", [None, "static"])
def test_a_prompt_in_chunks(make, cache):
    model, ids = make(), converted.tokens(2, 40)
    mask = (torch.arange(40, device=DEVICE) >= torch.tensor([[0], [21]], device=DEVICE)).long()
    settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert model.generate(ids, **settings, prefill_chunk_size=16, cache_implementation=cache).equal(expected)


@each_model
def test_a_prompt_in_compiled_chunks(make):
    """As transformers does by itself on a GPU."""
    model, ids = make(), converted.tokens(2, 40)
    settings = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **settings)
    compiling = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    settings |= {"prefill_chunk_size": 16, "cache_implementation": "static", "compile_config": compiling}
    for _ in range(2):
        assert model.generate(ids, **settings).equal(expected)


def test_a_quantized_cache_has_index_keys(quantized):
    """Those of the first layer are of its input, as in a plain cache; the logits of the warm-up are the dense model's
    with its own quantized cache, and those of the selection near to those with a plain cache."""
    chunks = converted.tokens(2, 60).split([30, 1, 1, 1, 1, 1, 1, 24], dim=1)
    model, warm_up, dense = converted.make_converted(), converted.make_converted(warm_up=True), converted.make_dense()
    caches = quantized(model), DynamicCache(config=model.config), quantized(warm_up), quantized(dense)
    for chunk in chunks:
        actual, exact, ours, theirs = (
            m(chunk, past_key_values=cache).logits
            for m, cache in zip((model, model, warm_up, dense), caches, strict=True)
        )
        assert (actual - exact).abs().mean() < 0.05 * exact.abs().mean()
        torch.testing.assert_close(ours, theirs)
    assert not actual.equal(exact)
    assert caches[0].layers[0].indexer_keys.equal(caches[1].layers[0].indexer_keys)
    assert caches[0].get_seq_length() == caches[0].layers[1].indexer_keys.shape[1] == 60


def test_generation_with_a_quantized_cache(quantized):
    model, ids = converted.make_converted(), converted.tokens(2, 40)
    settings = {"max_new_tokens": 4, "do_sample": False}
    assert model.generate(ids, past_key_values=quantized(model), **settings).equal(model.generate(ids, **settings))


def test_minimax_m3_has_no_quantized_cache(quantized):
    with pytest.raises(ValueError, match="minimax_m3_sparse"):
        quantized(m3.make_m3("flexmsa", **m3.SMALL))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_the_index_keys_of_steps_that_another_attention_computes(kind):
    """Those of the first layer, which depend on no attention."""
    model, ids, kept = converted.make_converted(), converted.tokens(2, 40), []
    for between in ("flexmsa", "sdpa"):
        cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=50)
        for chunk, attention in zip(ids.split([20, 8, 12], dim=1), ("flexmsa", between, "flexmsa"), strict=True):
            model.set_attn_implementation(attention)
            model(chunk, past_key_values=cache)
        kept.append(cache.layers[0].indexer_keys)
    assert kept[0].equal(kept[1]) and kept[0][:, :40].all()


@pytest.mark.parametrize("kind", ["dynamic", "static", "quantized"])
def test_a_cache_that_another_model_filled_is_refused(quantized, kind):
    model, dense, ids = converted.make_converted(), converted.make_dense(), converted.tokens(1, 12)
    cache = {
        "dynamic": lambda: DynamicCache(config=dense.config),
        "static": lambda: StaticCache(dense.config, max_cache_len=20),
        "quantized": lambda: quantized(dense),
    }[kind]()
    dense(ids[:, :10], past_key_values=cache)
    with pytest.raises(ValueError, match="it has no index keys of the earlier tokens"):
        model(ids[:, 10:], past_key_values=cache)
