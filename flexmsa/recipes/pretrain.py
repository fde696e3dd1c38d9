"""Pretrain a language model with MSA, on one process or many: dense warm-up, then sparse.

    python -m flexmsa.recipes.pretrain --data FOLDER --steps 20
    torchrun --nproc-per-node 8 -m flexmsa.recipes.pretrain --data FOLDER --fsdp 2 --cp 4 --context 131072

A step takes `batch_size` rows of packed documents. Each group of processes that shares tokens or heads has its part of
the rows, and runs them one after another. Losses are means over all targets, or over all queries and groups, of the
step: they do not depend on the mesh, and nor do the data. So a run may resume on another mesh.
"""

import contextlib
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from flexmsa._command import INTERRUPTED
from flexmsa._progress import clock
from flexmsa.demo.train import learning_rate
from flexmsa.distributed import SequenceShards
from flexmsa.recipes.model import GPT, parallelize
from flexmsa.recipes.results import add_entry, cut_log, newest_checkpoint, step_of
from flexmsa.recipes.settings import Settings, parse
from flexmsa.recipes.text import IGNORED, PackedText, Row

__all__ = ["Trainer", "main"]


def main(argv: list[str]) -> int:
    """Train; returns the exit code, 130 after Ctrl-C or SIGTERM."""
    settings = parse(argv)
    with process_group():
        try:
            trainer = Trainer(settings)
        except (ValueError, OSError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
        trainer.train()
        return INTERRUPTED if trainer.stop_asked else 0


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """The processes that torchrun started, or this one alone."""
    # Counts of a step are summed on the host, so that it does not wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" not in os.environ:
        raise SystemExit(
            "WORLD_SIZE: expected torchrun, which sets LOCAL_RANK too, or one process; start it by torchrun"
        )
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Trainer:
    """A model, its optimizer and its text, in an initialized process group.

    Attributes:
        step: the number of steps done.
        log: the entries of metrics.jsonl that this process made.
        stop_asked: a signal has asked some process to stop, and all know it.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: the settings do not fit the processes, the text or the folder.
    """

    def __init__(self, settings: Settings) -> None:
        self.out = Path(settings.out)
        replicate, fsdp, self.tp, self.cp = settings.mesh_sizes(dist.get_world_size())
        self.data_parallel = replicate * fsdp
        last = self._begin(settings)
        if last is not None and not settings.resume:
            raise FileExistsError(f"out: expected a folder without checkpoints, got {last}; continue it with --resume")
        kind = settings.device
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(kind)
        self.mesh = init_device_mesh(kind, (replicate, fsdp * self.cp, self.tp), mesh_dim_names=MESH)
        self.cp_mesh: DeviceMesh | None = None
        if self.cp > 1:
            self.cp_mesh = init_device_mesh(
                kind, (self.data_parallel, self.cp, self.tp), mesh_dim_names=("data", "cp", "tp")
            )["cp"]
        # All processes make the same weights, and keep their parts.
        torch.manual_seed(settings.seed)
        self.model = GPT(settings.attention(), settings.num_layers, settings.mlp_size)
        if settings.dtype == "auto":
            settings = replace(settings, dtype="bfloat16" if kind == "cuda" else "float32")
        self.settings, name = settings, settings.dtype
        precision: torch.dtype = getattr(torch, name)
        self.model.to(torch.promote_types(precision, torch.float32))
        options = {"checkpointing": settings.activation_checkpointing, "compiled": settings.compile}
        parallelize(self.model, self.mesh, self.cp_mesh, **options, precision=precision)
        self.branches = branches(self.model)
        groups = [
            {"params": parameters, "weight_decay": settings.weight_decay if dims > 1 else 0.0}
            for branch in self.branches
            for dims, parameters in by_dims(branch).items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.95))
        self.step, self.saved_step, self.signalled, self.stop_asked = 0, -1, False, False
        self.log: list[dict[str, Any]] = []
        if last is not None:
            settings.check_same(last / "settings.json", self.text.digest)
            self._load(last)
        if dist.get_rank() == 0:
            cut_log(self.out, self.step)
        self._say(f"{self.text}; {sum(p.numel() for p in self.model.parameters()):,} parameters in {name} on {kind}")
        sizes = f"replicate {replicate} x fsdp {fsdp} x tp {self.tp} x cp {self.cp}"
        self._say(f"{sizes} processes; {'starting' if last is None else f'continuing after step {self.step}'}")

    def _begin(self, settings: Settings) -> Path | None:
        """Find the text, and return the newest checkpoint.

        All processes raise together: one that went on would wait for the others.
        """
        found: Any = None
        try:
            self.text = PackedText(settings.data, settings.pattern, settings.context, settings.seed, self.out)
            last = newest_checkpoint(self.out)
            found = self.text.digest, None if last is None else last.name
        except OSError as error:
            found = error
        all_found = [None] * dist.get_world_size()
        dist.all_gather_object(all_found, found)
        for other in all_found:
            if isinstance(other, OSError):
                raise other
        if any(other != found for other in all_found):
            raise ValueError(
                f"data, out: expected the same files and the same newest checkpoint on every process, got {all_found}; "
                "use folders that all processes share"
            )
        if last is not None and step_of(last) > settings.steps:
            raise ValueError(f"steps: expected at least those of {last}, got {settings.steps}")
        return last

    def train(self) -> None:
        """Train to the end, or to a signal, and save a checkpoint."""
        with self._signals():
            started, done = time.monotonic(), 0
            for number in range(self.step, self.settings.steps):
                rows = self._rows(number)
                targets, queries, stop = self._totals(rows)
                self.stop_asked = stop > 0
                if self.stop_asked:
                    break
                step = number + 1
                logged = step % self.settings.log_every == 0 or step in (1, self.settings.steps)
                entries = self._train_step(rows, targets, queries, logged)
                self.step, done = step, done + 1
                if logged:
                    seconds, left = time.monotonic() - started, self.settings.steps - step
                    speed = done * self.settings.batch_size * self.settings.context / seconds
                    self._write({"step": step, **entries, "tokens_per_second": speed}, left * seconds / done)
                if step % self.settings.save_every == 0:
                    self._save()
            self._save()
            if self.stop_asked:
                self._say(f"stopped after step {self.step}; continue with --resume")

    def _rows(self, number: int) -> list[Row]:
        """This process's rows of a step."""
        count = self.settings.batch_size // self.data_parallel
        first = number * self.settings.batch_size + dist.get_rank() // (self.tp * self.cp) * count
        return [self.text.row(first + row) for row in range(count)]

    def _totals(self, rows: list[Row]) -> tuple[float, float, float]:
        """Of all rows of a step, the targets, and the queries that see a key; and how many processes a signal asked."""
        targets = sum(int((row.labels != IGNORED).sum()) for row in rows)
        queries = sum(len(row.ids) for row in rows)
        totals = torch.tensor([targets, queries, self.signalled], dtype=torch.float64)
        dist.all_reduce(totals)
        # The processes that share tokens or heads have the same rows.
        targets_of_all, queries_of_all = (totals[:2] / (self.tp * self.cp)).tolist()
        return targets_of_all, queries_of_all, totals[2].item()

    def _train_step(self, rows: list[Row], targets: float, queries: float, logged: bool) -> dict[str, Any]:
        """One step of the optimizer; if `logged`, what the log says about it."""
        settings, step = self.settings, self.step + 1
        sparse = step > settings.warm_up_steps
        self.model.set_topk(settings.topk if sparse else None)
        # Gradients are averaged over these processes: what flexmsa.distributed.global_index_loss_count returns.
        averaged = self.data_parallel * self.cp
        count = max(1, queries) * settings.num_kv_heads / averaged
        sums = torch.zeros(1 + 3 * settings.num_layers, dtype=torch.float64, device=self.device)
        for row in rows:
            loss, index_loss, *recalls = self.model(*self._inputs(row), count, row.longest if logged else None)
            loss = loss * (averaged / max(1, targets))
            (loss + index_loss * settings.index_loss_weight).backward()
            with torch.no_grad():
                sums[0] += loss
                sums[1 : 1 + settings.num_layers] += self.model.index_losses()
                for found in recalls:
                    sums[1 + settings.num_layers :] += found.flatten() / len(rows)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.learning_rate)
        # One norm for both would let one loss scale the other's step.
        norms = [nn.utils.clip_grad_norm_(branch, settings.max_norm) for branch in self.branches]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not logged:
            return {}
        dist.all_reduce(sums)
        loss, kl, recalls = (sums / dist.get_world_size()).split([1, settings.num_layers, 2 * settings.num_layers])
        base, index = (norm.full_tensor().item() if isinstance(norm, DTensor) else norm.item() for norm in norms)
        return {
            "phase": "sparse" if sparse else "warm-up",
            **{"loss": loss.item(), "kl": kl.tolist()},
            **{"block_recall": recalls[::2].tolist(), "score_recall": recalls[1::2].tolist()},
            **{"grad_norm": base, "index_grad_norm": index, "learning_rate": self.optimizer.param_groups[0]["lr"]},
        }

    def _inputs(self, row: Row) -> tuple[Tensor, Tensor, Tensor | None, SequenceShards | None]:
        """What the model takes: this process's tokens."""
        ids, labels = row.ids[None].to(self.device), row.labels[None].to(self.device)
        if self.cp_mesh is None:
            return ids, labels, row.cu_seqlens.to(self.device), None
        how: dict[str, Any] = {"cu_seqlens": row.cu_seqlens, "length_multiple": math.lcm(self.tp, LENGTHS)}
        shards = SequenceShards(len(row.ids), self.cp_mesh, **how)
        return shards.shard(ids), shards.shard(labels, fill=IGNORED), None, shards

    def _write(self, entries: dict[str, Any], seconds_left: float) -> None:
        """Add an entry to the log, and print its line, in which KL and recalls are means over the layers."""
        self.log.append(entries)
        kl, block, score = (sum(x) / len(x) for x in (entries[name] for name in ("kl", "block_recall", "score_recall")))
        self._say(
            f"step {entries['step']}/{self.settings.steps} {entries['phase']} loss {entries['loss']:.3f} KL {kl:.4f} "
            f"recall {block:.2f}/{score:.2f} {entries['tokens_per_second']:,.0f} tokens/s {clock(seconds_left)} left"
        )
        if dist.get_rank() == 0:
            add_entry(self.out, entries)

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0:
            print(text, flush=True)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM end the run after the step; a second one ends a lone process at once."""

        def ask(number: int, frame: Any) -> None:
            if self.signalled and dist.get_world_size() == 1:
                raise KeyboardInterrupt
            self.signalled = True

        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save(self) -> None:
        """Save the state after this step, unless that is done, or there is none."""
        # Before the first step, the optimizer has no state: PyTorch would make one, and count a step.
        if self.step in (0, self.saved_step):
            return
        folder = self.out / f"step-{self.step:08d}"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            self.settings.save(folder / "settings.json", self.text.digest)
        dist.barrier()
        dcp.save(self._state(), checkpoint_id=folder)
        self.saved_step = self.step
        self._say(f"saved {folder}")

    def _state(self) -> dict[str, Any]:
        """What a checkpoint has of the model, but for the layers' phases, which follow from the step."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        weights = {name: x for name, x in model.items() if not name.endswith("_extra_state")}
        return {"model": weights, "optimizer": optimizer}

    def _load(self, folder: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=folder)
        given = {"model_state_dict": state["model"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.model, self.optimizer, **given)
        self.step = self.saved_step = step_of(folder)


# Documents that do not divide give parts of many lengths, of which few are compiled.
LENGTHS = 16
MESH = ("replicate", "shard", "tp")


def branches(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The parameters of all but the index branches, and those of the index branches."""
    found: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for name, parameter in model.named_parameters():
        found[".index_" in name].append(parameter)
    return found


def by_dims(parameters: list[nn.Parameter]) -> dict[int, list[nn.Parameter]]:
    """The parameters by their number of dimensions."""
    found: dict[int, list[nn.Parameter]] = {}
    for parameter in parameters:
        found.setdefault(parameter.dim(), []).append(parameter)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
