"""The index losses in trainers that build their loss themselves, and a check that they reached the index branches."""

import functools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flexmsa.integrations.transformers.converted_attention import Conversion
from flexmsa.integrations.transformers.index_branch import is_index_weight

__all__ = ["IndexLossMixin", "watch_gradients"]


class IndexLossMixin:
    """Adds the index losses of a converted model to the loss of a `Trainer` subclass, however that makes its loss.

    Put it before the trainer: `class MSATrainer(IndexLossMixin, SFTTrainer): pass`. `transformers.Trainer` itself needs
    it with label smoothing or with a loss function of its own; its plain loss has the index losses already. With
    gradient accumulation each micro-batch counts alike.
    """

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the trainer's own loss plus the model's `index_loss_weight` times its index losses."""
        converted = self.accelerator.unwrap_model(model)
        with _apart(converted.flexmsa) as losses:
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss, *outputs = found if return_outputs else (found,)
        if losses:
            # Trainer divides the loss by the number of micro-batches unless it counted their tokens; a count of the
            # losses is one of all micro-batches.
            divides = num_items_in_batch is None or not self.model_accepts_loss_kwargs
            divides = (divides and self.compute_loss_func is None) or converted.flexmsa.index_loss_count is not None
            steps = 1 if divides else self.current_gradient_accumulation_steps
            # Without a count each forward pass has a mean; a loss of several passes gets the mean of these.
            each = torch.stack([x.to(loss.device) for x in losses])
            total = each.mean() if converted.flexmsa.index_loss_count is None else each.sum()
            loss = loss + converted.flexmsa.index_loss_weight / steps * total
        return (loss, *outputs) if return_outputs else loss


@contextmanager
def _apart(conversion: Conversion) -> Iterator[list[Tensor]]:
    """Collect the index losses of forward passes in training mode, which then leave `outputs.loss` alone."""
    conversion.collected = []
    try:
        yield conversion.collected
    finally:
        conversion.collected = None


_WATCHED: weakref.WeakSet[Any] = weakref.WeakSet()


def watch_gradients(model: Any) -> None:
    """Raise in the next optimizer step of a model whose index losses were computed, if they were not differentiated.

    This happens where a loss is made of the model's logits instead of `outputs.loss`.
    """
    if not torch.compiler.is_compiling():
        _WATCHED.add(model)
        _register()


@functools.cache
def _register() -> None:
    register_optimizer_step_pre_hook(_check)


def _check(optimizer: Any, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling():
        return
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for model in list(_WATCHED):
        conversion: Conversion = model.flexmsa
        if not conversion.waits or known.isdisjoint(model.parameters()):
            continue
        conversion.waits = False
        if _lacks_gradients(model, known):
            raise RuntimeError(
                "optimizer.step(): expected gradients of the index branches, got none: the forward pass computed their "
                "losses, but what was differentiated does not include them, as outputs.loss does. In a Trainer, put "
                "IndexLossMixin before its class; in a loop of your own, add model.flexmsa.index_loss_weight * "
                "outputs.index_loss to the loss; or freeze the index weights"
            )


def _lacks_gradients(model: Any, known: set[Tensor]) -> bool:
    """Whether these parameters, an optimizer's, have gradients, but no index weight of the model among them has one."""
    index: list[bool] = []
    others: list[bool] = []
    for name, parameter in model.named_parameters():
        # With FSDP1, a process has empty parameters without gradients in place of those that others hold.
        if parameter in known and parameter.requires_grad and parameter.numel() > 0:
            (index if is_index_weight(name) else others).append(parameter.grad is not None)
    return bool(index) and not any(index) and any(others)
