"""Greedy tokens of vLLM's engine are those of transformers, in float32."""

import pytest
from vllm_plugin.checkpoints import prompts
from vllm_plugin.engine import count, engine, generate


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral"])
def test_chunks_of_prompts_beside_single_tokens_and_cached_prefixes(checkpoint, expected, family):
    folder = checkpoint(family)
    with engine(folder) as llm:
        assert generate(llm) == expected(folder)
        # The last prompt begins as the first.
        assert count(llm, "prefix_cache_hits") == 512
        assert generate(llm, prompts()[2:3]) == expected(folder)[2:3]
        assert count(llm, "prefix_cache_hits") == 512 + 1024


def test_the_selection_changes_the_tokens(checkpoint, expected):
    folder = checkpoint()
    dense = expected(folder, warm_up=True)
    assert [found == other for found, other in zip(expected(folder), dense, strict=True)] == [
        # Each query sees at most topk blocks.
        len(prompt) + 24 <= 256
        for prompt in prompts()
    ]


def test_a_checkpoint_of_the_warm_up_is_dense(checkpoint, expected):
    folder = checkpoint(warm_up=True)
    with engine(folder) as llm:
        assert generate(llm) == expected(checkpoint(), warm_up=True)


def test_a_model_that_is_not_converted_stays_that_of_vllm(checkpoint, expected):
    folder = checkpoint(warm_up=None)
    with engine(folder) as llm:
        assert generate(llm) == expected(folder)
        (module,) = llm.apply_model(lambda model: type(model).__module__)
        assert module == "vllm.model_executor.models.qwen3"


@pytest.mark.parametrize(
    "settings",
    [
        {"index_head_dim": 64, "qk_norm": False, "bias": True},
        {"block_size": 64, "num_init_blocks": 1, "num_key_value_heads": 4, "layers": [0, 1, 2]},
    ],
    ids=str,
)
def test_settings_of_the_conversion(checkpoint, expected, settings):
    folder = checkpoint(**settings)
    with engine(folder) as llm:
        assert generate(llm) == expected(folder)


def test_blocks_of_vllm_that_have_two_pages(checkpoint, expected):
    with engine(checkpoint(), block_size=256) as llm:
        assert generate(llm) == expected(checkpoint())


@pytest.mark.parametrize("layout", ["LBNHC", "LBHNC", "BLNHC", "BLHNC"])
def test_layouts_of_the_cache(checkpoint, expected, monkeypatch, layout):
    # vLLM's dense layers take one layout on a CPU.
    folder = checkpoint(layers=[0, 1, 2])
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    with engine(folder) as llm:
        assert generate(llm) == expected(folder)


def test_drafts_of_four_tokens(checkpoint, expected):
    drafts = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    with engine(checkpoint(), speculative_config=drafts) as llm:
        assert generate(llm) == expected(checkpoint())
        assert 0 < count(llm, "spec_decode_num_accepted_tokens") < count(llm, "spec_decode_num_draft_tokens")


def test_sequences_that_lose_their_pages_are_computed_again(checkpoint, expected):
    # Of 11 pages, five prompts take two each, and each sequence needs a third.
    given = [prompts()[2][start : start + 250] for start in range(0, 1000, 200)]
    with engine(checkpoint(), num_gpu_blocks_override=12, max_model_len=1280) as llm:
        assert generate(llm, given) == expected(checkpoint(), given)
        assert count(llm, "num_preemptions") > 0


def test_torch_compile(checkpoint, expected):
    with engine(checkpoint(), enforce_eager=False) as llm:
        assert generate(llm) == expected(checkpoint())
