"""Which dense models of transformers `convert` takes, by model type: each is made small, with random weights."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 61
OMIT = object()
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "sliding_window": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    # Of experts, where there are some.
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "head_dim": OMIT}
LATENT = {
    "num_key_value_heads": 4,
    "head_dim": OMIT,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
}


def each(names: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Several model types with the same settings."""
    return dict.fromkeys(names.split(), settings)


# Which layers are converted -> the model types, with the settings that each needs beside SIZES.
CONVERTED: dict[str, dict[str, dict[str, Any]]] = {
    "all layers": {
        **each(
            "apertus apertus1p5_text arcee aria_text bitnet cohere ernie4_5 ernie4_5_moe exaone flex_olmo gemma glm"
        ),
        **each("glm4 glm4_moe gpt_neox granite granitemoe granitemoeshared hunyuan_v1_dense hunyuan_v1_moe hy_v3"),
        **each("hyperclovax internlm3 iquestcoder jais2 llama mellum minimax_m2 ministral3 mistral mixtral nanochat"),
        **each("olmo olmo2 olmoe phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe sarvam_moe smollm3 solar_open"),
        **each("starcoder2"),
        **each("dots1", layer_types=["full_attention"] * 2, n_shared_experts=1, first_k_dense_replace=1),
        **each("helium", head_dim=8),
        **each("laguna", sliding_window=OMIT),
        **each("seed_oss", attention_dropout=0.0),
    },
    "layers without a sliding window": {
        **each("afmoe beam cohere2 cohere2_moe exaone4 exaone_moe gemma3_text kolibri1", **WINDOW),
        **each("lara_mini ministral olmo3", **WINDOW),
        # An end that is never generated.
        **each("cwm", bos_token_id=1, eos_token_id=VOCABULARY, **WINDOW),
        **each("modernbert-decoder", bos_token_id=1, eos_token_id=VOCABULARY, sliding_window=OMIT),
    },
    "layers with attention; others are linear attention, convolutions or Mamba": {
        **each("qwen3_5_text qwen3_5_moe_text qwen3_next", **LINEAR),
        **each("lfm2 lfm2_moe lfm3", layer_types=["conv", "full_attention"]),
        **each("bamba", attn_layer_indices=[1], **MAMBA),
        **each("granitemoehybrid", layer_types=["mamba", "attention"], **MAMBA),
        **each("minimax olmo_hybrid"),
    },
}
# What `convert` refuses: why -> a part of the message, and the model types.
REFUSED: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
    "their layers keep keyword arguments from the attention, and so index losses and documents": (
        "to hand its keyword arguments on to self.self_attn",
        each("nemotron stablelm"),
    ),
    "latent attention": ("no latent attention", each("axk1 deepseek_v3 glm4_moe_lite minicpm3 youtu", **LATENT)),
    "an indexer of their own": (
        "no own indexer",
        {**each("axk2 deepseek_v32", **LATENT), **each("hy_v4 minimax_m3_vl_text")},
    ),
    "attention sinks": (
        "no sinks",
        {
            **each("deepseek_v4 mimo_v2_flash", sliding_window=OMIT),
            **each("flint gpt_oss granite_swa granitemoe_swa", **WINDOW),
        },
    ),
    "soft-capped logits": ("no attn_logit_softcapping", each("gemma2 vaultgemma", **WINDOW)),
    "differential attention": ("no differential attention", each("diffllama")),
    "experts in the attention": ("no experts in the attention", each("jetmoe")),
    "layers of different sizes": ("layers of equal sizes", each("gemma4_text gemma4_unified_text", **WINDOW)),
    "several stacks of layers": ("one HrmTextAttention for each layer_idx", each("hrm_text")),
    "attention and another mixer in each layer": ("has the type 'hybrid'", each("zaya", num_experts_per_tok=1)),
    "attention without RoPE, or with RoPE of another form": (
        "expected attention with RoPE",
        {**each("gptj", rotary_dim=4), **each("jamba", attn_layer_period=2, attn_layer_offset=1), **each("nemotron_h")},
    ),
    "dropout in the attention": ("no attention_dropout", each("falcon persimmon")),
}


def make(model_type: str, settings: dict[str, Any]) -> PreTrainedModel:
    """The same weights each time."""
    kind = CONFIG_MAPPING[model_type]
    known = {*inspect.signature(kind.__init__).parameters, *(getattr(kind, "attribute_map", None) or ())}
    known |= {"bos_token_id", "eos_token_id", "pad_token_id", *settings}
    given = {key: value for key, value in {**SIZES, **settings}.items() if key in known and value is not OMIT}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**given)).eval()


def rows() -> Iterator[str]:
    """The rows of the table in docs/transformers.md."""
    for what, types in CONVERTED.items():
        yield f"| {what} | {_names(types)} |"
    for why, (_, types) in REFUSED.items():
        yield f"| none: {why} | {_names(types)} |"


def _names(types: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(types))
