"""The index losses in trainers that make their own loss: transformers' with label smoothing, and TRL's."""

import copy

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from flexmsa.integrations.transformers import ConversionCallback, IndexLossMixin, log_entries

from .converted import VOCABULARY, make_converted, tokens

ROWS = [tokens(24, seed=seed).tolist() for seed in range(8)]
VOCAB = {str(number): number for number in range(VOCABULARY)}
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(VOCAB, unk_token="1")), pad_token="0", eos_token="2", unk_token="1"
)


class WithLosses(IndexLossMixin, Trainer):
    pass


class SFTWithLosses(IndexLossMixin, SFTTrainer):
    pass


def train(kind, folder, steps=2, callbacks=None, **more):
    """A converted model after some steps."""
    model = make_converted(warm_up=callbacks is not None).train()
    how = {"max_steps": steps, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "use_cpu": True, **more}
    how |= {"report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    if issubclass(kind, SFTTrainer):
        arguments = SFTConfig(folder, max_length=how.pop("max_length", None), bf16=False, **how)
        data = Dataset.from_dict({"input_ids": ROWS})
        trainer = kind(model, arguments, train_dataset=data, processing_class=TOKENIZER, callbacks=callbacks)
    else:
        data = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ROWS]
        trainer = kind(model, TrainingArguments(folder, **how), train_dataset=data, callbacks=callbacks)
    trainer.train()
    return model


def moved(model, part):
    """The names of weights that training changed, among those with `part` in their name."""
    before = dict(make_converted().named_parameters())
    return {name for name, p in model.named_parameters() if part in name and not torch.equal(p, before[name])}


def assert_same_weights(model, other):
    for (name, x), y in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("kind", "more"), [(SFTTrainer, {}), (Trainer, {"label_smoothing_factor": 0.1})], ids=["trl", "label smoothing"]
)
def test_a_loss_without_the_index_losses_raises(kind, more, tmp_path):
    with pytest.raises(RuntimeError, match="expected gradients of the index branches, got none"):
        train(kind, tmp_path, **more)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_mixin_changes_nothing_where_the_loss_has_them(accumulated, tmp_path):
    more = {"gradient_accumulation_steps": accumulated, "optim": "sgd"}
    assert_same_weights(train(WithLosses, tmp_path, **more), train(Trainer, tmp_path, **more))


class Twice(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        losses = [super(Twice, self).compute_loss(model, inputs, False, num_items_in_batch) for _ in range(2)]
        return (losses[0] + losses[1]) / 2


class TwiceWithLosses(IndexLossMixin, Twice):
    pass


def test_forward_passes_of_one_loss_count_as_one(tmp_path):
    assert_same_weights(train(TwiceWithLosses, tmp_path, optim="sgd"), train(WithLosses, tmp_path, optim="sgd"))


def test_label_smoothing_with_the_mixin(tmp_path):
    """The index weights train as without smoothing, the base does not."""
    more = {"optim": "sgd", "max_grad_norm": 0.0, "steps": 1}
    smooth = train(WithLosses, tmp_path, label_smoothing_factor=0.1, **more)
    plain = train(WithLosses, tmp_path, **more)
    for (name, x), y in zip(smooth.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(x, y, rtol=1e-5, atol=1e-7) == ("index_" in name), name


@pytest.mark.parametrize(
    "more",
    [{}, {"packing": True, "packing_strategy": "wrapped", "max_length": 60}, {"gradient_accumulation_steps": 2}],
    ids=["plain", "packed", "accumulated"],
)
def test_trl_trains_the_index_branches(more, tmp_path):
    model = train(SFTWithLosses, tmp_path, **more)
    assert len(moved(model, "index_")) == 8 and len(moved(model, "mlp")) == 6
    assert log_entries(model)["kl"] > 0


def test_trl_makes_the_steps_of_transformers(tmp_path):
    more = {"optim": "sgd", "gradient_checkpointing": False, "seed": 0}
    assert_same_weights(train(SFTWithLosses, tmp_path, **more), train(Trainer, tmp_path, **more))


def test_trl_trains_a_checkpoint(tmp_path):
    make_converted().save_pretrained(tmp_path)
    assert "auto_map" not in (tmp_path / "config.json").read_text()
    arguments = SFTConfig(tmp_path, max_steps=1, report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
    data = Dataset.from_dict({"input_ids": ROWS})
    trainer = SFTWithLosses(str(tmp_path), arguments, train_dataset=data, processing_class=TOKENIZER)
    trainer.train()
    assert log_entries(trainer.model)["kl"] > 0


def test_both_phases_with_trl(tmp_path):
    warm = train(SFTWithLosses, tmp_path, steps=2, callbacks=[ConversionCallback(warm_up_steps=2)])
    assert len(moved(warm, "index_")) == 8 and not moved(warm, "mlp")
    both = train(SFTWithLosses, tmp_path, steps=3, callbacks=[ConversionCallback(warm_up_steps=2)])
    assert len(moved(both, "mlp")) == 6 and not both.flexmsa.warm_up


def test_a_forward_without_a_backward_does_not_raise():
    model = make_converted().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    model(ids, labels=ids)
    optimizer.step()
    optimizer.zero_grad()
    model(ids, labels=ids)
    optimizer.step()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter is model.lm_head.weight)
    model(ids, labels=ids).loss.backward()
    optimizer.step()


def logits_only(model):
    """A backward without the index losses."""
    model(tokens(2, 20)).logits.sum().backward()
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_the_check_sees_copies_and_other_optimizers():
    model, other = copy.deepcopy(make_converted()).train(), make_converted().train()
    optimizer = logits_only(model)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="expected gradients of the index branches"):
        optimizer.step()


def test_index_losses_of_weight_0_need_no_gradients():
    model = make_converted().train()
    model.flexmsa.index_loss_weight = 0.0
    logits_only(model).step()


def test_empty_parts_of_weights_need_no_gradients():
    """As FSDP1 leaves them on a process whose part has no index weights."""
    model = make_converted().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(tokens(2, 20)).logits.sum().backward()
    for name, parameter in model.named_parameters():
        if "index_" in name:
            parameter.data = parameter.data.new_empty(0)
    optimizer.step()
