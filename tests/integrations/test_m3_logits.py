"""The logits, the caches and the generated tokens are those of transformers' eager path."""

import pytest
import torch
from integrations.device import DEVICE
from integrations.m3 import IMAGE_TOKEN, error, make_m3, make_vision_m3, tokens
from transformers import (
    DynamicCache,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from flexmsa.integrations.transformers import register

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("length", [1, 7, 24, 25, 100])
def test_a_plain_batch(eager, model, length):
    x = tokens(2, length)
    assert error(model(x).logits, eager(x).logits) < 1e-4


def test_the_selection_decides_the_logits(eager):
    x = tokens(2, 100)
    assert error(make_m3("eager", index_topk_blocks=2)(x).logits, eager(x).logits) > 1.0


def test_several_local_blocks():
    x = tokens(2, 100)
    eager, model = (make_m3(name, index_local_blocks=2) for name in ("eager", "flexmsa"))
    assert error(model(x).logits, eager(x).logits) < 1e-4


def test_a_batch_padded_on_the_right(eager, model):
    x = tokens(3, 100)
    mask = torch.arange(100, device=DEVICE) < torch.tensor([[100], [61], [3]], device=DEVICE)
    expected, actual = eager(x, attention_mask=mask).logits, model(x, attention_mask=mask).logits
    assert error(actual[mask], expected[mask]) < 1e-4


@pytest.mark.parametrize("static", [False, True])
def test_chunks_through_a_cache(eager, model, static):
    x = tokens(2, 60)
    cache = StaticCache(model.config, max_cache_len=80) if static else DynamicCache(config=model.config)
    chunks = [model(chunk, past_key_values=cache).logits for chunk in x.split([25, 8, 1, 26], dim=1)]
    assert error(torch.cat(chunks, dim=1), eager(x).logits) < 1e-4


def test_greedy_generation_token_for_token(eager, model):
    x = tokens(1, 40)
    expected = eager.generate(x, max_new_tokens=200, do_sample=False)
    assert expected.unique().numel() > 20
    assert model.generate(x, max_new_tokens=200, do_sample=False).equal(expected)
    static = model.generate(x, max_new_tokens=200, do_sample=False, cache_implementation="static")
    assert static.equal(expected)


def test_beam_search_reorders_the_index_keys(eager, model):
    x = tokens(1, 40)
    beams = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    assert model.generate(x, **beams).equal(eager.generate(x, **beams))


def test_the_vision_language_model():
    x = tokens(1, 60)
    x[:, 5:9] = IMAGE_TOKEN
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    image = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]], device=DEVICE)}
    eager, model = make_vision_m3("eager"), make_vision_m3("flexmsa")
    assert model.model.language_model.config._attn_implementation == "flexmsa"
    assert error(model(x, **image).logits, eager(x, **image).logits) < 1e-4
    assert error(model(x, **{**image, "pixel_values": -pixels}).logits, model(x, **image).logits) > 1e-2
    generated = [m.generate(x, **image, max_new_tokens=20, do_sample=False) for m in (eager, model)]
    assert generated[0].equal(generated[1])


def test_saved_loaded_and_switched_back(eager, model, tmp_path):
    x = tokens(1, 50)
    model.save_pretrained(tmp_path)
    loaded = MiniMaxM3VLForCausalLM.from_pretrained(tmp_path, attn_implementation="flexmsa").to(DEVICE)
    assert loaded.config._attn_implementation == "flexmsa"
    assert loaded(x).logits.equal(model(x).logits)
    loaded.set_attn_implementation("eager")
    assert loaded(x).logits.equal(eager(x).logits)


def test_a_saved_vision_language_model(tmp_path):
    x = tokens(1, 40)
    model = make_vision_m3("flexmsa")
    model.save_pretrained(tmp_path)
    loaded = MiniMaxM3SparseForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flexmsa")
    loaded.to(DEVICE)
    assert loaded.model.language_model.config._attn_implementation == "flexmsa"
    assert loaded(x).logits.equal(model(x).logits)


def test_settings_that_cannot_run_are_refused():
    x = tokens(1, 20)
    with pytest.raises(NotImplementedError, match="attention_dropout: expected 0"):
        make_m3("flexmsa", attention_dropout=0.1).train()(x)
    with pytest.raises(ValueError, match="one head for each KV head"):
        make_m3("flexmsa", index_n_heads=1)(x)
    with pytest.raises(ValueError, match="num_local_blocks: expected an int >= 1"):
        make_m3("flexmsa", index_local_blocks=0)(x)


def test_other_models_are_refused():
    register()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = MistralForCausalLM(MistralConfig(vocab_size=97, num_key_value_heads=1, sliding_window=8, **sizes))
    other.to(DEVICE).set_attn_implementation("flexmsa")
    with pytest.raises(NotImplementedError, match="expected MiniMax-M3 or a converted model, got MistralAttention"):
        other(tokens(1, 20))
