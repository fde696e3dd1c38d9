"""The index losses of one forward pass, kept whichever way the layers are checkpointed."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["IndexLosses"]


class IndexLosses:
    """Collects the index loss of each sparse layer: a new one goes into each call, `model(..., index_losses=losses)`.

    Reentrant checkpointing runs the layers without gradients, and again in the backward pass. A loss recorded in the
    first run then has no graph; its gradient enters in the second, through the output of the layer's attention.

    Attributes:
        values: layer number -> the layer's loss, a detached scalar.

    >>> losses = IndexLosses()
    >>> _ = losses.record(3, torch.tensor(0.5, requires_grad=True), torch.ones(1))
    >>> losses.values, losses.add_to(torch.tensor(2.0), weight=0.1)
    ({3: tensor(0.5000)}, tensor(2.0500, grad_fn=<AddBackward0>))
    """

    def __init__(self) -> None:
        self._losses: dict[int, Tensor] = {}
        self._grad: Tensor | None = None

    @property
    def values(self) -> dict[int, Tensor]:
        return {layer: loss.detach() for layer, loss in self._losses.items()}

    def add_to(self, loss: Tensor, weight: float) -> Tensor:
        """Return loss + weight * (the sum over layers), to call backward on.

        Args:
            loss: scalar, the model's own loss; zero to train the index branches alone.
            weight: lambda, the factor of each layer's index loss.

        Raises:
            RuntimeError: nothing was recorded, or the layers ran under reentrant checkpointing and `loss` does not
                lead back to them.
        """
        if not self._losses:
            raise RuntimeError("index_losses: expected to be filled by a forward pass, got none; pass it to the model")
        attached = [x.to(loss.device) for x in self._losses.values() if x.requires_grad]
        detached = [x.to(loss.device) for x in self._losses.values() if not x.requires_grad]
        if attached:
            loss = loss + weight * torch.stack(attached).sum()
        if not detached:
            return loss
        total = torch.stack(detached).sum()
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RuntimeError(
                "index_losses: expected layers with gradients, got layers run without; add to the model's own loss if "
                "they are checkpointed with use_reentrant=True, or use use_reentrant=False"
            )
        return _AddDetached.apply(loss, total, weight, self)

    def record(self, layer: int, loss: Tensor, out: Tensor) -> Tensor:
        """Keep the loss of `layer`, and return its attention's `out`, which may have to carry the gradient."""
        # Within a backward pass: a checkpointed layer runs again.
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return _CarryGradient.apply(out, loss, self) if loss.requires_grad else out
        if layer in self._losses:
            raise ValueError("index_losses: expected an empty IndexLosses, got a used one; make one for each forward")
        self._losses[layer] = loss
        return out


class _AddDetached(torch.autograd.Function):
    """loss + weight * total. Its backward comes before that of any layer, which then finds the gradient of its own."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, total: Tensor, weight: float, losses: IndexLosses) -> Tensor:
        ctx.weight, ctx.losses = weight, losses
        return loss + weight * total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        ctx.losses._grad = grad * ctx.weight
        return grad, None, None, None


class _CarryGradient(torch.autograd.Function):
    """Passes `out` on, and gives `loss` the gradient that the sum of the losses got."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, losses: IndexLosses) -> Tensor:
        ctx.loss, ctx.losses = loss.detach(), losses
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        weight = ctx.losses._grad
        return grad, None if weight is None else weight.to(ctx.loss), None
