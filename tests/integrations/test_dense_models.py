"""What `convert` refuses of a model before it changes it, beside what test_families.py tries; and Step-3.7."""

import pytest
import torch
from transformers import MiniMaxM3VLForCausalLM, Step3p7Config, Step3p7ForConditionalGeneration
from transformers.models.llama import modeling_llama

from flexmsa.integrations.transformers import convert, register, set_warm_up
from flexmsa.integrations.transformers.losses import IndexLossValue

from .converted import DEVICE, GROUPED, SETTINGS, make_dense, tokens
from .m3 import m3_text_config


def attends_alone(self, hidden_states, position_embeddings=None, past_key_values=None, **kwargs):
    attention_interface = modeling_llama.eager_attention_forward
    return attention_interface(self, hidden_states, hidden_states, hidden_states, None, scaling=1.0)


def test_attention_that_keeps_its_keyword_arguments_is_refused(monkeypatch):
    model = make_dense("llama")
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", attends_alone)
    with pytest.raises(ValueError, match="expected attends_alone to hand its keyword arguments on to an attention f"):
        convert(model, SETTINGS)
    assert not hasattr(model, "flexmsa") and not any("index" in name for name in model.state_dict())


def test_a_class_without_source_is_taken(monkeypatch):
    """Such as one of a notebook: whether it hands on its keyword arguments is seen in the first forward pass."""
    names: dict = {}
    exec("def forward(self, hidden_states, position_embeddings, past_key_values=None, **kwargs): ...", names)
    model = make_dense("llama")
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", names["forward"])
    assert convert(model, SETTINGS).flexmsa.layers == (0, 1)


def make_step(layer_types: list[str]) -> Step3p7ForConditionalGeneration:
    text = {
        **GROUPED,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": layer_types,
        "mlp_layer_types": ["dense"] * 2,
    }
    text |= {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    text |= {"share_expert_dim": 16, "query_pre_attn_scalar": 16}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Step3p7Config(text_config=text, vision_config=vision, image_token_id=60)
    torch.manual_seed(0)
    return Step3p7ForConditionalGeneration(config).to(DEVICE).eval()


@torch.no_grad()
def test_step_is_a_dense_model():
    """Its configuration knows layers as those of MiniMax-M3; its attention in transformers has no indexer."""
    model, ids = make_step(["sliding_attention", "full_attention"]), tokens(1, 30) % 60
    dense = model(ids).logits
    convert(model, SETTINGS)
    assert model.flexmsa.layers == (1,)
    torch.testing.assert_close(model(ids).logits, dense, rtol=1e-4, atol=1e-4)
    set_warm_up(model, False)
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(written[:, 30:], model(written).logits.argmax(-1)[:, 29:-1])
    assert (model(ids).logits - dense).abs().max() > 0.1


def test_step_with_sparse_layers_is_refused():
    with pytest.raises(ValueError, match=r"got layer_types with 'minimax_m3_sparse' and attention without an indexer"):
        convert(make_step(["full_attention", "minimax_m3_sparse"]), SETTINGS)


@torch.no_grad()
def test_a_model_that_is_not_converted_says_what_to_do():
    register()
    model = make_step(["sliding_attention", "full_attention"])
    model.set_attn_implementation("flexmsa")
    with pytest.raises(NotImplementedError, match=r"got Step3p7Attention; .*convert\(model\) for others"):
        model(tokens(1, 30) % 60)


@pytest.mark.parametrize("kind", ["converted", "m3"])
def test_weights_that_are_made_on_no_device_are_initialized(kind):
    """As `from_pretrained` does: first the module without memory, then all that the checkpoint does not have."""
    register()
    with torch.device("meta"):
        model = MiniMaxM3VLForCausalLM(m3_text_config())
    if kind == "converted":
        model = convert(make_dense().to("meta"), SETTINGS)
    model.to_empty(device="cpu")
    values = [module.value for module in model.modules() if isinstance(module, IndexLossValue)]
    for value in values:
        value.fill_(7.0)
    for module in model.modules():
        module._is_hf_initialized = False
    model.init_weights()
    assert len(values) == 2 and all(value == 0 for value in values)
