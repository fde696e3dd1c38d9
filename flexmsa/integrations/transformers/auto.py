"""Converted models under a name of their own, so that transformers' Auto classes load them, or say what they need.

A converted model's config.json has the model type "flexmsa" and the architecture "FlexMSA" + that of the dense model.
`AutoConfig` knows this type once flexmsa.integrations.transformers is imported, and refuses it, by name, where it is
not. In memory the configuration has the dense model's type, which transformers' own code asks for.
"""

import functools
import json
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

__all__ = ["MODEL_TYPE", "PREFIX", "ConvertedConfig", "converted_config", "dense_architecture"]

MODEL_TYPE, PREFIX = "flexmsa", "FlexMSA"
# The dense model's type, in config.json.
_BASE = "base_model_type"


class ConvertedConfig(PreTrainedConfig):
    """What `AutoConfig` makes of a converted model's config.json: a configuration of the dense model's class."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a `converted_config` of the dense model's class."""
        base: Any = CONFIG_MAPPING[config_dict[_BASE]]
        return converted_config(base).from_dict(config_dict, **kwargs)


AutoConfig.register(MODEL_TYPE, ConvertedConfig)


@functools.cache
def converted_config(base: Any) -> Any:
    """The configuration class of converted models whose dense ones have the class `base`, of which it is a subclass."""

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        from flexmsa.integrations.transformers.loading import register_loader

        found = {**config_dict, "model_type": config_dict.get(_BASE, base.model_type)}
        found.pop(_BASE, None)
        made = super(kind, cls).from_dict(found, **kwargs)
        register_loader(made[0] if isinstance(made, tuple) else made)
        return made

    def to_json_string(self: Any, use_diff: bool = True) -> str:
        stored = json.loads(super(kind, self).to_json_string(use_diff))
        names = stored.get("architectures") or []
        stored |= {
            "model_type": MODEL_TYPE,
            _BASE: base.model_type,
            "architectures": [PREFIX + name.removeprefix(PREFIX) for name in names],
        }
        return json.dumps(stored, indent=2, sort_keys=True) + "\n"

    own: dict[str, Any] = {
        # transformers registers no models for configurations of its own modules.
        "__module__": __name__,
        # TRL reads it of every configuration. As it is the class's, it is not saved.
        "auto_map": {},
        "__reduce__": lambda self: (_restore, (base, self.__dict__)),
        "from_dict": classmethod(from_dict),
        "to_json_string": to_json_string,
    }
    kind: Any = type(PREFIX + base.__name__, (base,), own)
    return kind


def _restore(base: Any, state: dict[str, Any]) -> Any:
    config = object.__new__(converted_config(base))
    config.__dict__.update(state)
    return config


def dense_architecture(path: Any, config: PreTrainedConfig) -> Any:
    """The class of the dense model of a converted one.

    Raises:
        ValueError: transformers has none of this name.
    """
    name = (config.architectures or [""])[0].removeprefix(PREFIX)
    found = getattr(transformers, name, None)
    if found is None:
        raise ValueError(f"{path}: expected an architecture of transformers, got {name!r} in its config.json")
    return found
