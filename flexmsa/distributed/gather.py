"""All tokens of a tensor whose tokens are cut over processes, with gradients that are added in the order of ranks.

And, for results without a gradient, the tensors of all processes."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from flexmsa.distributed.shards import SequenceShards

# PyTorch 2.13 renamed it.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor

__all__ = ["begin_to_gather", "finish_gathering", "gather_parts", "gather_tokens"]


class _Finish(torch.autograd.Function):
    """The gathered tokens in order; the gradient is each process's sum over all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathered: Tensor, order: Tensor, group: Any) -> Tensor:
        ctx.save_for_backward(order)
        ctx.length, ctx.group, ctx.dtype = x.shape[-2], group, x.dtype
        parts = collectives.wait_tensor(gathered).unflatten(0, (-1, x.shape[0]))
        # [W, ..., L, D] to [..., W L, D].
        return parts.movedim(0, -3).flatten(-3, -2).index_select(-2, order)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (order,) = grads, ctx.saved_tensors
        world = ctx.group.size()
        parts = grad.new_zeros((*grad.shape[:-2], world * ctx.length, grad.shape[-1]))
        parts = parts.index_copy(-2, order, grad).unflatten(-2, (world, ctx.length)).movedim(-3, 0).contiguous()
        shares = collectives.all_to_all_single(parts.flatten(0, 1), None, None, ctx.group)
        shares = collectives.wait_tensor(shares).unflatten(0, (world, -1))
        # Sums in 16 bits would lose what each process has computed.
        wide = torch.float32 if grad.dtype.itemsize == 2 else grad.dtype
        return shares.sum(0, dtype=wide).to(ctx.dtype), None, None, None


def begin_to_gather(x: Tensor, shards: "SequenceShards") -> Tensor:
    """Begin to gather x [..., L, D] of all processes; what is returned is for `finish_gathering`."""
    group = shards.mesh.get_group()
    return _all_gather(x.detach().contiguous(), gather_dim=0, group=group)


def finish_gathering(x: Tensor, gathered: Tensor, shards: "SequenceShards") -> Tensor:
    """[..., S, D] of all processes, in the order of the tokens, with a gradient for x."""
    out = _Finish.apply(x, gathered, shards.order, shards.mesh.get_group())
    assert isinstance(out, Tensor)
    return out


def gather_tokens(x: Tensor, shards: "SequenceShards") -> Tensor:
    """Gather x [..., L, D] of all processes: [..., S, D]."""
    return finish_gathering(x, begin_to_gather(x, shards), shards)


def gather_parts(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x [...] of all processes, [W, ...], without a gradient."""
    gathered = _all_gather(x.contiguous(), gather_dim=0, group=mesh.get_group())
    return collectives.wait_tensor(gathered).unflatten(0, (mesh.size(), x.shape[0]))
