"""These tests run kernels on CPU tensors: only with TRITON_INTERPRET=1."""

import os

import numpy as np
import pytest
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder

from flexmsa.kernels import workspace
from flexmsa.kernels.triton.serving import launch as decode

# As on a GPU, where a maximum ignores NaN; the interpreter does so since Triton 3.9.
InterpreterBuilder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)

# Without InterpreterOptions.debug, the interpreter computes whether integers overflow and then drops the answer.
assert not interpreter.InterpreterOptions().debug
TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, operation: None

_patch_lang, _restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
_patched = set()


def patch_once(fn):
    """Put the interpreter's functions into what fn sees of the language: once a launch, not at each call within it."""
    seen = frozenset(name for name, module in (("tl", tl), ("core", tl.core)) if _sees(fn, module))
    if seen in _patched:
        return None
    scope = _patch_lang(fn)
    _patched.add(seen)
    return scope


def _sees(fn, module):
    return any(value is module for value in fn.__globals__.values())


def restore(scope):
    """At the end of a launch, whose own patches come first."""
    _patched.clear()
    _restore(scope)


interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_once, restore


def pytest_ignore_collect(collection_path, config):
    return None if os.environ.get("TRITON_INTERPRET") == "1" else True


@pytest.fixture(autouse=True)
def chunks_in_tiles(monkeypatch):
    """As few queries as tests have are enough for the kernels that large chunks of a prompt take."""
    monkeypatch.setattr(decode, "FEW_ROWS", 0)


@pytest.fixture(autouse=True)
def workspace_limit():
    """A test may change the limit of the workspace."""
    before = workspace.workspace_limit()
    yield
    workspace.set_workspace_limit(before)
