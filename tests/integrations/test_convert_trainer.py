"""Both phases in a Trainer: what is logged, resuming, clipping and accumulating."""

import shutil

import pytest
import torch
from integrations.converted import assert_same, make_converted, make_dense, tokens
from integrations.device import DEVICE, training_arguments
from transformers import Trainer, TrainerCallback

from flexmsa.integrations.transformers import ConversionCallback
from flexmsa.integrations.transformers.index_branch import is_index_weight
from flexmsa.kernels import torch as torch_kernels

WARM_UP, STEPS = 3, 6


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, row):
        ids = tokens(40, seed=row).cpu()
        return {"input_ids": ids, "labels": ids}


def make_trainer(folder, model=None, callback=None, steps=STEPS, **options):
    options = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, **options}
    arguments = training_arguments(folder, steps, save_steps=2, seed=0, **options)
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
    folder, trainer = whole_run
    steps = history(trainer)
    assert len(steps) == STEPS
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["lm_loss"], abs=1e-3)
        assert entry["kl"] == pytest.approx(entry["kl/layer_0"] + entry["kl/layer_1"])
        assert entry["grad_norm/index"] > 0
        for kind in ("block_recall", "score_recall"):
            names = [kind, f"{kind}_untrained", f"{kind}_window", f"{kind}/layer_0", f"{kind}/layer_1"]
            assert all(0 < entry[name] <= 1 for name in names)
    assert [entry["grad_norm/base"] > 0 for entry in steps] == [False] * WARM_UP + [True] * (STEPS - WARM_UP)
    assert steps[0]["score_recall"] == pytest.approx(steps[0]["score_recall_untrained"], abs=0.15)
    assert steps[WARM_UP - 1]["kl"] < steps[0]["kl"]
    assert not trainer.model.flexmsa.warm_up
    stored = torch.load(folder / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert trainer.args.max_grad_norm == stored.max_grad_norm == 1.0
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


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_callback_clips_the_branches_apart(interrupted, tmp_path):
    before = make_converted().state_dict()
    trainer = make_trainer(tmp_path, callback=ConversionCallback(0), steps=1, optim="sgd", max_grad_norm=0.01)
    if interrupted:
        trainer = interrupt(trainer)
    trainer.train()
    moved = {False: 0.0, True: 0.0}
    for name, parameter in trainer.model.named_parameters():
        moved[is_index_weight(name)] += (parameter - before[name]).square().sum().item()
    # SGD moves by the learning rate, 0.01, times the clipped gradient.
    assert all(square**0.5 == pytest.approx(1e-4, rel=1e-2) for square in moved.values())


class Probe(TrainerCallback):
    """Fails if a run begins with a measurement."""

    def on_train_begin(self, args, state, control, **kwargs):
        assert not kwargs["model"].flexmsa.with_health


def interrupt(trainer):
    """Interrupt the first step; return another trainer of the same model and arguments."""

    def stop(*args):
        raise KeyboardInterrupt

    handle = trainer.model.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    callbacks = [ConversionCallback(0), Probe()]
    return Trainer(trainer.model, trainer.args, train_dataset=Rows(), callbacks=callbacks)


class StopEarly(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_run_that_stops_between_micro_batches_leaves_its_step(tmp_path):
    trainer = make_trainer(tmp_path, steps=1, gradient_accumulation_steps=2)
    trainer.add_callback(StopEarly)
    trainer.train()
    assert trainer.args.max_grad_norm == 1.0 and not trainer.model.flexmsa.with_health


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
    Trainer(make_dense(), training_arguments(tmp_path, 2, save_steps=2), train_dataset=Rows()).train()
    with pytest.raises(ValueError, match="parameter group"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_resuming_from_a_run_without_the_callback_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, steps=2)
    trainer.pop_callback(ConversionCallback)
    trainer.train()
    with pytest.raises(ValueError, match="expected a run with a ConversionCallback, got one without"):
        make_trainer(tmp_path / "new").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_checkpointing_in_the_trainer(tmp_path, monkeypatch):
    selected = []
    select = torch_kernels.select_blocks
    monkeypatch.setattr(torch_kernels, "select_blocks", lambda *args: selected.append(args) or select(*args))
    runs, calls = [], []
    for checkpointed in (False, True):
        options = {"gradient_checkpointing": checkpointed, "logging_strategy": "no", "learning_rate": 1e-3}
        trainer = make_trainer(tmp_path, callback=ConversionCallback(0), steps=1, **options)
        trainer.train()
        runs.append(trainer.model.state_dict())
        calls.append(len(selected))
    assert_same(*runs)
    assert calls[1] == 2 * calls[0]
    assert DEVICE.type != "cpu" or calls[0] > 0


def test_gradient_accumulation_in_the_trainer(tmp_path):
    runs = []
    for accumulate in (1, 2):
        options = {"per_device_train_batch_size": 4 // accumulate, "gradient_accumulation_steps": accumulate}
        options |= {"learning_rate": 1e-3, "logging_strategy": "no"}
        trainer = make_trainer(tmp_path, callback=ConversionCallback(0), steps=1, **options)
        trainer.train()
        runs.append(trainer.model.state_dict())
    assert_same(*runs)
