"""These tests run kernels on CPU tensors: only in a process started by ../test_interpreted.py."""

import os
from dataclasses import astuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import visible
from triton.runtime.interpreter import InterpreterBuilder

from flexmsa import reference
from flexmsa.kernels.triton.serving import launch as decode

# As on a GPU, where a maximum ignores NaN; the interpreter does so since Triton 3.9.
InterpreterBuilder.create_maxnumf = lambda self, left, right: self.binary_op(left, right, np.fmax)


def pytest_ignore_collect(collection_path, config):
    return None if os.environ.get("TRITON_INTERPRET") == "1" else True


def select(index_q, index_k, sequences, rule):
    start, end = visible(sequences, index_q.shape[0], index_q.shape[2])
    return reference.select_blocks(index_q, index_k, start, end, *astuple(rule))


def attend(q, k, v, block_indices, sequences, block_size, scale):
    start, end = visible(sequences, q.shape[0], q.shape[2])
    q, k, v = q.double(), k.double(), v.double()
    return reference.block_sparse_attention(q, k, v, block_indices, start, end, block_size, scale)


def plain(batch, seqlen_q, seqlen_k):
    """The table of an unpacked batch."""
    return torch.tensor([[b, 0, seqlen_q, 0, seqlen_k] for b in range(batch)], dtype=torch.int32)


@pytest.fixture
def dense():
    """The dense definitions, taking the kernels' table of sequences."""
    return SimpleNamespace(select=select, attend=attend, plain=plain)


@pytest.fixture(autouse=True)
def chunks_in_tiles(monkeypatch):
    """As few queries as tests have are enough for the kernels that large chunks of a prompt take."""
    monkeypatch.setattr(decode, "FEW_ROWS", 0)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
