"""FSDP2 and the methods of a layer other than its forward."""

from torch import nn

from flexmsa.modules import MSAttention

__all__ = ["register_fsdp_methods"]


def register_fsdp_methods(model: nn.Module) -> None:
    """Let `project` and `generate` of every `MSAttention` in the model that `fully_shard` wrapped gather its weights.

    PyTorch gathers them for the forward only, and other methods fail on the parts. Call this after `fully_shard`. A
    layer within a module that was wrapped as a whole is not meant: register the method of that module which calls it,
    by `torch.distributed.fsdp.register_fsdp_forward_method`.

    Raises:
        ValueError: `fully_shard` wrapped no `MSAttention` of the model.

    >>> for block in model.blocks:  # doctest: +SKIP
    ...     fully_shard(block.attention)
    >>> register_fsdp_methods(model)  # doctest: +SKIP
    """
    # Imported here, because it takes a second.
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    layers = [layer for layer in model.modules() if isinstance(layer, MSAttention) and isinstance(layer, FSDPModule)]
    if not layers:
        raise ValueError("model: expected an MSAttention wrapped by fully_shard, got none; call this after fully_shard")
    for layer in layers:
        for method in ("project", "generate"):
            register_fsdp_forward_method(layer, method)
