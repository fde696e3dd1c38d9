"""The backward of a converted model computes the index losses, with activation checkpointing of every kind."""

import copy
from functools import partial

import pytest
import torch
from integrations.converted import SETTINGS, assert_same, make_converted, make_dense, tokens
from integrations.device import DEVICE
from integrations.m3 import make_m3
from torch.utils.checkpoint import create_selective_checkpoint_contexts, noop_context_fn

import flexmsa
from flexmsa.integrations.transformers import IndexLosses, begin_sparse, begin_warm_up, convert
from flexmsa.integrations.transformers.index_branch import is_index_weight
from flexmsa.kernels import torch as torch_kernels

ON_A_CPU = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the kernels of the CPU")
SAVES_ATTENTION = partial(create_selective_checkpoint_contexts, flexmsa.save_attention_policy)
CHECKPOINTING = {
    "none": None,
    "reentrant": {"use_reentrant": True},
    "selective": {"use_reentrant": False},
    "plain": {"use_reentrant": False, "context_fn": noop_context_fn},
    "attention": {"use_reentrant": False, "context_fn": SAVES_ATTENTION},
}
# Of each layer: how often its forward attends and selects.
REPEATS = {"none": (1, 1), "reentrant": (2, 2), "selective": (2, 1), "plain": (2, 2), "attention": (1, 1)}


def step(model, ids, loss=None):
    """Everything that a training step makes: gradients, index losses and the model's own loss."""
    model.zero_grad()
    outputs = model(ids, labels=ids, use_cache=False)
    ((lambda x: x) if loss is None else loss)(outputs.loss).backward()
    report = model.flexmsa.report
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"index losses": report.index_losses.clone(), "lm_loss": report.lm_loss}


def in_the_forward(model, ids):
    """The same, of a copy without checkpointing whose forward computes the losses."""
    model = copy.deepcopy(model)
    model.gradient_checkpointing_disable()
    model.flexmsa.loss_in_backward = False
    return step(model, ids)


@pytest.fixture
def calls(monkeypatch):
    """How often each kernel runs."""
    names = ("attend_blocks", "select_blocks", "index_loss", "attention_and_index_loss_backward")
    counted = dict.fromkeys(names, 0)

    def count(name, kernel):
        def run(*args):
            counted[name] += 1
            return kernel(*args)

        monkeypatch.setattr(torch_kernels, name, run)

    for name in names:
        count(name, getattr(torch_kernels, name))
    return counted


@pytest.mark.parametrize("phase", [begin_warm_up, begin_sparse])
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_gradients_and_losses_are_those_of_the_forward(kind, phase):
    model, ids = make_converted().train(), tokens(2, 30)
    phase(model)
    model.flexmsa.index_loss_weight = 0.5
    expected = in_the_forward(model, ids)
    if kind != "none":
        model.gradient_checkpointing_enable(CHECKPOINTING[kind])
    assert_same(step(model, ids), expected)


@ON_A_CPU
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_nothing_twice(kind, calls):
    model, ids = make_converted().train(), tokens(2, 30)
    if kind != "none":
        model.gradient_checkpointing_enable(CHECKPOINTING[kind])
    step(model, ids)
    attends, selects = REPEATS[kind]
    assert calls == {
        "attend_blocks": 2 * attends,
        "select_blocks": 2 * selects,
        "index_loss": 0,
        "attention_and_index_loss_backward": 2,
    }


@ON_A_CPU
@pytest.mark.parametrize(
    "kwargs", [{}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, {"every_n_layers": 2}]
)
@pytest.mark.parametrize("first", ["convert", "enable"])
def test_the_selection_is_saved_without_asking(first, kwargs, calls):
    model = make_dense()
    if first == "enable":
        model.gradient_checkpointing_enable(**kwargs)
    convert(model, SETTINGS)
    if first == "convert":
        model.gradient_checkpointing_enable(**kwargs)
    begin_sparse(model)
    step(model.train(), tokens(2, 30))
    assert calls["select_blocks"] == 2
    model.gradient_checkpointing_enable({"use_reentrant": True})
    step(model, tokens(2, 30))
    assert calls["select_blocks"] == 2 + 4


@pytest.mark.parametrize("kind", ["none", "selective"])
@pytest.mark.parametrize("phase", [begin_warm_up, begin_sparse])
def test_one_graph(phase, kind):
    model, ids = make_converted().train(), tokens(2, 30)
    phase(model)
    expected = in_the_forward(model, ids)
    if kind != "none":
        model.gradient_checkpointing_enable(CHECKPOINTING[kind])
        # transformers' hook for frozen embeddings, which torch.compile refuses.
        model.disable_input_require_grads()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        loss = compiled(ids, labels=ids, use_cache=False).loss
        assert model.flexmsa.report.index_losses.isnan().all()
        model.zero_grad()
        loss.backward()
        torch.testing.assert_close(model.flexmsa.report.index_losses, expected["index losses"])
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert_same(found, {name: expected[name] for name in found})


def test_each_forward_has_its_own_values():
    model, ids = make_converted().train(), tokens(2, 30)
    reports, total = [], 0
    for row in ids.split(1):
        total = total + model(row, labels=row).loss
        reports.append(model.flexmsa.report)
    assert all(report.index_losses.isnan().all() for report in reports)
    total.backward()
    for report, row in zip(reports, ids.split(1), strict=True):
        torch.testing.assert_close(report.index_losses, in_the_forward(model, row)["index losses"])


def test_validation_has_the_values_at_once():
    model, ids = make_converted().eval(), tokens(2, 30)
    model.flexmsa.with_health = True
    outputs = model(ids, labels=ids)
    expected = in_the_forward(model.train(), ids)["index losses"]
    torch.testing.assert_close(model.flexmsa.report.index_losses, expected)
    torch.testing.assert_close(outputs.index_loss, expected.sum())


def test_frozen_index_branches_have_the_values_at_once():
    model, ids = make_converted().train(), tokens(2, 30)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0" in name or not is_index_weight(name))
    model(ids, labels=ids)
    assert model.flexmsa.report.index_losses.isnan().tolist() == [True, False]
    assert_same(step(model, ids), in_the_forward(model, ids))


def test_values_stay_in_float32():
    model, ids = make_converted().bfloat16().train(), tokens(2, 30)
    assert copy.deepcopy(model).model.layers[0].self_attn.index_loss_value.value.dtype == torch.float32
    step(model, ids)
    losses = model.flexmsa.report.index_losses
    assert losses.dtype == torch.float32
    assert not losses.equal(losses.bfloat16().float())


def test_a_scaled_loss_does_not_scale_the_values():
    model, ids = make_converted().train(), tokens(2, 30)
    expected = in_the_forward(model, ids)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found = step(model, ids, scaler.scale)
    scaler.unscale_(optimizer)
    assert_same(found | {name: p.grad for name, p in model.named_parameters()}, expected)


def test_the_switch_is_the_models():
    with pytest.raises(ValueError, match=r"settings: expected no loss_in_backward; set model\.flexmsa"):
        convert(make_dense(), {**SETTINGS, "loss_in_backward": True})


def m3_step(model, x, in_backward=True):
    """Losses and gradients, and whether the losses were known before the backward."""
    losses = IndexLosses(in_backward)
    model.zero_grad()
    out = model(x, labels=x, use_cache=False, index_losses=losses)
    known = [not value.isnan() for value in losses.values.values()]
    losses.add_to(out.loss, weight=0.5).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | {f"layer {number}": value for number, value in losses.values.items()}, known


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_minimax_m3(kind):
    model, other, x = make_m3("flexmsa").train(), make_m3("flexmsa").train(), tokens(2, 60)
    if kind != "none":
        model.gradient_checkpointing_enable(CHECKPOINTING[kind])
    (found, known), (expected, known_there) = m3_step(model, x), m3_step(other, x, in_backward=False)
    assert (known, known_there) == ([False] * 2, [True] * 2)
    assert_same(found, expected)


@ON_A_CPU
def test_minimax_m3_selects_once(calls):
    model, x = make_m3("flexmsa").train(), tokens(2, 60)
    model.gradient_checkpointing_enable()
    m3_step(model, x)
    assert (calls["select_blocks"], calls["index_loss"]) == (2, 0)
    model(x, labels=x, use_cache=False).loss.backward()
    assert calls["select_blocks"] == 4
