"""Tensor parallel: the heads of an MSAttention layer over the processes of a mesh."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from flexmsa.distributed.gradients import redistribute, with_total
from flexmsa.modules import MSAttention

__all__ = ["HeadShards", "tensor_parallel_plan"]

_SHARDED = ("q_proj", "k_proj", "v_proj", "index_q_proj")


def tensor_parallel_plan(layer: MSAttention, *, sequence_parallel: bool = False) -> ParallelStyle:
    """The plan of torch's `parallelize_module` that shards the heads of an `MSAttention` layer, exactly.

    Each process has Hkv / W groups: their rows of the projections of q, k, v and index_q, and their columns of the
    output projection. The norms and the projection of index_k are replicated. Output, index loss and all gradients are
    those of one process, on every process: the loss is the mean over the groups of all, also where the backward writes
    it to `layer.index_loss_value`. `layer.new_cache` makes a cache of the process's own groups.

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
        if device_mesh.ndim != 1:
            names = device_mesh.mesh_dim_names or device_mesh.ndim
            raise ValueError(f"mesh: expected one dimension, got {names}; take it by its name")
        groups, size = module.config.num_kv_heads, device_mesh.size()
        if groups % size:
            raise ValueError(
                f"num_kv_heads: expected a multiple of the {size} processes of the mesh, got {groups}; a group of "
                "heads stays on one process, so use at most num_kv_heads processes for tensor parallel"
            )
        for name, child in module.named_children():
            for kind, parameter in list(child.named_parameters(recurse=False)):
                placements = [_placement(name, kind)]
                shard = distribute_tensor(parameter, device_mesh, placements, src_data_rank=self.src_data_rank)
                child.register_parameter(kind, nn.Parameter(shard, requires_grad=parameter.requires_grad))
        module.head_shards = HeadShards(device_mesh, self.sequence_parallel)
        return module


def _placement(module: str, parameter: str) -> Placement:
    if module in _SHARDED:
        return Shard(0)
    return Shard(1) if (module, parameter) == ("o_proj", "weight") else Replicate()


class HeadShards:
    """What a layer does between its sharded parameters, which are DTensors, and its own heads, which are not.

    Attributes:
        mesh: of the processes that share the heads.
        size: their number.
        sequence_parallel: the layer's input and output are shards of the tokens.
    """

    def __init__(self, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        self.mesh, self.sequence_parallel = mesh, sequence_parallel
        self.size = mesh.size()
        self._outside: list[Placement] = [Shard(1) if sequence_parallel else Replicate()]

    def shape(self, x: Tensor) -> tuple[int, int]:
        """The numbers of rows and of tokens of the layer's input x, those of all processes."""
        is_part = self.sequence_parallel and not isinstance(x, DTensor)
        return x.shape[0], x.shape[1] * (self.size if is_part else 1)

    def gather(self, x: Tensor) -> Tensor:
        """The layer's input, whole on every process. One collective sums its gradient, of all projections."""
        return redistribute(x, self.mesh, self._outside, [Replicate()])

    def own(self, projection: nn.Module, x: Tensor) -> Tensor:
        """A projection of the gathered x to this process's heads, [B, S, H D / W], or to replicated ones."""
        assert isinstance(x, DTensor)
        if all(isinstance(weight, DTensor) and Replicate() in weight.placements for weight in projection.parameters()):
            return self.replicated(projection, x.to_local())
        return projection(x).to_local()

    def replicated(self, module: nn.Module, x: Tensor) -> Tensor:
        """module(x) of a plain x. The gradients of its replicated parameters are sums over the processes."""
        own = {}
        for name, parameter in module.named_parameters():
            # Its gradient is summed here, not left as a DTensor of partial sums.
            whole = redistribute(parameter, self.mesh, [Replicate()], [Replicate()])
            own[name] = whole.to_local(grad_placements=[Partial()])
        return torch.func.functional_call(module, own, (x,))

    def project(self, projection: nn.Module, out: Tensor) -> Tensor:
        """The output projection of this process's heads [B, S, Hq D / W], summed over the processes."""
        merged = projection(DTensor.from_local(out, self.mesh, [Shard(2)], run_check=False))
        return merged.redistribute(placements=self._outside).to_local()

    def total(self, part: Tensor) -> Tensor:
        """The sum of the processes' scalars; each part's gradient is the sum's."""
        return DTensor.from_local(part, self.mesh, [Partial()], run_check=False).full_tensor()

    def with_total(self, index_q: Tensor, index_k: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """index_q and index_k, whose backward sums `value` over the processes, after the loss's backward wrote it."""
        return with_total(index_q, index_k, value, [self.mesh.get_group()])
