"""Tensors whose elements lie more than 2^31 elements apart: offsets have to be 64 bits wide."""

import mmap

import pytest
import torch

from flexmsa.kernels import triton
from flexmsa.kernels.rules import SelectionRule

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")

SEQLEN, STRIDE = 20, 2**27


def far_apart(x):
    """x [1, H, S, D] in memory of which only the touched pages exist, its tokens STRIDE elements apart."""
    size = (SEQLEN * STRIDE + x.numel()) * x.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    storage = torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=x.dtype)
    wide = storage.as_strided(x.shape, (0, x.shape[3], STRIDE, 1))
    return wide.copy_(x)


def test_offsets_beyond_31_bits():
    q, k, v, grad = (torch.randn(1, heads, SEQLEN, 16).half() for heads in (4, 2, 2, 4))
    index_q, index_k = torch.randn(1, 2, SEQLEN, 16).half(), torch.randn(1, 1, SEQLEN, 16).half()
    sequences = torch.tensor([[0, 0, SEQLEN, 0, SEQLEN]], dtype=torch.int32)

    def train(q, k, v, grad, index_q, index_k):
        ids = triton.select_blocks(index_q, index_k, sequences, SelectionRule(4, 2))
        out, lse = triton.block_sparse_attention_forward(q, k, v, ids, sequences, 4, 0.3)
        grads = triton.block_sparse_attention_backward(grad, None, q, k, v, out, lse, ids, sequences, 4, 0.3)
        dense = triton.block_sparse_attention_forward(q, k, v, None, sequences, 4, 0.3)
        loss = triton.index_loss(q, k, index_q, index_k, ids, lse, sequences, 4, 0.3, 0.3, True)
        return [ids, out, lse, *grads, *dense, *loss]

    near = (q, k, v, grad, index_q, index_k)
    for found, expected in zip(train(*map(far_apart, near)), train(*near), strict=True):
        assert torch.equal(found, expected)
