"""A pytest plugin for transformers' own tests, which `python -m benchmarks.transformers_tests` loads.

With `--flexmsa-model` every model that a test makes attends through flexmsa, unless the test names an implementation.
"""

import functools
import importlib
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from flexmsa.integrations.transformers import convert, msa_config, register, set_warm_up
from flexmsa.integrations.transformers.attention import IMPLEMENTATION, register_attention
from flexmsa.integrations.transformers.convert import install

# Of a converted model: most tests have some 10 to 60 tokens, of which a query then sees 8.
SETTINGS = {"block_size": 4, "topk": 2}
MODULES = {"m3": "minimax_m3_vl", "qwen3": "qwen3"}
SECONDS = 300
_calls = 0
_depth = 0


def pytest_addoption(parser: Any) -> None:
    """Add the options of this plugin."""
    parser.addoption("--flexmsa-model", choices=sorted(MODULES), help="let the models of this module use flexmsa")
    parser.addoption("--flexmsa-results", help="a file to which each test's outcome is appended, as JSON")


def pytest_configure(config: Any) -> None:
    """Change the models, in each process that runs tests."""
    name = config.getoption("--flexmsa-model")
    if name is not None:
        _change_models(name)


def _change_models(name: str) -> None:
    register() if name == "m3" else register_attention()
    attend = ALL_ATTENTION_FUNCTIONS[IMPLEMENTATION]

    @functools.wraps(attend)
    def counting(*args: Any, **kwargs: Any) -> Any:
        global _calls
        # A graph would depend on the number.
        if not torch.compiler.is_compiling():
            _calls += 1
        return attend(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, counting)
    module = importlib.import_module(f"transformers.models.{MODULES[name]}.modeling_{MODULES[name]}")
    for kind in list(vars(module).values()):
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel) and kind.__module__ == module.__name__:
            kind.__init__ = _init(kind.__init__, prepare=name == "m3")  # type: ignore[method-assign]


def _init(init: Callable, prepare: bool) -> Callable:
    """Wrap a model's `__init__`: models within another are left to the outer one."""

    @functools.wraps(init)
    def wrapped(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        global _depth
        # flexmsa's own loader makes models of a subclass, and converts them.
        is_plain = getattr(sys.modules[type(self).__module__], type(self).__name__) is type(self)
        texts = config, config.get_text_config()
        free = _depth == 0 and is_plain and all(x._attn_implementation_internal is None for x in texts)
        _depth += 1
        try:
            if free and prepare:
                config._attn_implementation = IMPLEMENTATION
            init(self, config, *args, **kwargs)
        finally:
            _depth -= 1
        if free and not prepare:
            _convert(self)
            # The model has a copy; another model of this configuration is free too.
            config._attn_implementation_internal = None

    return wrapped


def _convert(model: Any) -> None:
    stored = getattr(model.config, "flexmsa", None)
    if stored is None:
        convert(model, SETTINGS)
        set_warm_up(model, False)
    else:
        own = {name: value for name, value in stored.items() if name not in ("layers", "fallback", "warm_up")}
        install(model, msa_config(model, **own), tuple(stored["layers"]), stored["warm_up"])


def _stop(*_: Any) -> None:
    raise TimeoutError(f"the test took more than {SECONDS} seconds")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Count the calls of flexmsa's attention, and stop a test that hangs."""
    before = _calls
    signal.signal(signal.SIGALRM, _stop)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        item.user_properties.append(("calls", _calls - before))


def pytest_runtest_logreport(report: Any) -> None:
    """Append an outcome to the results."""
    path = _results_path()
    if path is None or (report.when != "call" and report.outcome == "passed"):
        return
    crash = getattr(report.longrepr, "reprcrash", None)
    message = (crash.message if crash is not None else str(report.longrepr or "")).strip() or "?"
    found = {
        "test": report.nodeid.partition("::")[2],
        "outcome": report.outcome,
        "error": message.splitlines()[0] if report.outcome == "failed" else None,
        "calls": dict(report.user_properties).get("calls", 0),
    }
    with path.open("a") as file:
        file.write(json.dumps(found) + "\n")


def _results_path() -> Path | None:
    """The file of results; None in a process that xdist started, which sends its reports."""
    given = [x for x in sys.argv if x.startswith("--flexmsa-results=")]
    return Path(given[-1].partition("=")[2]) if given else None
