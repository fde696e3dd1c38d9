"""Converting a dense model: what stays, what is added, generation, padding, saving and loading."""

import copy
import json

import pytest
import torch
from integrations.converted import GROUPED, MODELS, SETTINGS, make_converted, make_dense, tokens
from integrations.device import DEVICE
from transformers import (
    DiffLlamaConfig,
    DiffLlamaForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from flexmsa import MSAConfig
from flexmsa._rope import rotate, rotation
from flexmsa.integrations.transformers import IndexLosses, convert, from_pretrained, msa_config, sequences, set_warm_up
from flexmsa.integrations.transformers.health import random_blocks
from flexmsa.integrations.transformers.index_branch import project_index
from flexmsa.testing import assert_close

ALL_MODELS = pytest.mark.parametrize("name", MODELS)


@ALL_MODELS
@torch.no_grad()
def test_the_warm_up_is_the_dense_model(name):
    dense, ids = make_dense(name), tokens(2, 30)
    exact, baseline = make_dense(name).double()(ids).logits, dense(ids).logits
    converted = make_converted(name, warm_up=True)
    assert_close("logits", converted(ids).logits, exact, baseline)
    weights = converted.state_dict()
    assert all(torch.equal(weights.pop(key), value) for key, value in dense.state_dict().items())
    assert all("index_" in key for key in weights)
    set_warm_up(converted, False)
    assert (converted(ids).logits - baseline).abs().max() > 0.01


@pytest.mark.parametrize(("name", "rotary"), [("llama", 8), ("qwen3", 16), ("phi", 4)])
@torch.no_grad()
def test_the_index_heads_turn_by_the_rope_of_the_model(name, rotary):
    model = make_converted(name)
    x, positions = torch.randn(1, 9, 32, device=DEVICE), torch.arange(9, device=DEVICE)[None]
    attention = model.model.layers[0].self_attn
    heads = project_index(attention, attention, x, model.model.rotary_emb(x, positions))
    for found, part in zip(heads, ("index_q", "index_k"), strict=True):
        projected = getattr(attention, f"{part}_proj")(x).unflatten(-1, (-1, attention.head_dim))
        still = getattr(attention, f"{part}_norm")(projected).transpose(1, 2)
        torch.testing.assert_close(found, rotate(still, *rotation(positions, rotary, 1e4)))
        assert (found - still).abs().max() > 0.1


@ALL_MODELS
@torch.no_grad()
def test_generation_equals_the_uncached_forward(name):
    model, prompt = make_converted(name), tokens(2, 21)
    written = model.generate(prompt, max_new_tokens=25, do_sample=False, attention_mask=torch.ones_like(prompt))
    whole = model(written).logits.argmax(-1)
    assert torch.equal(written[:, prompt.shape[1] :], whole[:, prompt.shape[1] - 1 : -1])


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@torch.no_grad()
def test_static_cache_beams_and_chunks(name):
    model, prompt = make_converted(name), tokens(2, 21)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    greedy = model.generate(prompt, **options)
    static = model.generate(prompt, **options, cache_implementation="static", disable_compile=True)
    assert torch.equal(greedy, static)
    beams = model.generate(prompt, **options, num_beams=3)
    uncached = model.generate(prompt, **options, num_beams=3, use_cache=False)
    assert torch.equal(beams, uncached)
    cache = DynamicCache(config=model.config)
    parts = [model(part, past_key_values=cache, use_cache=True).logits for part in greedy.split(8, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(greedy).logits)


@torch.no_grad()
def test_a_cache_that_another_model_filled_is_refused():
    model, cache = make_converted(), DynamicCache()
    make_dense()(tokens(1, 5), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match=r"cache: .* no index keys"):
        model(tokens(1, 1), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
@torch.no_grad()
def test_padded_rows_are_what_they_are_alone(name):
    model, ids = make_converted(name), tokens(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    mask[1, 19:] = 0
    padded = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(padded[0, 13:], model(ids[:1, 13:]).logits[0])
    torch.testing.assert_close(padded[1, :19], model(ids[1:2, :19]).logits[0])
    torch.testing.assert_close(padded[2], model(ids[2:]).logits[0])


@torch.no_grad()
def test_left_padded_prompts_generate_what_they_do_alone():
    model, ids = make_converted(), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    together = model.generate(ids, attention_mask=mask, max_new_tokens=15, do_sample=False)
    alone = model.generate(ids[:1, 9:], attention_mask=mask[:1, 9:], max_new_tokens=15, do_sample=False)
    assert torch.equal(together[0, 9:], alone[0])


@torch.no_grad()
def test_packed_documents_are_what_they_are_alone():
    model, ids = make_converted(), tokens(1, 40)
    lengths = (17, 1, 22)
    positions = torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None]
    packed = model(ids, position_ids=positions, use_cache=False).logits
    offsets = torch.tensor([0, 17, 18, 40], dtype=torch.int32, device=DEVICE)
    flattened = model(ids, position_ids=positions, cu_seq_lens_q=offsets, cu_seq_lens_k=offsets, use_cache=False)
    alone = torch.cat([model(part).logits for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone)
    torch.testing.assert_close(flattened.logits, alone)


@torch.no_grad()
def test_only_the_layers_asked_for_are_converted():
    ids, dense = tokens(2, 30), make_dense()
    model = make_converted(layers=[1])
    assert model.flexmsa.layers == (1,)
    assert not hasattr(model.model.layers[0].self_attn, "index_q_proj")
    first = model.model.layers[0](model.model.embed_tokens(ids), position_embeddings=_rope(model, ids))
    theirs = dense.model.layers[0](dense.model.embed_tokens(ids), position_embeddings=_rope(dense, ids))
    torch.testing.assert_close(first, theirs)
    assert (model(ids).logits - dense(ids).logits).abs().max() > 0.01


def _rope(model, ids):
    return model.model.rotary_emb(torch.zeros(1, device=DEVICE), torch.arange(ids.shape[1], device=DEVICE)[None])


@torch.no_grad()
def test_layers_with_a_window_stay_as_they_are():
    model, ids = make_converted("gemma3"), tokens(2, 30)
    assert model.flexmsa.layers == (1,)
    model.flexmsa.warm_up = True
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    padded, dense = (x(ids, attention_mask=mask).logits[0, 5:] for x in (model, make_dense("gemma3")))
    torch.testing.assert_close(padded, dense)


@torch.no_grad()
def test_a_selection_of_ones_own():
    model, ids = make_converted(), tokens(2, 30)
    by_index = model(ids).logits
    model.flexmsa.select = random_blocks
    assert (model(ids).logits - by_index).abs().max() > 0.01
    with pytest.raises(ValueError, match=r"select: .* one sequence"):
        model(ids, attention_mask=torch.tensor([[0] + [1] * 29] * 2, device=DEVICE))


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
@pytest.mark.parametrize("warm_up", [True, False])
@torch.no_grad()
def test_saved_and_loaded(name, warm_up, tmp_path):
    model, ids = make_converted(name, warm_up=warm_up), tokens(2, 30)
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path, SETTINGS).to(DEVICE)
    assert type(loaded) is type(model)
    assert loaded.flexmsa.config == model.flexmsa.config
    assert (loaded.flexmsa.layers, loaded.flexmsa.warm_up) == (model.flexmsa.layers, warm_up)
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(from_pretrained(tmp_path / "again").to(DEVICE).eval()(ids).logits, model(ids).logits)
    assert from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_other_checkpoints_are_refused(tmp_path):
    make_dense().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"without 'flexmsa' in its config\.json"):
        from_pretrained(tmp_path / "dense")
    model = make_converted()
    model.save_pretrained(tmp_path / "converted")
    with pytest.raises(ValueError, match="block_size is 4 there and 8 here; topk is 3 there and 2 here"):
        from_pretrained(tmp_path / "converted", {"block_size": 8, "topk": 2})
    with pytest.raises(ValueError, match="head_dim is 16 there and 8 here"):
        from_pretrained(tmp_path / "converted", {"head_dim": 8})
    with pytest.raises(ValueError, match="settings: expected names of MSAConfig, got 'top_k'"):
        from_pretrained(tmp_path / "converted", {"top_k": 2})
    model.save_pretrained(
        tmp_path / "partial", state_dict={k: v for k, v in model.state_dict().items() if "1.self_attn.index_" not in k}
    )
    with pytest.raises(ValueError, match=r"4 are missing, such as model\.layers\.1\.self_attn\.index_k_norm"):
        from_pretrained(tmp_path / "partial")
    path = tmp_path / "converted" / "config.json"
    config = json.loads(path.read_text())
    config["flexmsa"]["index_head_dim"] = 24
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"index_k_norm.weight is \[16\] there and \[24\] here"):
        from_pretrained(tmp_path / "converted")


@torch.no_grad()
def test_with_another_attention_it_is_the_dense_model():
    model, dense, ids = make_converted(), make_dense(), tokens(2, 30)
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    by_index = model(ids, attention_mask=mask).logits
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, dense(ids, attention_mask=mask).logits)
    assert model.train()(ids, labels=ids).get("index_loss") is None
    model.eval().set_attn_implementation("flexmsa")
    assert torch.equal(model(ids, attention_mask=mask).logits, by_index)


def test_rows_of_one_sequence_need_no_table(monkeypatch):
    """Nothing is looked for, which would wait for a GPU."""
    model, ids = make_converted().train(), tokens(2, 30)

    def refuse(*args):
        raise AssertionError("a table was made")

    monkeypatch.setattr(sequences, "row_table", refuse)
    model(ids, labels=ids, use_cache=False).loss.backward()
    with pytest.raises(AssertionError, match="a table was made"):
        model(ids, position_ids=torch.arange(30, device=DEVICE)[None], use_cache=False)


def test_a_copy_is_a_model_of_its_own():
    model, ids = make_converted(), tokens(1, 30)
    twin = copy.deepcopy(model)
    set_warm_up(twin, True)
    assert not model.flexmsa.warm_up
    assert twin.model.layers[0].self_attn.msa is twin.flexmsa
    assert (twin(ids).logits - model(ids).logits).abs().max() > 0.01


@torch.no_grad()
def test_a_dense_model_of_the_same_config_stays_dense():
    dense, ids = make_dense(), tokens(1, 30)
    logits = dense(ids).logits
    other = convert(type(dense)(dense.config), SETTINGS)
    assert torch.equal(dense(ids).logits, logits)
    assert not hasattr(dense.config, "flexmsa")
    assert other.model.layers[0].self_attn.config is other.model.config is other.config


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(TypeError, match="model: expected a transformers PreTrainedModel, got Linear"):
        convert(torch.nn.Linear(2, 2), SETTINGS)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0))
    with pytest.raises(ValueError, match="expected attention with RoPE, got GPT2Attention"):
        convert(gpt2, SETTINGS)
    with pytest.raises(ValueError, match="converted already"):
        convert(make_converted(), SETTINGS)
    with pytest.raises(ValueError, match="expected num_kv_heads=2, as the model has, got 4"):
        convert(make_dense(), MSAConfig(32, num_heads=4, num_kv_heads=4, head_dim=16, index_head_dim=16))
    with pytest.raises(ValueError, match="rotary_dim"):
        convert(make_dense(), {"rotary_dim": 8})
    with pytest.raises(ValueError, match="topk"):
        convert(make_dense(), {"topk": None})
    with pytest.raises(ValueError, match=r"layers: expected some of \[1\], got 0, which has a sliding window"):
        convert(make_dense("gemma3"), SETTINGS, layers=[0, 1])
    with pytest.raises(ValueError, match="got 7, which does not exist"):
        convert(make_dense(), SETTINGS, layers=[7])
    with pytest.raises(ValueError, match="every layer has a sliding window"):
        convert(make_dense("mistral", sliding_window=8), SETTINGS)
    with pytest.raises(ValueError, match="no differential attention"):
        convert(DiffLlamaForCausalLM(DiffLlamaConfig(**GROUPED)), SETTINGS)
    with pytest.raises(ValueError, match="no attention_dropout"):
        convert(make_dense(attention_dropout=0.1), SETTINGS)
    with pytest.raises(ValueError, match="index_losses: expected none"):
        make_converted()(tokens(1, 5), index_losses=IndexLosses())
    with pytest.raises(ValueError, match="index_head_dim: expected at least the 16 dimensions"):
        convert(make_dense(), {**SETTINGS, "index_head_dim": 8})(tokens(1, 5))


def test_a_trained_index_branch_is_not_replaced():
    converted = make_converted("llama")
    head = LlamaForSequenceClassification(make_dense("llama").config)
    head.model = converted.model
    inner = make_dense("llama")
    convert(inner.model, SETTINGS)
    before = converted.model.layers[0].self_attn.index_q_proj.weight
    for model in (head, inner, converted.model):
        with pytest.raises(ValueError, match="would replace their trained index branch: attach the head before conv"):
            convert(model, SETTINGS)
    assert converted.model.layers[0].self_attn.index_q_proj.weight is before


def test_the_checkpoint_of_a_converted_model_loads_as_a_dense_one(tmp_path):
    make_converted("llama").save_pretrained(tmp_path)
    dense = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_pretrained"):
        convert(dense, SETTINGS)


def test_the_sizes_are_those_of_the_model():
    config = msa_config(LlamaForCausalLM(LlamaConfig(**GROUPED, rms_norm_eps=1e-4)), topk=2, index_head_dim=12)
    assert config == MSAConfig(32, 4, 2, head_dim=8, index_head_dim=12, topk=2, norm_eps=1e-4)
