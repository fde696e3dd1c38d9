"""One of two processes that train models of transformers: `python parallel.py RANK FOLDER`.

Each way of WAYS writes what it returns, or how it failed, to FOLDER/WAY-RANK.pt.
"""

import os
import sys
import traceback
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.parallel import DistributedDataParallel
from transformers import MiniMaxM3VLForCausalLM, Trainer
from transformers.distributed import DistributedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

import one_gloo_thread
from integrations import m3
from integrations.converted import SETTINGS, make_converted, tokens
from integrations.parallel_trainer import FSDPTrainer, documented_trainer, run_trainer

from flexmsa.distributed import SequenceShards, global_index_loss_count
from flexmsa.integrations.transformers import (
    IndexLosses,
    begin_sparse,
    begin_warm_up,
    clip_gradients,
    convert,
    from_pretrained,
    index_loss_count,
    log_entries,
    minimax_m3_tp_plan,
    register,
)

PHASES = {"warm-up": begin_warm_up, "sparse": begin_sparse}
SHARDED = {"tp": True, "tp-in-forward": False}
TRAINERS = {"trainer-ddp": Trainer, "trainer-fsdp": FSDPTrainer}
# Sharded by rows of the vocabulary.
EVEN = {"vocab_size": 62}


def whole(tensors):
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).clone() for name, x in tensors.items()}


def gradients_of(model):
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return whole({name.replace("_checkpoint_wrapped_module.", ""): x for name, x in found.items()})


def make_model(checkpointing=False, **changes):
    """On a CPU, like the processes."""
    model = make_converted(**changes).cpu().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def step(model, call, ids, **inputs):
    """The index losses of one step, and the gradients."""
    call(ids, labels=ids, use_cache=False, **inputs).loss.backward()
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


def fsdp_of_wrapped(model, begin):
    """With the checkpointing of accelerate's FSDP2."""
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = checkpoint_wrapper(layer, preserve_rng_state=False)
    return fsdp(model, begin)


def converted(wrap, phase, checkpointing, rank, folder):
    model = make_model(checkpointing)
    return step(model, wrap(model, PHASES[phase]), tokens(4, 40).cpu().chunk(2)[rank])


def make_m3(phase):
    """In "indexers" only they train."""
    model = m3.make_m3("flexmsa").cpu().train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(phase == "sparse" or ".indexer." in name)
    return model


def step_m3(model, call, ids, phase="sparse", **inputs):
    """The index losses of one step, and the gradients; of the index losses alone where only the indexers train."""
    losses = IndexLosses()
    out = call(ids, labels=ids, index_losses=losses, use_cache=False, **inputs)
    losses.add_to(out.loss if phase == "sparse" else torch.zeros(()), weight=0.5).backward()
    return torch.stack(list(losses.values.values())), gradients_of(model)


def minimax_m3(wrap, phase, rank, folder):
    model = make_m3(phase)
    return step_m3(model, wrap(model, lambda model: None), m3.tokens(4, 60).cpu().chunk(2)[rank], phase)


def changed_under_ddp(first, then, rank, folder):
    """The error, where other weights train than those that DistributedDataParallel was made for."""
    model = make_model()
    wrapped = ddp(model, first)
    then(model)
    try:
        step(model, wrapped, tokens(2, 40).cpu())
    except ValueError as error:
        return str(error)
    return "no error"


def both_phases_in_bfloat16(rank, folder):
    """The dtypes of the gradients of phase 2, after phase 1, with FSDP2's mixed precision."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = make_model()
    wrapped = fsdp(model, begin_warm_up, mp_policy=policy)
    step(model, wrapped, tokens(2, 40).cpu())
    begin_sparse(model)
    return {name: str(x.dtype) for name, x in step(model, wrapped, tokens(2, 40).cpu())[1].items()}


def clip(rank, folder):
    model = make_model()
    step(model, fsdp(model, begin_sparse), tokens(4, 40).cpu().chunk(2)[rank])
    return clip_gradients(model, max_norm=0.1), gradients_of(model)


def padded(rows):
    """Of 4 rows, of which the last two are shorter."""
    ids, mask = tokens(4, 40).cpu(), (torch.arange(40) < torch.tensor([[40], [40], [9], [21]])).long()
    return ids[rows], mask[rows]


def unequal(rank, folder):
    """The index losses and gradients of rows of unequal lengths, with the count of both processes."""
    model = make_model()
    wrapped = ddp_once(model, begin_warm_up)
    ids, mask = padded(slice(2 * rank, 2 * rank + 2))
    count = index_loss_count(model, ids, mask)
    model.flexmsa.index_loss_count = global_index_loss_count(count, dist.init_device_mesh("cpu", (2,)))
    return step(model, wrapped, ids, attention_mask=mask)


def log_without_labels(rank, folder):
    """What is logged, of all processes, and of this one; the second one has no labels."""
    model, ids = make_model().train(), tokens(2, 40).cpu()
    model.flexmsa.loss_in_backward = False
    model(ids, labels=ids if rank == 0 else None)
    return log_entries(model, dist.group.WORLD), log_entries(model)


def inside_context_parallel(rank, folder):
    """The error inside torch's `context_parallel()`, which accelerate's cp_size enters."""
    ids = tokens(2, 40).cpu()
    with context_parallel(dist.init_device_mesh("cpu", (2,)), buffers=[ids], buffer_seq_dims=[1]):
        try:
            make_model()(ids)
        except RuntimeError as error:
            return str(error)
    return "no error"


def documents():
    """A row of documents: ids, targets, which end with their documents, and offsets."""
    offsets = torch.tensor([0, 13, 40, 61], dtype=torch.int32)
    ids = tokens(1, 61).cpu()
    targets = torch.full_like(ids, -100)
    targets[:, :-1] = ids[:, 1:]
    targets[:, offsets[1:-1].long() - 1] = -100
    return ids, targets, offsets


def shard_tokens(make, phase, rank, folder):
    """The index losses and gradients of a model whose processes have some tokens of every document."""
    ids, targets, offsets = documents()
    shards = SequenceShards(61, dist.init_device_mesh("cpu", (2,)), cu_seqlens=offsets)
    inputs = {"position_ids": shards.row_positions(), "shards": shards}
    inputs["shift_labels"] = shards.shard(targets, fill=-100)
    # The average over the processes of sums that are divided by it is this row's part of a step of two such rows.
    inputs["num_items_in_batch"] = targets.ne(-100).sum()
    return make(phase, shards.shard(ids), inputs)


def packed(ids, targets, offsets):
    """The inputs of one process."""
    positions = torch.cat([torch.arange(n) for n in offsets.diff().tolist()])[None]
    return {"position_ids": positions, "shift_labels": targets, "num_items_in_batch": 2 * targets.ne(-100).sum()}


def step_on_documents(phase, ids, inputs):
    model = make_model(checkpointing=True)
    PHASES[phase](model)
    return step(model, replicated(model), ids, **inputs)


def step_m3_on_documents(phase, ids, inputs):
    model = make_m3("sparse")
    return step_m3(model, replicated(model), ids, **inputs)


def replicated(model):
    return DistributedDataParallel(model, find_unused_parameters=True) if dist.is_initialized() else model


def sharded(phase, in_backward, rank, folder):
    config = DistributedConfig(tp_plan="auto")
    return measured_step(from_pretrained(folder / "converted", distributed_config=config), phase, in_backward)


def measured_step(model, phase, in_backward=True):
    """Logits, loss, index losses and gradients; what is logged; norms and gradients after clipping."""
    PHASES[phase](model)
    model.flexmsa.loss_in_backward, model.flexmsa.with_health = in_backward, True
    ids = tokens(2, 40).cpu()
    out = model.train()(ids, labels=ids, use_cache=False)
    out.loss.backward()
    found = {"logits": out.logits.detach(), "loss": out.loss.detach(), "gradients": gradients_of(model)}
    found["log"] = log_entries(model, dist.group.WORLD if dist.is_initialized() else None)
    found["norms"] = clip_gradients(model, max_norm=0.1)
    return {**found, "clipped": gradients_of(model)}


def generate(model):
    begin_sparse(model.eval())
    return model.generate(tokens(2, 50).cpu(), max_new_tokens=8, do_sample=False, pad_token_id=0)


def sharded_generation(rank, folder):
    """The text of a converted model with sharded heads, which it saves whole."""
    model = from_pretrained(folder / "converted", distributed_config=DistributedConfig(tp_plan="auto"))
    text = generate(model)
    model.save_pretrained(folder / "saved")
    return text


def converted_when_sharded(rank, folder):
    """The index losses and gradients of a model that was sharded before it was converted, and its index weights."""
    config = DistributedConfig(tp_plan="auto")
    model = type(make_model()).from_pretrained(folder / "dense", distributed_config=config)
    torch.manual_seed(rank)
    convert(model, SETTINGS)
    begin_sparse(model.train())
    found = step(model, model, tokens(2, 40).cpu())
    return *found, whole({name: x for name, x in model.state_dict().items() if "index_" in name})


def sharded_m3(rank, folder):
    """The index losses and gradients of two steps, and the shape of the process's keys."""
    register()
    settings = {"attn_implementation": "flexmsa", "distributed_config": DistributedConfig(tp_plan=minimax_m3_tp_plan())}
    model = MiniMaxM3VLForCausalLM.from_pretrained(folder / "m3", **settings).train()
    step_m3(model, model, m3.tokens(2, 60).cpu())
    weight = model.model.layers[1].self_attn.k_proj.weight
    return *step_m3(model, model, m3.tokens(2, 60).cpu()), weight.to_local().shape


def plain_columns(rank, folder):
    """The error where the heads are sharded, and the index branch with them, by styles for other layers."""
    register()
    plan = {**minimax_m3_tp_plan(), "model.layers.*.self_attn.indexer.q_proj": "colwise"}
    settings = {"attn_implementation": "flexmsa", "distributed_config": DistributedConfig(tp_plan=plan)}
    model = MiniMaxM3VLForCausalLM.from_pretrained(folder / "m3", **settings).train()
    try:
        step_m3(model, model, m3.tokens(2, 60).cpu())
    except ValueError as error:
        return str(error)
    return "no error"


def trainer(kind, rank, folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    model = make_model()
    return *run_trainer(model, folder, steps=2, kind=kind), isinstance(model, FSDPModule)


def m3_trainer(rank, folder):
    AcceleratorState._reset_state(reset_partial_state=True)
    return documented_trainer(make_m3("sparse"), folder, batch=2, accumulate=1)


CONVERTED = {
    f"{way}-{phase}": partial(converted, wrap, phase, checkpointing)
    for phase in PHASES
    for way, wrap, checkpointing in (
        ("ddp", ddp, True),
        ("ddp-once", ddp_once, True),
        ("fsdp", fsdp, True),
        ("fsdp-plain", fsdp, False),
        ("fsdp-wrapped", fsdp_of_wrapped, False),
    )
}
M3 = {
    f"{way}-m3-{phase}": partial(minimax_m3, wrap, phase)
    for phase in ("indexers", "sparse")
    for way, wrap in (("ddp-once", ddp_once), ("fsdp", fsdp))
}
SHARDS = {
    "cp-warm-up": (step_on_documents, "warm-up"),
    "cp-sparse": (step_on_documents, "sparse"),
    "cp-m3": (step_m3_on_documents, "sparse"),
}
WAYS = {
    **{way: partial(shard_tokens, *what) for way, what in SHARDS.items()},
    **CONVERTED,
    **M3,
    **{f"{way}-{phase}": partial(sharded, phase, value) for way, value in SHARDED.items() for phase in PHASES},
    **{way: partial(trainer, kind) for way, kind in TRAINERS.items()},
    "thawed": partial(changed_under_ddp, begin_warm_up, begin_sparse),
    "frozen": partial(changed_under_ddp, begin_sparse, begin_warm_up),
    "bfloat16": both_phases_in_bfloat16,
    "clip": clip,
    "unequal": unequal,
    "log": log_without_labels,
    "context-parallel": inside_context_parallel,
    "tp-converted": converted_when_sharded,
    "tp-generation": sharded_generation,
    "tp-m3": sharded_m3,
    "tp-plain-columns": plain_columns,
    "m3-trainer": m3_trainer,
}


def main(rank: int, folder: Path) -> None:
    address = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", **address)
    one_gloo_thread.install()
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, way in WAYS.items():
        try:
            result = way(rank, folder)
        except Exception:
            result = traceback.format_exc()
        torch.save(result, folder / f"{name}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
