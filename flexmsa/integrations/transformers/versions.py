"""What flexmsa's wrappers expect of transformers' functions, whose arguments change with its versions."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import transformers
from transformers.cache_utils import Cache

__all__ = ["CACHE", "cache_name", "cache_of", "check_parameters"]

# Stands for any of the cache's names.
CACHE = "cache"
# "past_key_values" up to transformers 5.23; some models have a name of their own.
_CACHE_NAMES = (CACHE, "past_key_values", "layer_past")


def cache_of(arguments: Mapping[str, Any]) -> Cache | None:
    """The cache among keyword arguments, whatever its name.

    >>> cache_of({"past_key_values": None, "use_cache": True}) is None
    True
    """
    given = (arguments.get(name) for name in _CACHE_NAMES)
    return next((cache for cache in given if cache is not None), None)


def cache_name(function: Callable) -> str:
    """The name of the parameter of `function` that takes the cache.

    Raises:
        RuntimeError: it has none that flexmsa knows.

    >>> cache_name(lambda hidden_states, past_key_values=None: hidden_states)
    'past_key_values'
    """
    check_parameters(function, CACHE)
    return next(name for name in _CACHE_NAMES if name in inspect.signature(function).parameters)


def check_parameters(function: Callable, *expected: str) -> None:
    """Raise RuntimeError unless `function` has parameters of these names, in this order, others between them or not.

    flexmsa would otherwise compute without an argument that another version of transformers has renamed.
    """
    got = list(inspect.signature(function).parameters)
    known = iter(CACHE if name in _CACHE_NAMES else name for name in got)
    if not all(name in known for name in expected):
        raise RuntimeError(
            f"{function.__qualname__}: expected the parameters {', '.join(expected)}, got {', '.join(got)}; flexmsa "
            f"does not know transformers {transformers.__version__}: see docs/transformers.md for its versions"
        )
