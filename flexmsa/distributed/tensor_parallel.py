"""Tensor parallel: the heads of an MSAttention layer over the processes of a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from flexmsa import functional
from flexmsa.distributed.gradients import redistribute, summed, total, with_total
from flexmsa.distributed.mesh import check_mesh
from flexmsa.modules import MSAttention, Projections
from flexmsa.types import AuxRequest

__all__ = ["HeadShards", "tensor_parallel_plan"]


def tensor_parallel_plan(layer: MSAttention, *, sequence_parallel: bool = False) -> ParallelStyle:
    """The plan of torch's `parallelize_module` that shards the heads of an `MSAttention` layer, exactly.

    Each of W processes has Hkv / W groups: their rows of the projections of q, k, v and index_q, and their columns of
    the output projection. The norms and the projection of index_k are replicated. Output, index loss and all gradients
    are those of one process, on every process: the loss is the mean over the groups of all, also in
    `layer.index_loss_value`. `layer.new_cache` makes a cache of the process's own groups.

    If Hkv < W, the processes that share a group have its k, v and index_q each, and split its query heads. The index
    loss is then computed in the forward from gathered query heads, also with `loss_in_backward`.

    Apply it before `fully_shard`, on the mesh's dimension for tensor parallel.

    Args:
        layer: the layer, or one of the same settings.
        sequence_parallel: the layer takes and returns the process's part of the tokens, [B, S / W, hidden_size]
            (cu_seqlens and kv_starts remain those of all tokens). For training; W divides S.

    >>> plan = {"layers.*.attention": tensor_parallel_plan(layer)}  # doctest: +SKIP
    >>> parallelize_module(model, mesh["tp"], plan)  # doctest: +SKIP
    """
    if not isinstance(layer, MSAttention):
        raise TypeError(f"layer: expected an MSAttention, got {type(layer).__name__}")
    return _TensorParallel(sequence_parallel)


class _TensorParallel(ParallelStyle):
    def __init__(self, sequence_parallel: bool) -> None:
        super().__init__()
        self.sequence_parallel = sequence_parallel

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, MSAttention):
            raise TypeError(f"tensor_parallel_plan: expected an MSAttention, got {type(module).__name__}")
        if module.head_shards is not None:
            raise ValueError("tensor_parallel_plan: expected a layer without one, got a layer that has one")
        check_mesh(device_mesh)
        groups, heads, size = module.config.num_kv_heads, module.config.num_heads, device_mesh.size()
        if (groups % size and size % groups) or heads % size:
            raise ValueError(
                f"num_kv_heads, num_heads: expected a multiple or a divisor of the {size} processes of the mesh, and a "
                f"multiple, got {groups} and {heads}; use another number of processes for tensor parallel"
            )
        sharded = ("q_proj",) if groups < size else ("q_proj", "k_proj", "v_proj", "index_q_proj")
        for name, child in module.named_children():
            for kind, parameter in list(child.named_parameters(recurse=False)):
                placement: Placement = Shard(0) if name in sharded else Replicate()
                if (name, kind) == ("o_proj", "weight"):
                    placement = Shard(1)
                shard = distribute_tensor(parameter, device_mesh, [placement], src_data_rank=self.src_data_rank)
                child.register_parameter(kind, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        module.head_shards = HeadShards(device_mesh, self.sequence_parallel, max(1, size // groups))
        return module


@functools.lru_cache
def _group_of_replicas(group: dist.ProcessGroup, replicas: int) -> dist.ProcessGroup:
    """The processes that share a group of heads with this one, made once, as communicators take memory."""
    first = dist.get_rank(group) // replicas * replicas
    ranks = dist.get_process_group_ranks(group)[first : first + replicas]
    return dist.new_group(ranks, use_local_synchronization=True)


class HeadShards:
    """What a layer does between its sharded parameters, which are DTensors, and its own heads, which are not.

    Attributes:
        mesh: of the processes that share the heads.
        size: their number.
        replicas: the number of processes that share a group, each with some of its query heads.
        sequence_parallel: the layer's input and output are shards of the tokens.
    """

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool, replicas: int) -> None:
        self.mesh, self.sequence_parallel, self.replicas = mesh, sequence_parallel, replicas
        self.size = mesh.size()
        self._outside: list[Placement] = [Shard(1) if sequence_parallel else Replicate()]
        self._group_name = _group_of_replicas(mesh.get_group(), replicas).group_name if replicas > 1 else ""

    def shape(self, x: Tensor) -> tuple[int, int]:
        """The numbers of rows and of tokens of the layer's input x, those of all processes."""
        is_part = self.sequence_parallel and not isinstance(x, DTensor)
        return x.shape[0], x.shape[1] * (self.size if is_part else 1)

    def gather(self, x: Tensor) -> Tensor:
        """The layer's input, whole on every process. One collective sums its gradient, of all projections."""
        return redistribute(x, self.mesh, self._outside, [Replicate()])

    def own(self, projection: nn.Module, x: Tensor, width: int) -> Tensor:
        """A projection of the gathered x to the `width` columns of this process's heads, [B, S, width]."""
        assert isinstance(x, DTensor)
        if all(isinstance(weight, DTensor) and Replicate() in weight.placements for weight in projection.parameters()):
            return self.replicated(projection, x.to_local(grad_placements=[Partial()]), width)
        return projection(x).to_local()

    def replicated(self, module: nn.Module, x: Tensor, width: int | None = None) -> Tensor:
        """module(x) of a plain x; the gradients of its replicated parameters are sums over the processes.

        width: of wider parameters, the columns of this process's group.
        """
        own = {}
        for name, parameter in module.named_parameters():
            part = summed(parameter, self.mesh)
            if width is not None and part.shape[0] != width:
                part = part.narrow(0, self.mesh.get_local_rank() // self.replicas * width, width)
            own[name] = part
        return torch.func.functional_call(module, own, (x,))

    def whole_group(self, heads: Tensor) -> Tensor:
        """The heads [B, H, ...] of all processes that share this process's group, without a gradient."""
        operators = torch.ops._c10d_functional
        gathered = operators.all_gather_into_tensor(heads.contiguous(), self.replicas, self._group_name)
        parts = operators.wait_tensor(gathered)
        parts = parts.view(self.replicas, heads.shape[0], *parts.shape[1:])
        return parts.transpose(0, 1).flatten(1, 2)

    def project(self, projection: nn.Module, out: Tensor) -> Tensor:
        """The output projection of this process's heads [B, S, Hq D / W], summed over the processes."""
        merged = projection(DTensor.from_local(out, self.mesh, [Shard(2)], run_check=False))
        return merged.redistribute(placements=self._outside).to_local()

    def attention(
        self,
        attend: Callable[..., Any],
        inputs: Projections,
        settings: dict[str, Any],
        index_loss_count: Tensor | float,
        index_loss_value: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """`attend` to this process's heads, and the index loss of those of all processes.

        attend: `flexmsa.attention`, or `context_parallel_attention` with shards; index_loss_count: of all groups.
        """
        q, k, v, index_q, index_k = inputs
        loss: dict[str, Any] = {"index_loss_count": index_loss_count, "index_loss_value": index_loss_value}
        if self.replicas > 1:
            if attend is not functional.attention:
                raise ValueError(
                    f"shards: expected at least {self.size} KV heads for context parallel beside tensor parallel with "
                    f"{self.size} processes, got {self.size // self.replicas}; use fewer for tensor parallel"
                )
            return self._attention_of_replicas(inputs, settings, **loss)
        if index_loss_value is not None:
            index_q, index_k = with_total(index_q, index_k, index_loss_value, [self.mesh.get_group()])
        request = AuxRequest(index_loss=True)
        out, aux = attend(q, k, v, index_q, index_k, **settings, **loss, return_aux=request)
        assert aux.index_loss is not None
        # With a value, the loss is a 0 whose gradient is this process's part.
        return out, total(aux.index_loss, self.mesh) if index_loss_value is None else aux.index_loss

    def _attention_of_replicas(
        self,
        inputs: Projections,
        settings: dict[str, Any],
        index_loss_count: Tensor | float,
        index_loss_value: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Each process of a group has the loss of the whole group, so that the teacher is the mean over all its heads.

        The losses' mean over these processes would be too large: the heads' entropies are averaged in it.
        """
        out, aux = functional.attention(*inputs, **settings, return_aux=AuxRequest(lse=True, block_indices=True))
        q, k, _, index_q, index_k = inputs
        main = self.whole_group(q.detach()), k.detach()
        assert aux.lse is not None
        lse = self.whole_group(aux.lse.detach())
        given = {name: settings[name] for name in ("block_size", "cu_seqlens", "kv_starts", "backend")}
        given["count"] = index_loss_count * self.replicas
        loss = total(functional.index_loss(*main, index_q, index_k, aux.block_indices, lse, **given), self.mesh)
        if index_loss_value is None:
            return out, loss
        index_loss_value.copy_(loss.detach())
        return out, loss - loss.detach()
