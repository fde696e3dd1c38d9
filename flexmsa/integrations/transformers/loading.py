"""Load a converted model that `save_pretrained` wrote: settings from config.json, index weights with the others."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from flexmsa.config import MSAConfig
from flexmsa.integrations.transformers.attention import IMPLEMENTATION
from flexmsa.integrations.transformers.auto import PREFIX, converted_config, dense_architecture
from flexmsa.integrations.transformers.convert import install, msa_config
from flexmsa.integrations.transformers.dense_models import model_sizes
from flexmsa.integrations.transformers.index_branch import is_index_weight

__all__ = ["from_pretrained", "register_loader"]

# The end of an architecture's name -> the classes that load it.
_AUTO: dict[str, tuple[Any, ...]] = {
    "ForCausalLM": (AutoModelForCausalLM,),
    "ForConditionalGeneration": (AutoModelForImageTextToText, AutoModelForCausalLM),
    "ForSequenceClassification": (AutoModelForSequenceClassification,),
    "ForTokenClassification": (AutoModelForTokenClassification,),
}

# Arguments that select the files, for config.json too.
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def from_pretrained(
    path: str | Path, settings: MSAConfig | Mapping[str, Any] | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a converted model that `save_pretrained` wrote.

    transformers' `AutoModelForCausalLM.from_pretrained` loads it as well, with these checks but for `settings`.

    Args:
        path: a folder, or a name on the Hub.
        settings: the expected settings of the checkpoint; default: not checked.
        kwargs: for transformers' own `from_pretrained`: dtype, device_map, ... An `attn_implementation` other than
            "flexmsa" gives the model dense attention by it.

    Raises:
        ValueError: the checkpoint is of a dense model, has no index weights, or has other settings; the message names
            the differences.
        RuntimeError: weights of the dense model have other shapes.
    """
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    config = kwargs.pop("config", None)
    if config is None:
        # Others may be fields of the configuration.
        config, kwargs = AutoConfig.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    stored = getattr(config.get_text_config(), "flexmsa", None)
    if stored is None:
        raise ValueError(
            f"{path}: expected a converted model, got a checkpoint without 'flexmsa' in its config.json; "
            "load it with transformers and convert it"
        )
    if settings is not None:
        _check_same_settings(path, {**stored, **model_sizes(config.get_text_config())}, settings)
    return _loader_of(path, config).from_pretrained(path, config=config, **{**where, **kwargs})


def register_loader(config: Any) -> None:
    """Let the Auto classes of a converted model's architecture load models with this kind of configuration."""
    kind = next((suffix for suffix in _AUTO if (config.architectures or [""])[0].endswith(suffix)), None)
    for auto in () if kind is None else _AUTO[kind]:
        auto.register(type(config), _loader_of("config.json", config), exist_ok=True)


def _loader_of(path: Any, config: Any) -> Any:
    kind: Any = type(config)
    converted: Any = kind if PREFIX in kind.__name__ else converted_config(kind)
    return _loader(dense_architecture(path, config), converted)


@functools.cache
def _loader(architecture: Any, config_class: Any) -> Any:
    """A class whose constructor adds the index branch, so that from_pretrained loads its weights like all others.

    Args:
        architecture: the class of the dense model, which several classes of configurations may share.
        config_class: a class of converted configurations.
    """

    def init(self: Any, config: PreTrainedConfig, *args: Any, **options: Any) -> None:
        stored = config.get_text_config().flexmsa
        # Some constructors make an inner model by the Auto class of the configuration, which has to be a dense one.
        dense = copy.deepcopy(config)
        if PREFIX in type(dense).__name__:
            dense.__class__ = type(dense).__bases__[0]
        architecture.__init__(self, dense, *args, **options)
        own = {key: value for key, value in stored.items() if key not in ("layers", "fallback", "warm_up")}
        install(self, msa_config(self, **own), tuple(stored["layers"]), stored["warm_up"])

    def load(cls: Any, path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        config = kwargs.get("config")
        wanted = kwargs.pop("attn_implementation", None) or getattr(config, "_attn_implementation_internal", None)
        dense = None if wanted == IMPLEMENTATION else wanted
        if config is not None:
            kwargs["config"] = config = copy.deepcopy(config)
            config._attn_implementation = dense
        # Weights of other shapes are found below, with a message of their own, unless the user allows them.
        allowed = kwargs.pop("ignore_mismatched_sizes", False)
        how = {"output_loading_info": True, "ignore_mismatched_sizes": True, "attn_implementation": dense}
        model, found = super(kind, cls).from_pretrained(path, *args, **kwargs, **how)
        _check_loaded(path, found, allowed)
        model.__class__ = architecture
        if dense is not None:
            model.set_attn_implementation(dense)
        return (model, found) if output_loading_info else model

    def make(cls: Any, config: Any, **kwargs: Any) -> Any:
        model = super(kind, cls)._from_config(config, **kwargs)
        # As of `load`: the loader is no class that a user, or pickle, knows.
        model.__class__ = architecture
        return model

    own: dict[str, Any] = {
        "__init__": init,
        "__module__": architecture.__module__,
        "_from_config": classmethod(make),
        "config_class": config_class,
        "from_pretrained": classmethod(load),
    }
    # transformers looks up how weights are renamed by the name of the class.
    kind: Any = type(architecture.__name__, (architecture,), own)
    return kind


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


def _check_loaded(path: str | Path, found: dict[str, Any], other_shapes: bool) -> None:
    missing = sorted(name for name in found["missing_keys"] if is_index_weight(name))
    if missing:
        raise ValueError(
            f"{path}: expected the weights of every index branch, but {len(missing)} are missing, such as {missing[0]}"
        )
    if found["mismatched_keys"] and not other_shapes:
        name, there, here = min(found["mismatched_keys"], key=lambda key: (not is_index_weight(key[0]), key))
        # transformers raises a RuntimeError for weights of the dense model.
        error = ValueError if is_index_weight(name) else RuntimeError
        raise error(
            f"{path}: expected weights of the shapes that its config.json asks for, but {name} is {list(there)} there "
            f"and {list(here)} here"
        )
