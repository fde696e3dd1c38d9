"""All tokens of tensors whose tokens are cut over processes, with gradients that are added in the order of ranks.

And, for results without a gradient, the tensors of all processes. Tokens come first in what is exchanged: as layers
lay their heads out, and so that whole tokens, of all heads, are put in order."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh

if TYPE_CHECKING:
    from flexmsa.distributed.shards import SequenceShards

# PyTorch 2.13 renamed them.
_all_gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor
_all_gather_together = (
    getattr(collectives, "all_gather_single_coalesced", None) or collectives.all_gather_into_tensor_coalesced
)

__all__ = ["begin_to_gather", "finish_gathering", "gather_parts", "gather_tokens"]


class _Finish(torch.autograd.Function):
    """The gathered tokens in order; the gradient is each process's sum over all processes."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, order: Tensor, is_padded: bool, group: Any, *args: Tensor) -> Any:
        # The tensors, for which there is a gradient, and then what was gathered of them.
        gathered = args[len(args) // 2 :]
        ctx.save_for_backward(order)
        ctx.is_padded, ctx.group = is_padded, group
        ctx.set_materialize_grads(False)
        return _in_order(gathered, places)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        scatter = partial(_begin_to_scatter, order=order, is_padded=ctx.is_padded, group=ctx.group)
        # The second tensor is put in order while the first is on its way.
        pending = [None if grad is None else scatter(grad) for grad in grads]
        sums = [None if x is None else _sum_of_ranks(x, ctx.group.size()) for x in pending]
        return None, None, None, None, *sums, *(None for _ in sums)


def _in_order(gathered: Sequence[Tensor], places: Tensor) -> tuple[Tensor, ...]:
    """[..., S, D] of what was gathered, [W L, ..., D]."""
    return tuple(collectives.wait_tensor(x).index_select(0, places).movedim(0, -2) for x in gathered)


def _begin_to_scatter(grad: Tensor, order: Tensor, is_padded: bool, group: Any) -> Tensor:
    """Begin to give each process its tokens of grad [..., S, D]: [W L, ..., D], L from each process."""
    parts = grad.movedim(-2, 0).index_select(0, order.clamp(min=0))
    if is_padded:
        parts = parts.masked_fill((order < 0).view(-1, *[1] * (grad.dim() - 1)), 0)
    return _alone_on_cpus(collectives.all_to_all_single(parts, None, None, group))


def _sum_of_ranks(parts: Tensor, world: int) -> Tensor:
    """[..., L, D], the sum of what all processes gave."""
    shares = collectives.wait_tensor(parts)
    shares = shares.view(world, shares.shape[0] // world, *shares.shape[1:])
    # Sums in 16 bits would lose what each process has computed.
    wide = torch.float32 if parts.dtype.itemsize == 2 else parts.dtype
    return shares.sum(0, dtype=wide).to(parts.dtype).movedim(0, -2)


def _alone_on_cpus(pending: Tensor) -> Tensor:
    """A tensor that is on its way; on a CPU it has come, so that no other exchange is under way.

    If two exchanges end at one time, gloo's threads may damage the heap (`ProcessGroupGloo::runLoop`, PyTorch 2.13).
    """
    return collectives.wait_tensor(pending) if pending.device.type == "cpu" else pending


def begin_to_gather(tensors: Sequence[Tensor], shards: "SequenceShards") -> list[Tensor]:
    """Begin to gather tensors [..., L, D] of all processes, in one exchange; the result is for `finish_gathering`."""
    own = [x.detach().movedim(-2, 0).contiguous() for x in tensors]
    return [_alone_on_cpus(x) for x in _all_gather_together(own, shards.mesh.get_group())]


def finish_gathering(tensors: Sequence[Tensor], gathered: list[Tensor], shards: "SequenceShards") -> tuple[Tensor, ...]:
    """[..., S, D] of all processes for each tensor, in the order of the tokens, with gradients for the tensors."""
    if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        # Dynamo would call a `forward` with *args and no gradient without its ctx.
        return _in_order(gathered, shards.places)
    outs: tuple[Tensor, ...] = _Finish.apply(
        shards.places, shards.order, shards.is_padded, shards.mesh.get_group(), *tensors, *gathered
    )
    return outs


def gather_tokens(tensors: Sequence[Tensor], shards: "SequenceShards") -> tuple[Tensor, ...]:
    """Gather tensors [..., L, D] of all processes: [..., S, D]."""
    return finish_gathering(tensors, begin_to_gather(tensors, shards), shards)


def gather_parts(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x [...] of all processes, [W, ...], without a gradient."""
    gathered = _all_gather(x.contiguous(), gather_dim=0, group=mesh.get_group())
    return collectives.wait_tensor(gathered).view(mesh.size(), *x.shape)
