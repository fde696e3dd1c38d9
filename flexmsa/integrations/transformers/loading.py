"""Load a converted model that `save_pretrained` wrote: settings from config.json, index weights with the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from flexmsa.config import MSAConfig
from flexmsa.integrations.transformers.convert import install, model_sizes, msa_config
from flexmsa.integrations.transformers.index_branch import is_index_weight

__all__ = ["from_pretrained"]

# Arguments that select the files, for config.json too.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(
    path: str | Path, settings: MSAConfig | Mapping[str, Any] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a converted model that `save_pretrained` wrote.

    Args:
        path: a folder, or a name on the Hub.
        settings: the expected settings of the checkpoint; default: not checked.
        kwargs: for transformers' own `from_pretrained`: dtype, device_map, ...

    Raises:
        ValueError: the checkpoint is of a dense model, has no index weights, or has other settings; the message names
            the differences.
    """
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path, **where)
    stored = getattr(config.get_text_config(), "flexmsa", None)
    if stored is None:
        raise ValueError(
            f"{path}: expected a converted model, got a checkpoint without 'flexmsa' in its config.json; "
            "load it with transformers and convert it"
        )
    if settings is not None:
        _check_same_settings(path, {**stored, **model_sizes(config.get_text_config())}, settings)
    name = (config.architectures or [""])[0]
    architecture = getattr(transformers, name, None)
    if architecture is None:
        raise ValueError(f"{path}: expected an architecture of transformers, got {name!r} in its config.json")
    own = {key: value for key, value in stored.items() if key not in ("layers", "fallback", "warm_up")}

    def init(self: Any, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        architecture.__init__(self, config, *args, **options)
        install(self, msa_config(self, **own), tuple(stored["layers"]), stored["warm_up"])

    # A class whose constructor adds the index branch, so that from_pretrained loads its weights like all others.
    loader: Any = type(
        architecture.__name__, (architecture,), {"__init__": init, "__module__": architecture.__module__}
    )
    model, found = loader.from_pretrained(
        path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    _check_loaded(path, found)
    model.__class__ = architecture
    return model


def _check_same_settings(path: str | Path, stored: dict[str, Any], settings: MSAConfig | Mapping[str, Any]) -> None:
    """Compare the settings that both name; RoPE is always the model's own."""
    wanted = dataclasses.asdict(settings) if isinstance(settings, MSAConfig) else dict(settings)
    known = {setting.name for setting in dataclasses.fields(MSAConfig)}
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"settings: expected names of MSAConfig, got {name!r}; choose from {', '.join(sorted(known))}"
            )
    differences = [
        f"{name} is {stored[name]} there and {value} here"
        for name, value in wanted.items()
        if name in stored and stored[name] != value
    ]
    if differences:
        raise ValueError(f"{path}: expected a checkpoint with the settings given, but {'; '.join(differences)}")


def _check_loaded(path: str | Path, found: dict[str, Any]) -> None:
    missing = sorted(name for name in found["missing_keys"] if is_index_weight(name))
    if missing:
        raise ValueError(
            f"{path}: expected the weights of every index branch, but {len(missing)} are missing, such as {missing[0]}"
        )
    if found["mismatched_keys"]:
        name, there, here = sorted(found["mismatched_keys"])[0]
        raise ValueError(
            f"{path}: expected weights of the shapes that its config.json asks for, but {name} is {list(there)} there "
            f"and {list(here)} here"
        )
