"""torch.compile takes the whole model as one graph."""

import pytest
import torch
from integrations.converted import make_converted
from integrations.device import DEVICE
from integrations.m3 import error, make_m3, tokens
from transformers import CompileConfig, StaticCache

from flexmsa.integrations.transformers import IndexLosses

# No experts: the backward of transformers' own grouped_mm does not compile for a CPU.
SETTINGS = {
    "num_hidden_layers": 2,
    "layer_types": ["full_attention", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "dense"],
}


def compiled(model):
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def left_padding(length):
    return {"attention_mask": torch.arange(length, device=DEVICE) >= torch.tensor([[0], [17]], device=DEVICE)}


def documents(length):
    return {"position_ids": torch.cat([torch.arange(n, device=DEVICE) for n in (17, length - 17)])[None]}


@pytest.mark.parametrize("sequences", [lambda length: {}, left_padding, documents])
def test_a_forward(sequences):
    model = make_m3("flexmsa", **SETTINGS)
    x = tokens(2, 70)
    with torch.no_grad():
        expected = model(x, use_cache=False, **sequences(70)).logits
        actual = compiled(model)(x, use_cache=False, **sequences(70)).logits
    assert error(actual[:, 17:], expected[:, 17:]) < 1e-4


def test_documents_by_their_offsets():
    model, x = make_m3("flexmsa", **SETTINGS), tokens(1, 70)
    offsets = torch.tensor([0, 17, 70], dtype=torch.int32, device=DEVICE)
    with torch.no_grad():
        expected = model(x, use_cache=False, **documents(70)).logits
        actual = compiled(model)(x, use_cache=False, cu_seq_lens_q=offsets).logits
    assert error(actual, expected) < 1e-4


def test_through_the_compiler():
    layer = {"num_hidden_layers": 1, "layer_types": ["minimax_m3_sparse"], "mlp_layer_types": ["dense"]}
    eager, model = (make_m3(name, **layer) for name in ("eager", "flexmsa"))
    x = tokens(1, 70)
    with torch.no_grad():
        actual = torch.compile(model, fullgraph=True)(x, use_cache=False).logits
        assert error(actual, eager(x).logits) < 1e-4


def test_decoding_from_a_static_cache_compiles_once():
    model = make_m3("flexmsa", **SETTINGS)
    x = tokens(2, 50)
    cache = StaticCache(model.config, max_cache_len=64)
    step = compiled(model)
    with torch.no_grad():
        expected = model(x).logits
        model(x[:, :40], past_key_values=cache)
        step(x[:, 40:41], past_key_values=cache)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for i in range(41, 50):
                actual = step(x[:, i : i + 1], past_key_values=cache).logits
                assert error(actual[:, 0], expected[:, i]) < 1e-4


@pytest.mark.parametrize("make", [lambda: make_m3("flexmsa", **SETTINGS), make_converted], ids=["m3", "converted"])
def test_generating_into_a_static_cache_compiles_once(make):
    model, x = make(), tokens(2, 40) % 60 + 1
    mask = (torch.arange(40, device=DEVICE) >= torch.tensor([[0], [5]], device=DEVICE)).long()
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(x, **settings)
    # As transformers does by itself on a GPU.
    compiling = CompileConfig(fullgraph=True, dynamic=False, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    with torch._dynamo.config.patch(error_on_recompile=True):
        actual = model.generate(x, **settings, cache_implementation="static", compile_config=compiling)
    assert actual.equal(expected)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_step_with_the_index_loss(checkpointed):
    x = tokens(2, 50)

    def gradients(wrap):
        model = make_m3("flexmsa", **SETTINGS).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        losses = IndexLosses()
        out = wrap(model)(x, labels=x, use_cache=False, index_losses=losses)
        losses.add_to(out.loss, weight=0.5).backward()
        return {name: p.grad for name, p in model.named_parameters()}

    actual, expected = gradients(compiled), gradients(lambda model: model)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)
