"""What DistributedDataParallel and FSDP2 must know of index losses, which pass by the outputs of the layers."""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flexmsa.integrations.transformers.index_branch import numbers_inside
from flexmsa.integrations.transformers.losses import IndexLosses

__all__ = ["check_replicas", "is_sharded_flat", "prepare_shards", "renew_shards"]


def check_replicas(model: nn.Module) -> None:
    """Raise if DistributedDataParallel, inside which `model` is called, would not average all gradients.

    Raises:
        ValueError: weights were frozen when it was made, or are frozen now without its search for unused parameters.
    """
    ddp = None if torch.compiler.is_compiling() else DistributedDataParallel._get_active_ddp_module()
    if ddp is None:
        return
    known = ddp._get_ddp_logging_data().get("num_parameter_tensors")
    trained = sum(parameter.requires_grad for parameter in ddp.module.parameters())
    if known is None or trained == known:
        return
    if trained > known:
        raise ValueError(
            f"DistributedDataParallel: expected the {known} weights that it averages, got {trained} that train: the "
            "others were frozen when it was made; wrap the model again after begin_sparse, or only once before "
            "begin_warm_up, with find_unused_parameters=True"
        )
    if not (ddp.find_unused_parameters or ddp.static_graph):
        raise ValueError(
            f"DistributedDataParallel: expected gradients of the {known} weights that trained when it was made, got "
            f"{trained} that train now; pass find_unused_parameters=True (to a Trainer ddp_find_unused_parameters=True)"
        )


def prepare_shards(model: nn.Module, *, returns_losses: bool) -> None:
    """Make the index losses outputs of the FSDP2 modules inside which they are computed.

    FSDP2 gathers a module's weights, and averages its gradients, when the backward reaches its outputs. Layers of a
    frozen base have no other output with a gradient.

    Args:
        returns_losses: the outputs of `model` itself have the losses.
    """
    if torch.compiler.is_compiling():
        return
    for module in _shards(model):
        if module is model and returns_losses:
            continue
        if "flexmsa_losses_are_outputs" not in module.__dict__ and numbers_inside(module):
            module.flexmsa_losses_are_outputs = True
            # The first comes before FSDP2's own hook, the last after it.
            module.register_forward_hook(_add_losses, prepend=True, with_kwargs=True)
            module.register_forward_hook(_drop_losses)


def _add_losses(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> tuple[Any, tuple]:
    losses: IndexLosses | None = kwargs.get("index_losses")
    return output, () if losses is None else losses.of(numbers_inside(module))


def _drop_losses(module: nn.Module, args: tuple, output: tuple[Any, tuple]) -> Any:
    return output[0]


def renew_shards(model: nn.Module) -> None:
    """Let FSDP2 see which weights train now: it looks when it first gathers them, for the dtypes of their gradients."""
    for module in _shards(model):
        module.unshard()
        module.reshard()


def is_sharded_flat(model: nn.Module) -> bool:
    """Return whether FSDP1 shards the weights, whose gradients then have no shape of their own."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FullyShardedDataParallel", None)
    return kind is not None and any(isinstance(module, kind) for module in model.modules())


def _shards(model: nn.Module) -> Iterator[Any]:
    # Who has such modules has imported it; others need not, as it takes time.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    return iter(()) if kind is None else (module for module in model.modules() if isinstance(module, kind))
