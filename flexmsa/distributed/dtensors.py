"""DTensors in flexmsa's functions: each process computes its own heads and batch rows, and nothing is gathered.

Between the functions' operators there are plain tensors, so that every backend runs, and the host handles DTensors once
per call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from flexmsa._sequences import check_sequences
from flexmsa.distributed.gradients import redistribute, with_total
from flexmsa.types import AuxOutput, AuxRequest

__all__ = ["call"]

_HEADS = ("q", "k", "v", "index_q", "block_indices", "lse")
_DOCUMENTS = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")
_ROWS = ("kv_starts", "kv_lens")


def call(function: Callable[..., Any], given: dict[str, Any]) -> Any:
    """Return function(**given) as DTensors, for DTensors of one mesh whose heads or batch rows are sharded.

    Raises:
        ValueError, NotImplementedError, TypeError: a tensor is no DTensor, or is on another mesh; another dimension is
            sharded, or unevenly; the batch of packed documents is sharded; index_loss_value is a DTensor.
    """
    split = _Split(*next(iter(given.items())))
    own = {name: split.own(name, x) for name, x in given.items()}
    _give_count(given, own)
    value = own.get("index_loss_value")
    if value is not None:
        own["index_q"], own["index_k"] = with_total(own["index_q"], own["index_k"], value, split.groups())
    return split.whole(function(**own), is_loss="lse" in given)


def _give_count(given: dict[str, Any], own: dict[str, Any]) -> None:
    """The default count of the losses is that of all processes, not that of a process's own part."""
    name = "count" if "lse" in given else "index_loss_count"
    aux = given.get("return_aux")
    with_loss = "lse" in given or (isinstance(aux, AuxRequest) and aux.any_loss)
    if not with_loss or own.get(name) is not None:
        return
    q, k = given["q"], given["k"]
    queries = torch.empty((*q.shape[:3], 0), device=q.device)
    lengths = {name: _whole(given.get(name)) for name in (*_DOCUMENTS, *_ROWS)}
    own[name] = check_sequences(queries, k.shape[2], **lengths).count(k.shape[1]).clamp(min=1)


def _whole(x: Any) -> Any:
    return x.full_tensor() if isinstance(x, DTensor) else x


class _Split:
    """How q or index_q is placed, and so every other tensor.

    Attributes:
        mesh: of the processes.
        placements: of tensors with heads.
    """

    def __init__(self, name: str, x: DTensor) -> None:
        self.mesh, self.placements = x.device_mesh, tuple(x.placements)
        wrong = [p for p in x.placements if p not in (Shard(0), Shard(1), Replicate())]
        if wrong:
            raise NotImplementedError(
                f"{name}: expected sharded heads, Shard(1), or batch rows, Shard(0), got {wrong[0]}; redistribute it"
            )

    def own(self, name: str, x: Any) -> Any:
        """This process's part of an argument."""
        if x is None or name not in (*_HEADS, *_ROWS, *_DOCUMENTS, "index_k", "index_loss_value"):
            return _whole(x)
        if name == "index_loss_value" and isinstance(x, DTensor):
            raise TypeError("index_loss_value: expected a plain tensor, the same on every process, got a DTensor")
        if name in _DOCUMENTS and Shard(0) in self.placements:
            raise ValueError(f"{name}: expected whole batch rows with packed documents, got them sharded, Shard(0)")
        rows = [p if p == Shard(0) else Replicate() for p in self.placements]
        if name in _ROWS:
            return distribute_tensor(_whole(x), self.mesh, rows, src_data_rank=None).to_local()
        if name in _HEADS:
            return self._part(name, x, self.placements, self.placements)
        if name == "index_k":
            # One head serves all groups, so every process with groups has a part of its gradient.
            grads = [Partial() if p == Shard(1) else p for p in self.placements]
            return self._part(name, x, rows, grads)
        return _whole(x)

    def _part(self, name: str, x: Any, wanted: Sequence[Placement], grads: Sequence[Placement]) -> Tensor:
        if not isinstance(x, DTensor) or x.device_mesh != self.mesh:
            got = f"one on {x.device_mesh}" if isinstance(x, DTensor) else type(x).__name__
            raise ValueError(f"{name}: expected a DTensor on the mesh of the others, {self.mesh}, got {got}")
        for dim in (0, 1):
            parts = 1
            for n, placement in enumerate(wanted):
                parts *= self.mesh.size(n) if placement == Shard(dim) else 1
            if x.shape[dim] % parts:
                what = "batch rows", "heads"
                raise ValueError(
                    f"{name}: expected a multiple of the {parts} processes that share its {what[dim]}, "
                    f"got {x.shape[dim]}"
                )
        if tuple(x.placements) != tuple(wanted):
            x = redistribute(x, self.mesh, x.placements, wanted)
        return x.to_local(grad_placements=grads)

    def groups(self) -> list[dist.ProcessGroup]:
        """Those over which the parts of the loss are summed."""
        return [self.mesh.get_group(n) for n, p in enumerate(self.placements) if not p.is_replicate()]

    def whole(self, result: Any, is_loss: bool = False) -> Any:
        """The DTensors of a function's results, which are parts of tensors with heads, or of the loss."""
        if isinstance(result, AuxOutput):
            fields = {name: self.whole(x, "loss" in name) for name, x in result._asdict().items()}
            count = result.index_loss_count
            return AuxOutput(**{**fields, "index_loss_count": count})
        if isinstance(result, tuple):
            return tuple(self.whole(x) for x in result)
        if result is None:
            return None
        placements = [Partial() if is_loss and not p.is_replicate() else p for p in self.placements]
        return DTensor.from_local(result, self.mesh, placements, run_check=False)
