"""One of two processes that train models of transformers: `python parallel.py RANK FOLDER`.

Each way writes to FOLDER/WAY-RANK.pt what it returns, or how it failed.
"""

import contextlib
import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parents[1]))

from integrations import m3
from integrations.converted import make_converted, tokens

from flexmsa.integrations.transformers import (
    ConversionCallback,
    IndexLosses,
    begin_sparse,
    begin_warm_up,
    clip_gradients,
    log_entries,
    from_pretrained,minimax_m3_tp_plan,register,
)

PHASES = {"warm-up": begin_warm_up, "sparse": begin_sparse}


def gradients_of(model):
    """Whole, by name."""
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x.clone() for name, x in found.items()}


def make_model(checkpointing):
    """A converted one on a CPU, like the processes."""
    model = make_converted().cpu().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def step(model, call, ids, weight=1.0):
    """The index losses of one step, and the gradients."""
    call(ids, labels=ids, use_cache=False).loss.backward()
    return model.flexmsa.report.index_losses, gradients_of(model)


def ddp(model, begin):
    begin(model)
    return DistributedDataParallel(model)


def ddp_once(model, begin):
    """For both phases, as a Trainer does."""
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    begin(model)
    return wrapped


def fsdp(model, begin, **options):
    begin(model)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def converted(wrap, phase, checkpointing, rank):
    model = make_model(checkpointing)
    return step(model, wrap(model, PHASES[phase]), tokens(4, 40).cpu().chunk(2)[rank])


def make_m3(phase):
    """In "indexers" only they train."""
    model = m3.make_m3("flexmsa").cpu().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase == "sparse" or ".indexer." in name)
    return model


def step_m3(model, call, ids, phase):
    """The index losses of one step, and the gradients; all of the loss where only the indexers train."""
    losses = IndexLosses()
    out = call(ids, labels=ids, index_losses=losses, use_cache=False)
    losses.add_to(out.loss if phase == "sparse" else torch.zeros(()), weight=0.5).backward()
    return torch.stack(list(losses.values.values())), gradients_of(model)


def minimax_m3(wrap, phase, rank):
    model = make_m3(phase)
    return step_m3(model, wrap(model, lambda model: None), m3.tokens(4, 60).cpu().chunk(2)[rank], phase)


def late(rank):
    """DistributedDataParallel made while the base was frozen; then with weights that get no gradient."""
    found = []
    for first, then in ((begin_warm_up, begin_sparse), (begin_sparse, begin_warm_up)):
        model = make_model(checkpointing=False)
        wrapped = ddp(model, first)
        then(model)
        try:
            step(model, wrapped, tokens(2, 40).cpu())
            found.append("")
        except ValueError as error:
            found.append(str(error))
    return found


def both_phases_in_bfloat16(rank):
    """Phase 2 after phase 1, with FSDP2's mixed precision: the dtypes of the gradients."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = make_model(checkpointing=False)
    wrapped = fsdp(model, begin_warm_up, mp_policy=policy)
    step(model, wrapped, tokens(2, 40).cpu())
    begin_sparse(model)
    return {name: str(x.dtype) for name, x in step(model, wrapped, tokens(2, 40).cpu())[1].items()}


def clipping(rank):
    model = make_model(checkpointing=False)
    step(model, fsdp(model, begin_sparse), tokens(4, 40).cpu().chunk(2)[rank])
    return clip_gradients(model, max_norm=0.1), gradients_of(model)


MODELS = {
    f"{way}-{phase}": partial(converted, wrap, phase, checkpointing)
    for phase in PHASES
    for way, wrap, checkpointing in (
        ("ddp", ddp, True),
        ("ddp-once", ddp_once, True),
        ("fsdp", fsdp, True),
        ("fsdp-plain", fsdp, False),
    )
}
M3_MODELS = {
    f"{way}-m3-{phase}": partial(minimax_m3, wrap, phase)
    for phase in ("indexers", "sparse")
    for way, wrap in (("ddp-once", ddp_once), ("fsdp", fsdp))
}
class Batches(torch.utils.data.Dataset):
    """Rows of unequal lengths, padded on the right."""

    def __len__(self):
        return 32

    def __getitem__(self, row):
        ids, length = tokens(40, seed=row).cpu(), 12 + 5 * (row % 6)
        mask = torch.arange(40) < length
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


class OwnEntries(TrainerCallback):
    """The entries of this process alone."""

    def __init__(self):
        self.entries = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.entries.append(log_entries(model))


def run_trainer(folder, accumulate=1, model=None, steps=4, **options):
    """Both phases by a Trainer: the logged entries, those of this process, and the weights."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulate, **options}
    options |= {"optim": "sgd", "learning_rate": 0.5, "logging_steps": 1, "save_strategy": "no", "seed": 0}
    arguments = TrainingArguments(
        str(folder), max_steps=steps, use_cpu=True, report_to="none", disable_tqdm=True, lr_scheduler_type="constant",
        max_grad_norm=0.5, **options,
    )
    own = OwnEntries()
    callbacks = [own, ConversionCallback(steps // 2, index_loss_weight=0.5)]
    model = make_model(checkpointing=False) if model is None else model
    trainer = Trainer(model, arguments, train_dataset=Batches(), callbacks=callbacks)
    trainer.train()
    weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in model.state_dict().items()}
    return [entry for entry in trainer.state.log_history if "loss" in entry], own.entries, weights


def trainer_ddp(rank):
    return run_trainer("/tmp/out")


def trainer_fsdp(rank):
    plugin = {"fsdp_version": 2, "transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"], "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    AcceleratorState._reset_state(reset_partial_state=True)
    return run_trainer("/tmp/out", fsdp=True, fsdp_config=plugin)


def tensor_parallel(phase, in_backward, rank, folder):
    """The logits, index losses and gradients of a converted model with sharded heads; health, and norms."""
    model = from_pretrained(folder / "converted", distributed_config=DistributedConfig(tp_plan="auto"))
    return step_sharded(model, phase, in_backward)


def step_sharded(model, phase, in_backward=True):
    PHASES[phase](model)
    model.flexmsa.loss_in_backward, model.flexmsa.with_health = in_backward, True
    ids = tokens(2, 40).cpu()
    out = model.train()(ids, labels=ids, use_cache=False)
    out.loss.backward()
    gradients = gradients_of(model)
    health = {name: x for name, x in log_entries(model, dist.group.WORLD if dist.is_initialized() else None).items()}
    norms = clip_gradients(model, max_norm=0.1)
    return out.logits.detach(), out.loss.detach(), model.flexmsa.report.index_losses, gradients, health, norms, gradients_of(model)


def tp_m3(rank, folder):
    plan = minimax_m3_tp_plan()
    register()
    model = m3.MiniMaxM3VLForCausalLM.from_pretrained(folder / "m3", attn_implementation="flexmsa", distributed_config=DistributedConfig(tp_plan=plan))
    results = step_m3(model.train(), model, m3.tokens(2, 60).cpu(), "sparse")
    step_m3(model, model, m3.tokens(2, 60).cpu(), "sparse")
    return *results, gradients_of(model), model.model.layers[1].self_attn.k_proj.weight.to_local().shape


OTHERS = {**{f"tp-{phase}-{b}": partial(tensor_parallel, phase, b) for phase in PHASES for b in (True, False)}, "tp-m3": tp_m3, "trainer-ddp": trainer_ddp, "trainer-fsdp": trainer_fsdp, "late": late, "bfloat16": both_phases_in_bfloat16, "clipping": clipping}
WAYS = {k: v for k, v in {**MODELS, **M3_MODELS, **OTHERS}.items() if os.environ.get("ONLY", "") in k}


def main(rank: int, folder: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29877")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, way in WAYS.items():
        try:
            result = way(rank, folder) if "tp" in name else way(rank)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}-{rank}.pt")
    with contextlib.suppress(RuntimeError):
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
