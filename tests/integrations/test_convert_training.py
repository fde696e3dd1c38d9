"""Training a converted model: its loss and gradient, both phases in a loop of one's own, and mistakes."""

import copy

import pytest
import torch
from integrations.converted import assert_same, make_converted, make_dense, tokens
from integrations.device import DEVICE
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Qwen3ForSequenceClassification, Qwen3ForTokenClassification

from flexmsa.integrations.transformers import (
    begin_sparse,
    begin_warm_up,
    check_optimizer,
    clip_gradients,
    convert,
    converted_attention,
    from_pretrained,
    log_entries,
    parameter_groups,
)
from flexmsa.integrations.transformers.index_branch import is_index_weight

WARM_UP, STEPS = 3, 6


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def index_part(tensors):
    return {name: x for name, x in tensors.items() if is_index_weight(name)}


@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi"])
def test_the_loss_is_that_of_the_model_and_the_weighted_sum_over_layers(name, warm_up):
    model, ids = make_converted(name, warm_up=warm_up).train(), tokens(2, 30)
    model.flexmsa.index_loss_weight = 0.25
    model.flexmsa.loss_in_backward = False
    outputs = model(ids, labels=ids)
    report = model.flexmsa.report
    assert len(report.index_losses) == len(model.flexmsa.layers)
    assert (report.index_losses > 0).all()
    torch.testing.assert_close(outputs.index_loss, report.index_losses.sum())
    with torch.no_grad():
        torch.testing.assert_close(report.lm_loss, model.eval()(ids, labels=ids).loss)
    torch.testing.assert_close(outputs.loss, report.lm_loss + 0.25 * report.index_losses.sum())
    as_tuple = model.train()(ids, labels=ids, return_dict=False)
    torch.testing.assert_close(as_tuple[0], outputs.loss)


def test_the_loss_that_the_backward_computes_is_not_in_the_value():
    model, ids = make_converted().train(), tokens(2, 30)
    outputs = model(ids, labels=ids)
    assert outputs.index_loss == 0 and outputs.loss == model.flexmsa.report.lm_loss
    torch.testing.assert_close(model(ids, labels=ids, return_dict=False)[0], outputs.loss)


def test_the_index_loss_trains_the_index_weights_only():
    model, ids = make_converted().train(), tokens(2, 30)
    both = gradients(model, model(ids, labels=ids).loss)
    index_only = gradients(model, model(ids).index_loss)
    assert all(is_index_weight(name) for name in index_only)
    assert_same(index_only, index_part(both))
    model.flexmsa.index_loss_weight = 0.0
    without = gradients(model, model(ids, labels=ids).loss)
    assert_same(
        {n: x for n, x in both.items() if n not in index_only}, {n: without[n] for n in both if n not in index_only}
    )


def test_lambda_does_not_depend_on_the_number_of_layers():
    ids = tokens(2, 30)
    one, two = make_converted(layers=[0], warm_up=True).train(), make_converted(warm_up=True).train()
    two.load_state_dict(one.state_dict(), strict=False)
    first = index_part(gradients(one, one(ids, labels=ids).loss))
    assert_same(first, {name: x for name, x in gradients(two, two(ids, labels=ids).loss).items() if name in first})


@pytest.mark.parametrize("phase", [begin_warm_up, begin_sparse])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_the_index_loss(phase, use_reentrant):
    ids = tokens(2, 30)
    plain, checkpointed = make_converted().train(), make_converted().train()
    for model in (plain, checkpointed):
        phase(model)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.flexmsa.with_health = True
    ours, theirs = (model(ids, labels=ids, use_cache=False) for model in (checkpointed, plain))
    assert len(checkpointed.flexmsa.report.health) == 2
    wanted = gradients(plain, theirs.loss)
    assert index_part(wanted)
    assert_same(gradients(checkpointed, ours.loss), wanted)
    alone = gradients(checkpointed, checkpointed(ids, use_cache=False).index_loss)
    assert_same(index_part(alone), index_part(wanted))


def test_a_checkpointed_layer_is_measured_once(monkeypatch):
    model, ids = make_converted().train(), tokens(2, 30)
    model.gradient_checkpointing_enable()
    model.flexmsa.with_health = True
    measured = []
    monkeypatch.setattr(converted_attention, "measure", lambda *args: measured.append(args))
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert len(measured) == 2


def test_the_untrained_branch_is_the_same_every_time():
    model, ids = make_converted().train(), tokens(2, 30)
    model.flexmsa.with_health = True
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        model(ids)
        assert torch.get_rng_state().equal(state)
        found.append([layer.untrained for layer in model.flexmsa.report.health])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]


def test_padding_has_no_part_in_the_index_loss():
    model, ids = make_converted().train(), tokens(1, 30)
    alone = gradients(model, model(ids[:, 5:22]).index_loss)
    mask = torch.zeros_like(ids)
    mask[:, 5:22] = 1
    assert_same(gradients(model, model(ids, attention_mask=mask).index_loss), alone)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model, ids = make_converted().train(), tokens(4, 30)
    count = torch.tensor(4 * 29, device=DEVICE)
    whole = gradients(model, model(ids, labels=ids, num_items_in_batch=count).loss)
    halves = sum(model(part, labels=part, num_items_in_batch=count).loss for part in ids.split(2))
    assert_same(gradients(model, halves), whole)


@pytest.mark.parametrize("shape", [(1,), (1, 30)])
def test_classifiers_ignore_the_count_of_the_step(shape):
    kind = Qwen3ForSequenceClassification if len(shape) == 1 else Qwen3ForTokenClassification
    model, ids = convert(kind(make_dense().config), {"block_size": 4, "topk": 3}).to(DEVICE).train(), tokens(1, 30)
    labels = torch.ones(shape, dtype=torch.long, device=DEVICE)
    alone = index_part(gradients(model, model(ids).index_loss))
    count = torch.tensor(4 * labels.numel(), device=DEVICE)
    loss = model(ids, labels=labels, num_items_in_batch=count).loss
    assert model.flexmsa.report.lm_loss == loss
    assert_same(index_part(gradients(model, loss)), alone)


def test_labels_by_position():
    model, ids = make_converted().train(), tokens(2, 30)
    model.flexmsa.loss_in_backward = False
    options = {"num_items_in_batch": torch.tensor(116, device=DEVICE), "return_dict": False}
    by_name = model(ids, labels=ids, **options)[0]
    assert torch.equal(model(ids, None, None, None, None, ids, **options)[0], by_name)


@pytest.mark.filterwarnings("error:Mismatch dtype")
def test_autocast():
    model, ids = make_converted().train(), tokens(2, 30)
    exact = index_part(gradients(model, model(ids, labels=ids).loss))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    found = index_part(gradients(model, loss))
    for name, x in exact.items():
        assert torch.cosine_similarity(x.flatten(), found[name].flatten(), dim=0) > 0.95, name


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_graph(checkpointed):
    eager, traced, ids = make_converted().train(), make_converted().train(), tokens(2, 30)
    if checkpointed:
        traced.gradient_checkpointing_enable()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    ours, theirs = (model(ids, labels=ids, use_cache=False).loss for model in (compiled, eager))
    assert_same(gradients(traced, ours), gradients(eager, theirs))


def test_one_graph_with_a_default_device():
    """Tensors' methods that are written in Python are traced then, and the compiler does not know all of them."""
    with DEVICE:
        test_one_graph(checkpointed=False)


def test_the_branches_are_clipped_apart():
    model, ids = make_converted().train(), tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    before = clip_gradients(model, 0.01)
    after = clip_gradients(model, 0.01)
    assert all(norm > 0.01 for norm in before)
    assert all(float(norm) == pytest.approx(0.01, rel=1e-3) for norm in after)


def test_a_loop_of_ones_own():
    model = make_converted(warm_up=True).train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    base = {name: p.clone() for name, p in model.named_parameters() if not is_index_weight(name)}
    kl = []
    begin_warm_up(model)
    check_optimizer(model, optimizer)
    for step in range(20):
        model(tokens(4, 40, seed=step), labels=tokens(4, 40, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        kl.append(log_entries(model)["kl"])
    assert kl[-1] < 0.8 * kl[0]
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
    begin_sparse(model)
    check_optimizer(model, optimizer)
    model(tokens(4, 40), labels=tokens(4, 40)).loss.backward()
    optimizer.step()
    assert not any(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_what_was_frozen_before_stays_frozen():
    model = make_converted()
    model.lm_head.weight.requires_grad_(False)
    begin_warm_up(model)
    begin_sparse(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
def test_phases_reach_the_model_inside_wrappers(wrap, wrapped_first):
    model = make_converted()
    wrapper = wrap(model)
    begin_warm_up(wrapper if wrapped_first else model)
    model.model.layers[0] = wrap(model.model.layers[0])
    check_optimizer(wrapper, torch.optim.SGD(model.parameters()))
    assert not model.lm_head.weight.requires_grad
    begin_sparse(model if wrapped_first else wrapper)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_frozen_weight_that_is_gone_is_named():
    model = make_converted()
    begin_warm_up(model)
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp)
    with pytest.raises(ValueError, match=r"3 are not in it, such as model\.layers\.0\.mlp\.down_proj\.weight"):
        begin_sparse(model)


def test_mistakes_with_the_optimizer_are_named():
    model = make_converted()
    dense_only = torch.optim.AdamW([p for name, p in model.named_parameters() if not is_index_weight(name)])
    with pytest.raises(ValueError, match=r"without some: model.layers.0.self_attn.index_q_proj.weight and 7 more"):
        check_optimizer(model, dense_only)
    begin_warm_up(model)
    index_only = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match="make it after convert, before freezing"):
        check_optimizer(model, index_only)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    check_optimizer(model, optimizer)
    model.model.layers[1].self_attn.index_q_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"got frozen ones: model.layers.1.self_attn.index_q_proj.weight"):
        check_optimizer(model, optimizer)
    begin_sparse(model)
    begin_warm_up(model)
    optimizer.state[model.lm_head.weight] = {"step": torch.ones(())}
    with pytest.raises(ValueError, match="the state of the index weights, got none"):
        check_optimizer(model, optimizer, resumed=True)


@pytest.mark.parametrize("saved_at", [2, 4])
def test_a_loop_of_ones_own_resumes_on_the_same_curve(saved_at, tmp_path):
    def run(model, optimizer, steps):
        for step in steps:
            (begin_warm_up if step < WARM_UP else begin_sparse)(model)
            check_optimizer(model, optimizer, resumed=step > 0)
            model(tokens(4, 40, seed=step), labels=tokens(4, 40, seed=step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(log_entries(model))

    curve: list[dict[str, float]] = []
    model = make_converted(warm_up=True).train()
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-2)
    run(model, optimizer, range(saved_at))
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    run(model, optimizer, range(saved_at, STEPS))
    expected = curve[saved_at:]
    resumed = from_pretrained(tmp_path).to(DEVICE).train()
    optimizer = torch.optim.AdamW(parameter_groups(resumed), lr=1e-2)
    optimizer.load_state_dict(state)
    curve.clear()
    run(resumed, optimizer, range(saved_at, STEPS))
    assert [entry["kl"] for entry in curve] == pytest.approx([entry["kl"] for entry in expected], rel=1e-4)
    assert [entry["lm_loss"] for entry in curve] == pytest.approx([entry["lm_loss"] for entry in expected], rel=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)
