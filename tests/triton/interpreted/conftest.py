"""These tests run kernels on CPU tensors: only with TRITON_INTERPRET=1."""

import os

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder

from flexmsa.kernels import workspace
from flexmsa.kernels.triton.serving import launch as decode

# As on a GPU, where a maximum ignores NaN; the interpreter does so since Triton 3.9.
InterpreterBuilder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)


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
