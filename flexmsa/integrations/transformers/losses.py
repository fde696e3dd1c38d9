"""The index losses of one forward pass, with and without checkpointing of the layers."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from flexmsa.integrations.transformers.index_branch import has_index_branch

__all__ = ["IndexLosses", "keep_losses_when_checkpointing"]


class IndexLosses:
    """Collects the index loss of each sparse layer: pass a new one to each call, `model(..., index_losses=losses)`.

    A converted model makes its own and adds the losses to `outputs.loss`.

    Attributes:
        values: layer number -> the layer's loss, a detached scalar.

    >>> losses = IndexLosses()
    >>> losses.record(3, torch.tensor(0.5, requires_grad=True))
    >>> losses.values, losses.add_to(torch.tensor(2.0), weight=0.1)
    ({3: tensor(0.5000)}, tensor(2.0500, grad_fn=<AddBackward0>))
    """

    def __init__(self) -> None:
        self._losses: dict[int, Tensor] = {}

    @property
    def values(self) -> dict[int, Tensor]:
        return {layer: loss.detach() for layer, loss in self._losses.items()}

    def record(self, layer: int, loss: Tensor) -> None:
        """Store the loss of `layer`, a scalar."""
        if layer in self._losses:
            raise ValueError("index_losses: expected an empty IndexLosses, got a used one; make one for each forward")
        self._losses[layer] = loss

    def sum(self) -> Tensor:
        """Return the sum over layers, a scalar with a gradient for the index weights.

        Raises:
            RuntimeError: nothing was recorded.
        """
        if not self._losses:
            raise RuntimeError("index_losses: expected to be filled by a forward pass, got none; pass it to the model")
        losses = list(self._losses.values())
        return torch.stack([loss.to(losses[0].device) for loss in losses]).sum()

    def add_to(self, loss: Tensor, weight: float) -> Tensor:
        """Return loss + weight * (the sum over layers), to call backward on.

        Args:
            loss: scalar, the model's own loss; zero to train only the index branches.
            weight: lambda, the factor of each layer's index loss.

        Raises:
            RuntimeError: nothing was recorded, or the recorded losses have no gradient.
        """
        total = self.sum()
        if torch.is_grad_enabled() and not total.requires_grad:
            raise RuntimeError(
                "index_losses: expected losses with a gradient, got none: the index weights are frozen, or the forward "
                "pass ran under no_grad; unfreeze them, or add the losses under no_grad too"
            )
        return loss + weight * total.to(loss.device)


def keep_losses_when_checkpointing(model: nn.Module) -> None:
    """Make the index losses of a checkpointed layer outputs of it, so that they keep their gradient."""
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            checkpoint: Any = layer._gradient_checkpointing_func
            if not isinstance(checkpoint, _Checkpoint):
                layer._gradient_checkpointing_func = _Checkpoint(checkpoint, _numbers_inside(layer))  # type: ignore[assignment]


def _numbers_inside(layer: nn.Module) -> list[int]:
    """Return the layer numbers of the attention modules inside `layer` that have an index branch."""
    modules: Iterable[Any] = layer.modules()
    return [module.layer_idx for module in modules if has_index_branch(module)]


class _Checkpoint:
    """transformers' `checkpoint`, for a layer whose keyword arguments may have an IndexLosses.

    The checkpointed function changes no object outside itself: torch.compile would raise.
    """

    def __init__(self, checkpoint: Callable, numbers: list[int]) -> None:
        self.checkpoint, self.numbers = checkpoint, numbers

    def __call__(self, layer: partial, *args: Any) -> Any:
        losses: IndexLosses | None = layer.keywords.get("index_losses")
        if losses is None or not self.numbers:
            return self.checkpoint(layer, *args)

        def run(*args: Any) -> tuple[Tensor, ...]:
            inside = IndexLosses()
            out = layer(*args, index_losses=inside)
            if not isinstance(out, Tensor):
                raise TypeError(f"model: expected checkpointed layers that return a tensor, got {type(out).__name__}")
            return out, *(inside._losses[number] for number in self.numbers if number in inside._losses)

        out, *found = self.checkpoint(run, *args)
        for number, loss in zip(self.numbers, found, strict=False):
            losses.record(number, loss)
        return out
