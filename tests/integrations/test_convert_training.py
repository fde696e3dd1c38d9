"""Training a converted model: the loss, its gradient, both phases, resuming, and the mistakes that are caught."""

import copy
import shutil

import pytest
import torch
from integrations.converted import make_converted, make_dense, tokens
from transformers import Trainer, TrainingArguments

from flexmsa.integrations.transformers import (
    ConversionCallback,
    begin_sparse,
    begin_warm_up,
    check_optimizer,
    clip_gradients,
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


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "gemma3", "phi"])
def test_the_loss_is_that_of_the_model_and_the_weighted_sum_over_layers(name, warm_up):
    model, ids = make_converted(name, warm_up=warm_up).train(), tokens(2, 30)
    model.flexmsa.index_loss_weight = 0.25
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
    torch.testing.assert_close(ours.index_loss, theirs.index_loss)
    wanted = gradients(plain, theirs.loss)
    assert index_part(wanted)
    assert_same(gradients(checkpointed, ours.loss), wanted)
    alone = gradients(checkpointed, checkpointed(ids, use_cache=False).index_loss)
    assert_same(index_part(alone), index_part(wanted))


def test_padding_has_no_part_in_the_index_loss():
    model, ids = make_converted().train(), tokens(1, 30)
    alone = gradients(model, model(ids[:, 5:22]).index_loss)
    mask = torch.zeros_like(ids)
    mask[:, 5:22] = 1
    assert_same(gradients(model, model(ids, attention_mask=mask).index_loss), alone)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model, ids = make_converted().train(), tokens(4, 30)
    count = torch.tensor(4 * 29)
    whole = gradients(model, model(ids, labels=ids, num_items_in_batch=count).loss)
    halves = sum(model(part, labels=part, num_items_in_batch=count).loss for part in ids.split(2))
    assert_same(gradients(model, halves), whole)


def test_autocast():
    model, ids = make_converted().train(), tokens(2, 30)
    exact = index_part(gradients(model, model(ids, labels=ids).loss))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids).loss
    found = index_part(gradients(model, loss))
    for name, x in exact.items():
        assert torch.cosine_similarity(x.flatten(), found[name].flatten(), dim=0) > 0.98, name


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_graph(checkpointed):
    eager, traced, ids = make_converted().train(), make_converted().train(), tokens(2, 30)
    if checkpointed:
        traced.gradient_checkpointing_enable()
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    ours, theirs = (model(ids, labels=ids, use_cache=False).loss for model in (compiled, eager))
    assert_same(gradients(traced, ours), gradients(eager, theirs))


def test_the_branches_are_clipped_apart():
    model, ids = make_converted().train(), tokens(2, 30)
    model(ids, labels=ids).loss.backward()
    before = clip_gradients(model, 0.01)
    after = clip_gradients(model, 0.01)
    assert all(norm > 0.01 for norm in before)
    assert all(norm == pytest.approx(0.01, rel=1e-3) for norm in after)


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
    resumed = from_pretrained(tmp_path).train()
    optimizer = torch.optim.AdamW(parameter_groups(resumed), lr=1e-2)
    optimizer.load_state_dict(state)
    curve.clear()
    run(resumed, optimizer, range(saved_at, STEPS))
    assert [entry["kl"] for entry in curve] == pytest.approx([entry["kl"] for entry in expected], rel=1e-4)
    assert [entry["lm_loss"] for entry in curve] == pytest.approx([entry["lm_loss"] for entry in expected], rel=1e-4)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, row):
        ids = tokens(40, seed=row)
        return {"input_ids": ids, "labels": ids}


def make_trainer(folder, model=None, callback=None, steps=STEPS, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        **options,
    )
    callback = callback or ConversionCallback(WARM_UP, index_loss_weight=0.5)
    model = make_converted(warm_up=True) if model is None else model
    return Trainer(model, arguments, train_dataset=Rows(), callbacks=[callback])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder)
    trainer.train()
    return folder, trainer


def history(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_the_callback_runs_both_phases_and_logs_each_step(whole_run):
    _, trainer = whole_run
    steps = history(trainer)
    assert len(steps) == STEPS
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["lm_loss"] + 0.5 * entry["kl"], abs=1e-3)
        assert entry["kl"] == pytest.approx(entry["kl/layer_0"] + entry["kl/layer_1"])
        for kind in ("block_recall", "score_recall"):
            names = [kind, f"{kind}_untrained", f"{kind}_window", f"{kind}/layer_0", f"{kind}/layer_1"]
            assert all(0 < entry[name] <= 1 for name in names)
    assert steps[0]["score_recall"] == pytest.approx(steps[0]["score_recall_untrained"], abs=0.15)
    assert steps[WARM_UP - 1]["kl"] < steps[0]["kl"]
    assert not trainer.model.flexmsa.warm_up
    assert trainer.args.max_grad_norm == 1.0
    assert trainer.model.eval()(tokens(1, 9), labels=tokens(1, 9)).get("index_loss") is None


def test_the_base_is_untouched_in_the_warm_up(whole_run):
    folder, trainer = whole_run
    before = make_converted(warm_up=True)
    trainer._load_from_checkpoint(str(folder / "checkpoint-2"), model=before)
    dense = make_dense().state_dict()
    after = before.state_dict()
    assert all(torch.equal(after[name], value) for name, value in dense.items())
    final = trainer.model.state_dict()
    assert not any(torch.equal(final[name], value) for name, value in dense.items())


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_continues_the_same_curve(step, whole_run, tmp_path):
    folder, trainer = whole_run
    resumed = make_trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    ours, theirs = history(resumed), history(trainer)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            assert mine[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value)


def test_the_callback_clips_the_branches_apart(tmp_path):
    before = make_converted().state_dict()
    trainer = make_trainer(tmp_path, callback=ConversionCallback(0), steps=1, optim="sgd", max_grad_norm=0.01)
    trainer.train()
    moved = {False: 0.0, True: 0.0}
    for name, parameter in trainer.model.named_parameters():
        moved[is_index_weight(name)] += (parameter - before[name]).square().sum().item()
    # SGD moves by the learning rate, 0.01, times the clipped gradient.
    assert all(square**0.5 == pytest.approx(1e-4, rel=1e-2) for square in moved.values())


def test_resuming_with_other_settings_is_refused(whole_run, tmp_path):
    checkpoint = str(whole_run[0] / "checkpoint-4")
    other = make_trainer(tmp_path, callback=ConversionCallback(WARM_UP + 1, index_loss_weight=0.5))
    with pytest.raises(ValueError, match="warm_up_steps is 3 there and 4 here"):
        other.train(resume_from_checkpoint=checkpoint)
    model = make_converted(warm_up=True)
    model.config.flexmsa["topk"] = 2
    with pytest.raises(ValueError, match="topk is 3 there and 2 here"):
        make_trainer(tmp_path, model).train(resume_from_checkpoint=checkpoint)


def test_resuming_without_the_state_of_the_optimizer_is_refused(whole_run, tmp_path):
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(whole_run[0] / "checkpoint-2", checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match="the state of the index weights, got none"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=str(checkpoint))


def test_resuming_from_a_dense_run_is_refused(tmp_path):
    dense = Trainer(
        make_dense(),
        TrainingArguments(str(tmp_path), max_steps=2, save_steps=2, report_to=[], disable_tqdm=True, use_cpu=True),
        train_dataset=Rows(),
    )
    dense.train()
    with pytest.raises(ValueError, match=r"parameter group|ConversionCallback"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_gradient_accumulation_in_the_trainer(tmp_path):
    runs = []
    for accumulate in (1, 2):
        trainer = make_trainer(
            tmp_path,
            callback=ConversionCallback(0),
            steps=1,
            gradient_accumulation_steps=accumulate,
            logging_strategy="no",
        )
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = 4 // accumulate
        trainer.args.learning_rate = 1e-3
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert_same(*runs)
