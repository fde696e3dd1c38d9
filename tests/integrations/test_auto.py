"""Checkpoints of converted models through transformers' own loaders: they give the converted model, or say why not."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    pipeline,
)

from flexmsa.integrations.transformers import convert, from_pretrained, set_warm_up

from .converted import DEVICE, GROUPED, MODELS, SETTINGS, SLIDING, make_converted, make_dense, tokens


@pytest.fixture
def checkpoint(tmp_path):
    make_converted().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MODELS)
def test_the_auto_class_loads_what_was_saved(name, tmp_path):
    model, ids = make_converted(name, layers=[1]), tokens(2, 40)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.flexmsa.layers == (1,) and type(loaded) is type(model)
    assert loaded.config.model_type == make_dense(name).config.model_type
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").to(DEVICE).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_pipeline_generates_with_the_converted_model(checkpoint):
    model = pipeline("text-generation", model=str(checkpoint), tokenizer=_Tokenizer()).model
    assert hasattr(model, "flexmsa")


class _Tokenizer:
    """Enough of one for a pipeline to be made."""

    pad_token_id = eos_token_id = 0
    padding_side, chat_template = "left", None


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, from_pretrained], ids=["auto", "flexmsa"])
def test_options_of_from_pretrained(load, checkpoint):
    ids = tokens(2, 40)
    dense = load(checkpoint, attn_implementation="sdpa").to(DEVICE).eval()
    torch.testing.assert_close(dense(ids).logits, make_dense()(ids).logits)
    dense.set_attn_implementation("flexmsa")
    assert torch.equal(dense(ids).logits, make_converted()(ids).logits)
    assert load(checkpoint, attn_implementation="flexmsa").config._attn_implementation == "flexmsa"
    assert load(checkpoint, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert load(checkpoint, rms_norm_eps=0.5).config.rms_norm_eps == 0.5
    model, found = load(checkpoint, output_loading_info=True)
    assert hasattr(model, "flexmsa") and not found["missing_keys"]
    config = AutoConfig.from_pretrained(checkpoint)
    config.vocab_size += 1
    # As transformers raises it.
    with pytest.raises(RuntimeError, match="expected weights of the shapes"):
        load(checkpoint, config=config)
    assert load(checkpoint, config=config, ignore_mismatched_sizes=True).lm_head.out_features == config.vocab_size


def test_index_weights_that_are_missing_are_found_by_the_auto_class(tmp_path):
    model = make_converted()
    state = {name: x for name, x in model.state_dict().items() if "layers.1.self_attn.index_k" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match="expected the weights of every index branch, but 2 are missing"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_without_flexmsa_the_error_names_it(checkpoint):
    code = "import sys; from transformers import AutoConfig; AutoConfig.from_pretrained(sys.argv[1])"
    found = subprocess.run([sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, check=False)
    assert found.returncode and "has model type `flexmsa`" in found.stderr


def test_another_head_is_refused(checkpoint):
    with pytest.raises(ValueError, match="FlexMSAQwen3Config"):
        AutoModelForSequenceClassification.from_pretrained(checkpoint)


@pytest.mark.parametrize("kind", [Qwen3ForSequenceClassification, Qwen3ForTokenClassification])
@torch.no_grad()
def test_classifiers_load(kind, tmp_path):
    torch.manual_seed(0)
    model, ids = convert(kind(make_dense().config), SETTINGS).to(DEVICE).eval(), tokens(1, 40)
    set_warm_up(model, False)
    model.save_pretrained(tmp_path)
    auto = getattr(transformers, kind.__name__.replace("Qwen3", "AutoModel"))
    for load in (auto.from_pretrained, from_pretrained):
        loaded = load(tmp_path).to(DEVICE).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert type(loaded) is kind and loaded.flexmsa.layers == model.flexmsa.layers
        assert loaded.model.config is loaded.config and type(loaded.config).__name__ == "FlexMSAQwen3Config"


@torch.no_grad()
def test_a_model_with_images_loads_for_text_and_refuses_images(tmp_path):
    text = {**GROUPED, **SLIDING, "head_dim": 16, "pad_token_id": 0}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_id=60)
    model, ids = convert(Gemma3ForConditionalGeneration(config), SETTINGS).to(DEVICE).eval(), tokens(1, 40) % 60
    assert model.model.vision_tower.config is model.config.vision_config is not config.vision_config
    set_warm_up(model, False)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        loaded = auto.from_pretrained(tmp_path).to(DEVICE).eval()
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    image = torch.zeros_like(ids)
    image[:, 3:7] = 1
    with pytest.raises(NotImplementedError, match="mask_function: expected causal attention, got or_masks"):
        model(ids, token_type_ids=image)
    positions = torch.arange(20, device=DEVICE).repeat(2)[None]
    with pytest.raises(NotImplementedError, match="mask_function: expected causal attention, got or_masks"):
        model(ids, position_ids=positions, token_type_ids=image, use_cache=False)


def test_configurations_are_copied(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), make_converted().config):
        assert type(other) is type(config) and other.flexmsa == config.flexmsa
    model = AutoModelForCausalLM.from_config(config)
    assert model.flexmsa.config.topk == 3


def test_the_configuration_of_a_model_that_was_not_saved_makes_another():
    model, ids = make_converted("phi3"), tokens(1, 30)
    other = AutoModelForCausalLM.from_config(model.config).to(DEVICE).eval()
    assert other.flexmsa.layers == (0, 1) and type(other) is type(model)
    other.load_state_dict(model.state_dict())
    other = pickle.loads(pickle.dumps(other))
    assert torch.equal(other(ids).logits, model(ids).logits)


class LlamaLikeConfig(LlamaConfig):
    model_type = "llama_like"


def test_configurations_that_share_an_architecture(tmp_path):
    """As some that transformers loads with Llama's classes."""
    AutoConfig.register(LlamaLikeConfig.model_type, LlamaLikeConfig, exist_ok=True)
    model, ids = convert(LlamaForCausalLM(LlamaLikeConfig(**GROUPED)), SETTINGS).to(DEVICE).eval(), tokens(1, 30)
    model.save_pretrained(tmp_path / "like")
    make_converted("llama").save_pretrained(tmp_path / "llama")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "like").to(DEVICE).eval()
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert type(loaded.config) is type(model.config) is not type(make_converted("llama").config)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").to(DEVICE).eval()
    assert torch.equal(other(ids).logits, make_converted("llama")(ids).logits)


def test_outputs_are_pickled():
    ids = tokens(1, 20)
    output = make_converted().train()(ids, labels=ids, use_cache=False)
    again = pickle.loads(pickle.dumps(output))
    assert type(again) is type(output) and again.keys() == output.keys()
    assert torch.equal(again.logits, output.logits) and again.index_loss == 0


def test_a_pickled_model_runs_in_another_process(tmp_path):
    model, ids = make_converted(), tokens(1, 30)
    torch.save((model, ids), tmp_path / "model.pt")
    code = """import sys, torch
model, ids = torch.load(sys.argv[1], weights_only=False)
torch.save(model(ids).logits, sys.argv[1])"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)
    assert torch.equal(torch.load(tmp_path / "model.pt"), model(ids).logits)
