"""Autograd functions of sharded calls. They allow results without a gradient, for which torch's own raise."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

__all__ = ["redistribute", "summed", "total", "with_total"]


def redistribute(x: Tensor, mesh: DeviceMesh, given: Sequence[Placement], wanted: Sequence[Placement]) -> DTensor:
    """x as a DTensor placed as `wanted`. A plain tensor x is this process's part of one placed as `given`."""
    return _Redistribute.apply(x, mesh, given, wanted)


class _Redistribute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mesh: DeviceMesh, given: Sequence[Placement], wanted: Sequence[Placement]
    ) -> DTensor:
        ctx.is_plain = not isinstance(x, DTensor)
        x = x.detach()
        placed = x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, given, run_check=False)
        ctx.placements = placed.placements
        ctx.set_materialize_grads(False)
        return placed.redistribute(placements=wanted)

    @staticmethod
    def backward(ctx: Any, grad: DTensor | None) -> Any:
        if grad is None:
            return None, None, None, None
        grad = grad.redistribute(placements=ctx.placements)
        return grad.to_local() if ctx.is_plain else grad, None, None, None


def summed(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, the same on every process, as a plain tensor whose gradient is summed over the mesh."""
    # Summed here, not left as a DTensor of partial sums.
    whole = redistribute(x, mesh, [Replicate()], [Replicate()])
    return whole.to_local(grad_placements=[Partial()])


def total(part: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the processes' scalars; each part's gradient is the sum's."""
    return DTensor.from_local(part, mesh, [Partial()], run_check=False).full_tensor()


def with_total(
    index_q: Tensor, index_k: Tensor, value: Tensor, groups: Sequence[dist.ProcessGroup]
) -> tuple[Tensor, Tensor]:
    """index_q and index_k, whose backward sums `value` over the groups, after the loss's backward wrote it."""
    return _TotalInBackward.apply(index_q, index_k, value, groups)


class _TotalInBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, index_q: Tensor, index_k: Tensor, value: Tensor, groups: Sequence[dist.ProcessGroup]
    ) -> tuple[Tensor, Tensor]:
        ctx.value, ctx.groups = value, groups
        ctx.set_materialize_grads(False)
        return index_q.view_as(index_q), index_k.view_as(index_k)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # Without gradients the loss took no part in this backward, and the value is already summed.
        if any(grad is not None for grad in grads):
            for group in ctx.groups:
                ctx.value.copy_(collectives.all_reduce(ctx.value, "sum", group))
        return *grads, None, None
