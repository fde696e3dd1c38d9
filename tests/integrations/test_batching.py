"""Requests in transformers' continuous batching get the tokens that `generate` gives each alone."""

import pytest
import torch
from integrations.converted import make_converted, tokens
from integrations.device import DEVICE
from integrations.m3 import make_m3, make_vision_m3
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching import continuous_api

from flexmsa.integrations.transformers import set_warm_up
from flexmsa.integrations.transformers.batching import BatchingManager
from flexmsa.integrations.transformers.paged import _INDEX_KEYS

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
PAGE, BLOCKS, CHUNK = 16, 64, 40
MODELS = {
    "qwen3": lambda: make_converted("qwen3"),
    "llama, one layer": lambda: make_converted("llama", layers=[1]),
    "warm-up": lambda: make_converted("qwen3", warm_up=True),
    "m3 with vision": lambda: make_vision_m3("flexmsa"),
}


def batching(**settings) -> ContinuousBatchingConfig:
    """Small pages. The name of their size changed with transformers' versions."""
    name = "page_size" if hasattr(ContinuousBatchingConfig(), "page_size") else "block_size"
    return ContinuousBatchingConfig(**{name: PAGE, "num_blocks": BLOCKS, "max_batch_tokens": CHUNK, **settings})


def make_prompts() -> list[list[int]]:
    """Of several lengths; the fourth begins like the first, and the last is the first."""
    prompts = [tokens(length, seed=length).tolist() for length in (70, 33, 1)]
    return [*prompts, prompts[0][:40] + prompts[1], prompts[0]]


def generate_batch(model, prompts, generation=None, **settings) -> list[list[int]]:
    kept = {"persistent_manager": settings.pop("persistent_manager", False)}
    generation = GenerationConfig(**{**GREEDY, **(generation or {})})
    outputs = model.generate_batch(prompts, generation, continuous_batching_config=batching(**settings), **kept)
    assert [output.error for output in outputs.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in outputs.values()]


def generate(model, prompts) -> list[list[int]]:
    return [model.generate(torch.tensor([x], device=DEVICE), **GREEDY)[0, len(x) :].tolist() for x in prompts]


@pytest.fixture
def sizes(request):
    """The numbers of tokens of each forward of the models given to it."""
    found = []

    def watch(model):
        model.register_forward_pre_hook(
            lambda _, args, given: found.append(given["input_ids"].shape[1]), with_kwargs=True
        )
        return found

    return watch


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate(name, sizes):
    model, prompts = MODELS[name](), make_prompts()
    expected = generate(model, prompts)
    layers = getattr(model.config.get_text_config(), "layer_types", None)
    found = sizes(model)
    assert generate_batch(model, prompts) == expected
    # Prompts were cut into chunks, and pages of the same tokens were shared.
    assert max(found) == CHUNK < max(map(len, prompts))
    assert sum(found) < sum(map(len, prompts))
    assert getattr(model.config.get_text_config(), "layer_types", None) == layers
    assert model.config.get_text_config()._attn_implementation == "flexmsa"


@pytest.mark.parametrize("name", ["qwen3", "m3"])
def test_requests_that_do_not_fit_are_computed_again(name, sizes):
    model = make_converted() if name == "qwen3" else make_m3("flexmsa")
    prompts = [tokens(30, seed=seed).tolist() for seed in range(4)]
    expected = generate(model, prompts)
    found = sizes(model)
    # After 32 tokens each needs a third page.
    assert generate_batch(model, prompts, num_blocks=8, safety_margin=0.0) == expected
    assert sum(found) > sum(map(len, prompts)) + len(prompts) * GREEDY["max_new_tokens"]


def test_a_kept_manager_keeps_its_index_keys(sizes):
    model, prompts = make_converted(), make_prompts()
    expected = generate(model, prompts)
    assert generate_batch(model, prompts, persistent_manager=True) == expected
    found = sizes(model)
    assert generate_batch(model, prompts[::-1], persistent_manager=True) == expected[::-1]
    # The pages of the first call are shared.
    assert sum(found) < sum(map(len, prompts)) / 2 + len(prompts) * GREEDY["max_new_tokens"]
    cache = model.init_continuous_batching().batch_processor.cache
    # Two blocks are transformers' own.
    assert [x.shape for x in vars(cache)[_INDEX_KEYS].values()] == [((BLOCKS + 2) * PAGE, 16)] * 2
    with pytest.raises(NotImplementedError, match="num_return_sequences: expected 1, got 2"):
        generate_batch(model, prompts, {"num_return_sequences": 2, "do_sample": True})
    set_warm_up(model, True)
    with pytest.raises(ValueError, match="warm_up: expected that of the kept manager"):
        generate_batch(model, prompts)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        generate_batch(model, prompts)
    model.destroy_cached_continuous_batching_manager()
    assert not isinstance(model.init_continuous_batching(continuous_batching_config=batching()), BatchingManager)


def test_a_manager_kept_for_the_dense_model_is_refused():
    model = make_converted()
    model.set_attn_implementation("sdpa")
    generate_batch(model, make_prompts()[:2], persistent_manager=True)
    model.set_attn_implementation("flexmsa")
    with pytest.raises(ValueError, match="destroy_cached_continuous_batching_manager"):
        generate_batch(model, make_prompts()[:2])


def test_it_is_not_replaced_by_flash_attention(monkeypatch):
    monkeypatch.setattr(continuous_api, "is_flash_attn_3_available", lambda **settings: True)
    model = make_converted()
    manager = model.init_continuous_batching(continuous_batching_config=batching())
    assert isinstance(manager, BatchingManager)
    assert model.config._attn_implementation == "flexmsa"
    assert model.generation_config.eos_token_id is None


@pytest.mark.parametrize(
    ("name", "generation", "settings", "message"),
    [
        ("gemma3", {}, {}, "full attention in all layers, got sliding_attention"),
        ("qwen3", {"num_return_sequences": 2, "do_sample": True}, {}, "num_return_sequences: expected 1, got 2"),
        ("qwen3", {}, {"cpu_offload_space": 1.0}, "cpu_offload_space: expected 0, got 1.0"),
        ("qwen3", {}, {"varlen_compile_config": CompileConfig()}, "no compile configuration"),
    ],
)
def test_what_would_be_wrong_is_refused(name, generation, settings, message):
    with pytest.raises(NotImplementedError, match=message):
        generate_batch(make_converted(name), make_prompts(), generation, **settings)


def test_measuring_is_refused():
    model = make_converted()
    model.flexmsa.with_health = True
    outputs = model.generate_batch([[1, 2, 3]], GenerationConfig(**GREEDY), continuous_batching_config=batching())
    assert ["with_health" in output.error for output in outputs.values()] == [True]
