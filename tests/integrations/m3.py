"""Tiny MiniMax-M3 models of transformers' own classes, with random weights that make the selection matter."""

import torch
from integrations.device import DEVICE
from torch import Tensor
from transformers import (
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    MiniMaxM3VLForCausalLM,
    MiniMaxM3VLTextConfig,
    MiniMaxM3VLVisionConfig,
)

from flexmsa.integrations.transformers import register

VOCABULARY = 97
IMAGE_TOKEN = VOCABULARY - 1
# The settings of one layer of each kind, without experts.
SMALL = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "dense"],
}


def m3_text_config(**settings) -> MiniMaxM3VLTextConfig:
    """One dense and two sparse layers, one of them with experts; blocks of 8 keys, 3 of them selected."""
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 24,
        "dense_intermediate_size": 48,
        "shared_intermediate_size": 24,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_block_size": 8,
        "index_topk_blocks": 3,
        "max_position_embeddings": 1 << 16,
        "initializer_range": 0.25,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return MiniMaxM3VLTextConfig(**{**defaults, **settings})


def make_m3(implementation: str, **settings) -> MiniMaxM3VLForCausalLM:
    """The text model. Every implementation gets the same weights."""
    register()
    torch.manual_seed(0)
    model = MiniMaxM3VLForCausalLM(m3_text_config(**settings))
    model.set_attn_implementation(implementation)
    return model.to(DEVICE).eval()


def make_vision_m3(implementation: str) -> MiniMaxM3SparseForConditionalGeneration:
    """The vision-language model; an image is 4 x 4 patches of 4 x 4 pixels, merged into 4 tokens."""
    register()
    vision = MiniMaxM3VLVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, patch_size=4, image_size=16
    )
    config = MiniMaxM3VLConfig(
        text_config=m3_text_config(),
        vision_config=vision,
        projector_hidden_size=32,
        image_token_index=IMAGE_TOKEN,
        video_token_index=IMAGE_TOKEN - 1,
    )
    torch.manual_seed(0)
    model = MiniMaxM3SparseForConditionalGeneration(config)
    model.set_attn_implementation(implementation)
    return model.to(DEVICE).eval()


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Token ids, none of them special."""
    return torch.randint(1, VOCABULARY - 2, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two logits, which are of order 1. In float32, 1e-4 is the same."""
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()
