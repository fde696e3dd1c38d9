"""Tiny dense models of transformers' own classes, with random weights that make the selection matter."""

import torch
from integrations.device import DEVICE
from torch import Tensor
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flexmsa.integrations.transformers import convert, set_warm_up

VOCABULARY = 61
SETTINGS = {"block_size": 4, "topk": 3}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig, GROUPED),
    "llama-mha": (LlamaForCausalLM, LlamaConfig, {**SIZES, "num_key_value_heads": 4}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, GROUPED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {**GROUPED, "head_dim": 16}),
    "mistral": (MistralForCausalLM, MistralConfig, {**GROUPED, "sliding_window": None}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {**GROUPED, **SLIDING, "head_dim": 16, "query_pre_attn_scalar": 9}),
    "phi": (
        PhiForCausalLM,
        PhiConfig,
        {**GROUPED, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, GROUPED),
    "neox": (GPTNeoXForCausalLM, GPTNeoXConfig, SIZES),
}


def make_dense(name: str = "qwen3", **changes) -> PreTrainedModel:
    """The model of this name, with the same weights each time."""
    model, config, settings = MODELS[name]
    torch.manual_seed(0)
    return model(config(**{**settings, **changes})).to(DEVICE).eval()


def make_converted(name: str = "qwen3", layers=None, warm_up: bool = False, **changes) -> PreTrainedModel:
    """The same, converted."""
    model = make_dense(name, **changes)
    torch.manual_seed(1)
    convert(model, SETTINGS, layers=layers)
    if not warm_up:
        set_warm_up(model, False)
    return model


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids, none of them padding."""
    return torch.randint(1, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, and under each the same numbers to rounding."""
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], msg=lambda text, name=name: f"{name}: {text}")
