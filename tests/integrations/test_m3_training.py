"""The index loss of each layer: its value, whom its gradient reaches, and that checkpointing keeps it."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from integrations.device import DEVICE, training_arguments
from integrations.m3 import make_m3, tokens
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import apply_rotary_pos_emb

import flexmsa
from flexmsa.integrations.transformers import IndexLosses
from flexmsa.testing import assert_close

SPARSE_LAYERS = [1, 2]


def train(model, weight=0.5, **inputs):
    """One training step: the loss of each layer, and the gradients."""
    losses = IndexLosses()
    x = tokens(2, 60)
    out = model.train()(x, labels=x, index_losses=losses, **inputs)
    losses.add_to(out.loss, weight).backward()
    return losses.values, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def measure(model, x, **inputs):
    """The loss of each layer, without gradients."""
    losses = IndexLosses()
    with torch.no_grad():
        model(x, index_losses=losses, **inputs)
    return torch.stack(list(losses.values.values()))


def warm_up(model):
    for module in model.modules():
        if hasattr(module, "topk_blocks"):
            module.topk_blocks = None
    return model


def test_a_loss_for_each_sparse_layer():
    values, gradients = train(make_m3("flexmsa"))
    assert list(values) == SPARSE_LAYERS
    assert all(value > 0.01 and not value.requires_grad for value in values.values())
    assert gradients.keys() == dict(make_m3("flexmsa").named_parameters()).keys()


def test_the_losses_are_summed_over_the_layers():
    losses = IndexLosses(in_backward=False)
    out = make_m3("flexmsa").train()(tokens(2, 60), labels=tokens(2, 60), index_losses=losses)
    total = losses.add_to(out.loss, weight=0.25)
    torch.testing.assert_close(total, out.loss + 0.25 * losses.values[1] + 0.25 * losses.values[2])


@pytest.mark.parametrize("topk", [3, None])
def test_the_loss_is_that_of_the_definition(topk):
    model = make_m3("flexmsa")
    if topk is None:
        warm_up(model)
    seen = {}
    layer = model.model.layers[1].self_attn
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    losses = IndexLosses()
    model(tokens(2, 60), index_losses=losses)
    with torch.no_grad():
        expected = _loss_of_layer(layer, seen["hidden_states"], seen["position_embeddings"], topk, torch.float64)
        eager = _loss_of_layer(layer, seen["hidden_states"], seen["position_embeddings"], topk, torch.float32)
    assert_close("index loss", losses.values[1], expected, eager)


def _loss_of_layer(layer, hidden_states, rope, topk, dtype):
    """From the layer's weights, through the dense reference."""

    def heads(project, norm, size):
        out = project(hidden_states).unflatten(-1, (-1, size))
        return norm(out).transpose(1, 2)

    indexer = layer.indexer
    q, k = apply_rotary_pos_emb(
        heads(layer.q_proj, layer.q_norm, 16), heads(layer.k_proj, layer.k_norm, 16), rope[0], rope[1]
    )
    index_q, index_k = apply_rotary_pos_emb(
        heads(indexer.q_proj, indexer.q_norm, 16), heads(indexer.k_proj, indexer.k_norm, 16), rope[0], rope[1]
    )
    inputs = [x.to(dtype) for x in (q, k, torch.zeros_like(k), index_q, index_k)]
    settings = {"block_size": 8, "topk": topk, "backend": "reference"}
    return flexmsa.attention(*inputs, **settings, return_aux=flexmsa.AuxRequest(index_loss=True))[1].index_loss


def test_its_gradient_reaches_the_index_weights_only():
    _, without = train(make_m3("flexmsa"), weight=0.0)
    _, with_loss = train(make_m3("flexmsa"), weight=0.5)
    for name, grad in with_loss.items():
        assert grad.equal(without[name]) == (".indexer." not in name), name
    _, twice = train(make_m3("flexmsa"), weight=1.0)
    for name in (name for name in twice if ".indexer." in name):
        torch.testing.assert_close(twice[name], 2 * with_loss[name])


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}])
def test_the_index_branches_alone(checkpointing):
    model = warm_up(make_m3("flexmsa"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
    losses = IndexLosses()
    model.train()(tokens(2, 60), index_losses=losses, use_cache=False)
    losses.add_to(torch.zeros((), device=DEVICE), weight=1.0).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (".indexer." in name), name


def test_frozen_indexers_are_noticed():
    model = make_m3("flexmsa").train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".indexer." not in name)
    losses = IndexLosses()
    out = model(tokens(1, 30), labels=tokens(1, 30), index_losses=losses)
    with pytest.raises(RuntimeError, match="the index weights are frozen"):
        losses.add_to(out.loss, weight=1.0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(reentrant, autocast):
    def step(checkpointed):
        model = make_m3("flexmsa")
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            return train(model)

    (values, gradients), (expected_values, expected) = step(True), step(False)
    assert gradients.keys() == expected.keys()
    if reentrant and DEVICE.type == "cuda":
        # Its first forward is without gradients, for which FlexAttention takes other tiles: other rounding, other ids.
        assert all(abs(value - expected_values[layer]) < 0.01 * value for layer, value in values.items())
        if not autocast:
            cosines = {n: torch.cosine_similarity(x.flatten(), expected[n].flatten(), 0) for n, x in gradients.items()}
            assert min(cosines.values()) > 0.99
        return
    assert values == expected_values
    for name, grad in gradients.items():
        assert grad.equal(expected[name]), name


def test_autocast_is_close_to_float32():
    values, gradients = train(make_m3("flexmsa"))
    with torch.autocast(DEVICE.type, torch.bfloat16):
        autocast_values, autocast_gradients = train(make_m3("flexmsa"))
    for layer in SPARSE_LAYERS:
        assert autocast_values[layer].dtype == torch.float32
        assert abs(autocast_values[layer] - values[layer]) < 0.02 * values[layer]
    for name in (name for name in gradients if ".indexer." in name):
        assert autocast_gradients[name].dtype == torch.float32
        assert torch.cosine_similarity(autocast_gradients[name].flatten(), gradients[name].flatten(), dim=0) > 0.98


def test_the_trainer_of_the_documents_accumulates(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    recipe = next(x for x in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "class MSATrainer" in x)
    names = {"IndexLosses": IndexLosses}
    exec(recipe.split("arguments =")[0], names)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokens(4, 40).cpu()]
    trained = []
    for steps in (1, 2):
        options = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps}
        options |= {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "save_strategy": "no"}
        arguments = training_arguments(tmp_path, 1, **options)
        model = make_m3("flexmsa")
        names["MSATrainer"](model, arguments, train_dataset=rows).train()
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value, msg=name)


def test_padding_and_packing_do_not_change_the_loss():
    """A batch's loss is the mean over its tokens, padding left out."""
    model = make_m3("flexmsa")
    x = tokens(1, 60)
    ends = [0, 13, 24, 60]
    alone = [measure(model, x[:, start:end]) for start, end in itertools.pairwise(ends)]
    lengths = torch.tensor([end - start for start, end in itertools.pairwise(ends)], device=DEVICE)
    packed = measure(model, x, position_ids=torch.cat([torch.arange(n, device=DEVICE) for n in lengths])[None])
    mean = (torch.stack(alone) * lengths[:, None]).sum(0) / lengths.sum()
    torch.testing.assert_close(packed, mean)
    token = torch.arange(80, device=DEVICE)
    for mask in (token >= 20, token < 60):
        padded = tokens(1, 80, seed=5).masked_scatter(mask, x)
        torch.testing.assert_close(measure(model, padded, attention_mask=mask[None]), measure(model, x))


def test_one_collector_for_each_forward():
    losses = IndexLosses()
    with pytest.raises(RuntimeError, match="expected to be filled by a forward pass"):
        losses.add_to(torch.zeros(()), weight=1.0)
    model = make_m3("flexmsa")
    model(tokens(1, 30), index_losses=losses)
    with pytest.raises(ValueError, match="make one for each forward"):
        model(tokens(1, 30), index_losses=losses)
