"""Trainers of several processes, or of one that accumulates the same batches."""

import re
from pathlib import Path

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from integrations import m3
from integrations.converted import tokens
from integrations.device import training_arguments
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainerCallback

from flexmsa.integrations.transformers import ConversionCallback, IndexLosses, log_entries

OPTIONS = {"optim": "sgd", "learning_rate": 0.5, "logging_steps": 1, "save_strategy": "no", "seed": 0}


class Batches(torch.utils.data.Dataset):
    """Rows of unequal lengths, padded on the right."""

    def __init__(self, make_tokens, length):
        self.make_tokens, self.length = make_tokens, length

    def __len__(self):
        return 32

    def __getitem__(self, row):
        ids, mask = self.make_tokens(self.length, seed=row).cpu(), torch.arange(self.length) < 12 + 5 * (row % 6)
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


class OwnEntries(TrainerCallback):
    """The entries of this process alone."""

    def __init__(self):
        self.entries = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.entries.append(log_entries(model))


class FSDPTrainer(Trainer):
    """With FSDP2, which accelerate refuses on a CPU: its state says what it says on a GPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        state, PartialState._shared_state["distributed_type"] = self.accelerator.state, DistributedType.FSDP
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
        )
        self.is_fsdp_enabled = True


def weights_of(model):
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}


def run_trainer(model, folder, steps, accumulate=1, kind=Trainer, **options):
    """Half of the steps in phase 1: what is logged, the entries of this process, and the weights."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulate, **options}
    arguments = training_arguments(folder, steps, max_grad_norm=0.1, **OPTIONS, **options)
    own = OwnEntries()
    callbacks = [own, ConversionCallback(steps // 2, index_loss_weight=0.5)]
    trainer = kind(model, arguments, train_dataset=Batches(tokens, 40), callbacks=callbacks)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], own.entries, weights_of(trainer.model)


def documented_trainer(model, folder, batch, accumulate):
    """The weights after a step of the Trainer that the documents show."""
    text = (Path(__file__).parents[2] / "docs" / "transformers.md").read_text()
    recipe = next(x for x in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "class MSATrainer" in x)
    names = {"IndexLosses": IndexLosses}
    exec(recipe.split("arguments =")[0], names)
    rows = [{"input_ids": ids, "labels": ids} for ids in m3.tokens(4, 40).cpu()]
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    arguments = training_arguments(folder, 1, max_grad_norm=0.0, **OPTIONS, **options)
    names["MSATrainer"](model, arguments, train_dataset=rows).train()
    return weights_of(model)
