"""The index loss as a mean over all processes, where they have unequal numbers of queries."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexmsa.distributed.mesh import check_mesh
from flexmsa.types import AuxOutput

__all__ = ["global_index_loss", "global_index_loss_count"]


def global_index_loss_count(count: Tensor, mesh: DeviceMesh) -> Tensor:
    """The count that makes the index loss a mean over all processes of a mesh, where gradients are averaged over them.

    DistributedDataParallel and `fully_shard` divide the sum of the processes' gradients by their number W. So each
    process divides the sum of its losses by n / W, n being the number of losses of all processes: give the result to
    `attention(index_loss_count=)` or to a layer's `forward`. To accumulate gradients over micro-batches, add up their
    counts first, and add the losses up without dividing them.

    Args:
        count: scalar, the number of this process's losses, of all of its micro-batches: `layer.index_loss_count(x)`,
            or `AuxOutput.index_loss_count`.
        mesh: one-dimensional, of the processes that average their gradients.

    Returns:
        Scalar float64, n / W, and 1 / W without any losses. The same on every process, whatever its batch is.

    >>> global_index_loss_count(layer.index_loss_count(x), mesh)  # doctest: +SKIP
    tensor(120., dtype=torch.float64)
    """
    check_mesh(mesh)
    total = count.detach().to(torch.float64, copy=True)
    dist.all_reduce(total, group=mesh.get_group())
    # A count may be a share of one, with context parallel.
    return torch.where(total > 0, total, 1) / mesh.size()


def global_index_loss(aux: AuxOutput, mesh: DeviceMesh) -> Tensor:
    """The mean of the index loss over all processes of a mesh, where gradients are averaged over them.

    Its value is the same on every process. Its gradient is W times this process's part, since
    DistributedDataParallel and `fully_shard` divide by the number of processes W.

    Args:
        aux: with index_loss_sum and index_loss_count, from `attention(return_aux=AuxRequest(index_loss_sum=True))`
            without `index_loss_count`. Where the backward computes the loss, use `global_index_loss_count` instead.
        mesh: one-dimensional, of the processes that average their gradients.

    Raises:
        ValueError: aux has no sum.

    >>> global_index_loss(aux, mesh).backward()  # doctest: +SKIP
    """
    if aux.index_loss_sum is None or aux.index_loss_count is None:
        raise ValueError("aux: expected index_loss_sum, got None; request it by AuxRequest(index_loss_sum=True)")
    check_mesh(mesh)
    local = aux.index_loss_sum
    both = torch.stack([local.detach().double(), aux.index_loss_count.detach().double()])
    dist.all_reduce(both, group=mesh.get_group())
    total, count = both.unbind()
    part = local * (mesh.size() / count.clamp(min=1)).to(local.dtype)
    value = (total / count.clamp(min=1)).to(local.dtype)
    return part + (value - part).detach()
