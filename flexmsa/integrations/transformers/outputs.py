"""The outputs of a model with index losses: transformers' own class, with the field index_loss.

A field, because an entry beside the fields is lost or refused where outputs are taken apart and made anew, as by
DistributedDataParallel.
"""

import dataclasses
import inspect
from typing import Any, get_args

import torch
from torch import Tensor
from transformers.utils import ModelOutput

__all__ = ["prepare_outputs", "with_index_loss"]

_EXTENDED: dict[type, Any] = {}


def prepare_outputs(model: type) -> None:
    """Make the classes that the forward of a class of models is annotated with; torch.compile cannot make classes."""
    annotation = inspect.signature(model.forward).return_annotation  # type: ignore[attr-defined]
    for kind in get_args(annotation) or (annotation,):
        if isinstance(kind, type) and issubclass(kind, ModelOutput):
            _extend(kind)


def with_index_loss(output: Any, index_loss: Tensor) -> Any:
    """Return `output`, a mapping, with index_loss."""
    kind = type(output)
    if isinstance(output, ModelOutput) and not torch.compiler.is_compiling():
        _extend(kind)
    if kind in _EXTENDED:
        return _EXTENDED[kind](**output, index_loss=index_loss)
    output["index_loss"] = index_loss
    return output


def _extend(kind: type) -> None:
    if kind not in _EXTENDED:
        field = "index_loss", Tensor | None, None
        own = {"__module__": kind.__module__, "__reduce__": lambda self: (_restore, (kind, dict(self)))}
        _EXTENDED[kind] = dataclasses.make_dataclass(kind.__name__, [field], bases=(kind,), namespace=own)


def _restore(kind: type, entries: dict[str, Any]) -> Any:
    _extend(kind)
    return _EXTENDED[kind](**entries)
