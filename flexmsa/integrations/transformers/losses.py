"""The index losses of one forward pass, with and without checkpointing of the layers."""

import math
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from flexmsa.checkpoint import save_selection_policy
from flexmsa.integrations.transformers.index_branch import (
    has_index_branch,
    num_groups,
    numbers_inside,
    trains_index_branch,
)

__all__ = [
    "IndexLossValue",
    "IndexLosses",
    "defer_losses",
    "index_loss_count",
    "prepare_checkpointing",
    "prepare_init_weights",
]


class IndexLossValue(nn.Module):
    """The scalar, float32, to which the backward writes the index loss of one attention module."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.value: Tensor
        self.register_buffer("value", torch.zeros((), dtype=torch.float32, device=device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `model.bfloat16()` and the like leave it in float32.
        super()._apply(fn, recurse)
        self.value = self.value.float()
        return self

    def renew(self) -> Tensor:
        """Return the scalar for the next backward, NaN until then."""
        if torch.compiler.is_compiling():
            # A traced backward can only write to tensors that exist before its forward.
            return self.value.fill_(math.nan)
        # The scalars of earlier forwards, whose backwards may come later, are left alone.
        self.value = torch.full_like(self.value, math.nan)
        return self.value


def prepare_init_weights(model: type) -> None:
    """Let a class of models initialize the `IndexLossValue`s in it, which `from_pretrained` makes without a value."""
    initialize: Any = model._init_weights  # type: ignore[attr-defined]
    if getattr(initialize, "knows_index_losses", False):
        return

    @wraps(initialize)
    def wrapped(self: Any, module: nn.Module) -> None:
        initialize(self, module)
        if isinstance(module, IndexLossValue):
            init.zeros_(module.value)

    wrapped.knows_index_losses = True  # type: ignore[attr-defined]
    model._init_weights = wrapped  # type: ignore[attr-defined]


class IndexLosses:
    """Collects the index loss of each sparse layer: pass a new one to each call, `model(..., index_losses=losses)`.

    A converted model makes its own and adds the losses to `outputs.loss`.

    In training the backward computes the losses, which costs little there: the forward adds a 0 that has the loss's
    gradient, and the values are there after the backward.

    Args:
        in_backward: whether the backward computes the losses of a model in training mode.
        count: what the sum of each layer's losses is divided by, as for `flexmsa.attention`; default: their number in
            this forward. See `flexmsa.integrations.transformers.index_loss_count`.

    >>> losses = IndexLosses()
    >>> losses.record(3, torch.tensor(0.5, requires_grad=True))
    >>> losses.values, losses.add_to(torch.tensor(2.0), weight=0.1)
    ({3: tensor(0.5000)}, tensor(2.0500, grad_fn=<AddBackward0>))
    """

    def __init__(self, in_backward: bool = True, count: Tensor | float | None = None) -> None:
        self.in_backward, self.count = in_backward, count
        self.deferred: dict[int, Tensor] = {}
        self._losses: dict[int, Tensor] = {}

    @property
    def values(self) -> dict[int, Tensor]:
        """Layer number -> the layer's loss, a detached scalar; NaN before a backward that computes it."""
        return {layer: self.deferred.get(layer, loss).detach() for layer, loss in self._losses.items()}

    def record(self, layer: int, loss: Tensor) -> None:
        """Store the loss of `layer`, a scalar."""
        if layer in self._losses:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
                # A layer in torch's checkpoint_wrapper runs again in the backward: the first loss has the gradient.
                return
            raise ValueError("index_losses: expected an empty IndexLosses, got a used one; make one for each forward")
        self._losses[layer] = loss

    def of(self, layers: Iterable[int]) -> tuple[Tensor, ...]:
        """Return the losses of those of these layers that have one, with their gradients."""
        return tuple(self._losses[layer] for layer in layers if layer in self._losses)

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


def index_loss_count(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the number of losses of each layer with an index branch: of its groups, and the queries that see a key.

    Where processes or micro-batches have unequal numbers of tokens, add these counts up for the mean over all of them:
    see `flexmsa.distributed.global_index_loss_count`.

    Args:
        input_ids: [B, S]; attention_mask: [B, S], 0 for padding.

    Returns:
        Scalar int64.
    """
    groups = num_groups(model.config.get_text_config())
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return groups * mask.sum()


def defer_losses(losses: IndexLosses, model: nn.Module) -> None:
    """Let the backward compute the losses of the layers whose index branches train."""
    modules: Iterable[Any] = model.modules()
    for module in modules:
        if has_index_branch(module) and trains_index_branch(module):
            if not hasattr(module, "index_loss_value"):
                module.index_loss_value = IndexLossValue(next(module.parameters()).device)
            losses.deferred[module.layer_idx] = module.index_loss_value.renew()


def prepare_checkpointing(model: nn.Module) -> None:
    """Prepare the checkpointed layers of `model` that have an index branch.

    Their index losses become outputs of the checkpointed function, so that they keep their gradient. Non-reentrant
    checkpointing saves the selection, unless the user passed a context_fn.
    """
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            checkpoint: Any = layer._gradient_checkpointing_func
            if isinstance(checkpoint, _Checkpoint):
                continue
            numbers = numbers_inside(layer)
            if numbers:
                layer._gradient_checkpointing_func = _Checkpoint(_saving_selection(checkpoint), numbers)  # type: ignore[assignment]


def _saving_selection(checkpoint: Any) -> Any:
    """Return transformers' `checkpoint`, a partial function of torch's, with `save_selection_policy` if it takes one.

    Reentrant checkpointing, which is torch's own default, does not.
    """
    given = getattr(checkpoint, "keywords", {})
    if given.get("use_reentrant") is not False or "context_fn" in given:
        return checkpoint
    return partial(checkpoint, context_fn=partial(create_selective_checkpoint_contexts, save_selection_policy))


class _Checkpoint:
    """transformers' `checkpoint`, for a layer whose keyword arguments may have an IndexLosses.

    The checkpointed function changes no object outside itself: torch.compile would raise.
    """

    def __init__(self, checkpoint: Callable, numbers: list[int]) -> None:
        self.checkpoint, self.numbers = checkpoint, numbers

    def __call__(self, layer: partial, *args: Any) -> Any:
        losses: IndexLosses | None = layer.keywords.get("index_losses")
        if losses is None:
            return self.checkpoint(layer, *args)

        def run(*args: Any) -> tuple[Tensor, ...]:
            inside = IndexLosses(count=losses.count)
            inside.deferred = losses.deferred
            out = layer(*args, index_losses=inside)
            if not isinstance(out, Tensor):
                raise TypeError(f"model: expected checkpointed layers that return a tensor, got {type(out).__name__}")
            return out, *inside.of(self.numbers)

        out, *found = self.checkpoint(run, *args)
        for number, loss in zip(self.numbers, found, strict=False):
            losses.record(number, loss)
        return out
