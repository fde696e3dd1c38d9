"""One of two processes that train a converted model: `python parallel.py RANK FOLDER`.

For each way and phase it writes to FOLDER/WAY-PHASE-RANK.pt the index losses of its half of a batch, and the gradients,
averaged over both.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))

from integrations.converted import make_converted, tokens

from flexmsa.integrations.transformers import begin_sparse, begin_warm_up

PHASES = {"warm-up": begin_warm_up, "sparse": begin_sparse}


def make_model():
    """On a CPU, like the processes."""
    model = make_converted().cpu().train()
    model.gradient_checkpointing_enable()
    return model


def step(model, call, ids):
    """The index losses of one step, and the gradients."""
    call(ids, labels=ids, use_cache=False).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model.flexmsa.report.index_losses, gradients


def ddp(model, begin):
    begin(model)
    return DistributedDataParallel(model)


def ddp_once(model, begin):
    """For both phases, as a Trainer does."""
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    begin(model)
    return wrapped


def fsdp(model, begin):
    begin(model)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {"ddp": ddp, "ddp-once": ddp_once, "fsdp": fsdp}


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for way, wrap in WAYS.items():
        for phase, begin in PHASES.items():
            model = make_model()
            losses, gradients = step(model, wrap(model, begin), tokens(4, 40).cpu().chunk(2)[rank])
            whole = {name: x.full_tensor() if way == "fsdp" else x for name, x in gradients.items()}
            torch.save((losses, whole), folder / f"{way}-{phase}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
