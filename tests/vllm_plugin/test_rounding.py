"""Where numbers are rounded in bf16: what docs/vllm.md says of it, part by part."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb
from vllm_plugin.engine import engine

TOKENS, LAYER = 300, 1


@pytest.fixture(scope="module")
def layers(checkpoint):
    """The same decoder layer of transformers and of vLLM, and the RoPE of transformers for each position."""
    folder = checkpoint()
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).model
    with engine(folder, dtype="bfloat16") as llm, torch.no_grad():
        (ours,) = llm.apply_model(lambda model: model.model.layers[LAYER])
        rope = theirs.rotary_emb(torch.zeros(1, dtype=torch.bfloat16), torch.arange(TOKENS)[None])
        yield theirs.layers[LAYER], ours, rope


def randn(*shape):
    return torch.randn(TOKENS, *shape, dtype=torch.bfloat16)


@torch.no_grad()
def test_the_norms_of_the_index_branch_round_as_those_of_transformers(layers):
    theirs, ours, _ = layers
    index_q, index_k = randn(2, 32), randn(1, 32)
    branch = ours.self_attn.index_branch
    assert torch.equal(branch.q_norm(index_q), theirs.self_attn.index_q_norm(index_q))
    assert torch.equal(branch.k_norm(index_k), theirs.self_attn.index_k_norm(index_k))


@torch.no_grad()
def test_rope_of_vllm_rounds_once_and_that_of_transformers_each_product(layers):
    _, ours, (cos, sin) = layers
    q = randn(4, 32)

    def rotated(x, cos, sin):
        heads = x.transpose(0, 1)[None]
        return apply_rotary_pos_emb(heads, heads, cos, sin)[0][0].transpose(0, 1)

    for module in (ours.self_attn.rotary_emb, ours.self_attn.index_branch.rotary_emb):
        given = q.flatten(1).clone()
        found = module(torch.arange(TOKENS), given, given.clone())[0].view_as(q)
        assert torch.equal(found, rotated(q.float(), cos.float(), sin.float()).bfloat16())
        assert not torch.equal(found, rotated(q, cos, sin))


@torch.no_grad()
def test_vllm_normalises_the_residual_before_it_is_rounded(layers):
    theirs, ours, _ = layers
    x, residual = randn(128), randn(128)
    assert torch.equal(ours.input_layernorm(x), theirs.input_layernorm(x))
    found, added = ours.input_layernorm(x.clone(), residual.clone())
    assert torch.equal(added, x + residual)
    exact = theirs.input_layernorm(x.float() + residual.float())
    assert (found - exact).norm() < (theirs.input_layernorm(x + residual) - exact).norm()
