"""What the training kernels allocate: the workspace that their docstrings give, and nothing that grows as S x S."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flexmsa
from flexmsa.kernels import triton, workspace
from flexmsa.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation made, and the shapes of all."""

    def __init__(self):
        super().__init__()
        self.bytes, self.shapes = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
                self.shapes.add(tuple(x.shape))
        return result


def train(seqlen, topk):
    q, k, v, index_q, index_k = Case(group_size=3, seqlen_q=seqlen, seqlen_k=seqlen).inputs("cpu")[0]
    ids = None if topk is None else flexmsa.select_blocks(index_q, index_k, block_size=8, topk=topk)
    sequences = torch.tensor([[0, 0, seqlen, 0, seqlen]], dtype=torch.int32)
    # A mode does not reach into an operator: these are the kernels themselves.
    with Largest() as seen:
        out, lse = triton.block_sparse_attention_forward(q, k, v, ids, sequences, 8, 0.3)
        triton.block_sparse_attention_backward(out, None, q, k, v, out, lse, ids, sequences, 8, 0.3)
        triton.index_loss(q, k, index_q, index_k, ids, lse, sequences, 8, 0.3, 0.3, True)
    return seen


@pytest.mark.parametrize("topk", [2, None])
def test_no_tensor_grows_with_the_square_of_the_length(topk):
    workspace.set_workspace_limit(1)
    short, long = (train(seqlen, topk).bytes for seqlen in (32, 96))
    assert long <= 3.3 * short


@pytest.mark.parametrize("size", [1, 20_000, 1 << 30])
def test_partial_results_are_those_of_one_chunk(size):
    workspace.set_workspace_limit(size)
    topk, group_size, head_dim = 2, 3, 16
    tokens = workspace.tokens_per_range(64, topk * group_size * (head_dim * 4 + 4))
    shapes = train(64, topk).shapes
    assert (tokens, topk, group_size, head_dim) in shapes
    assert all(shape[0] <= tokens for shape in shapes if shape[1:] == (topk, group_size, head_dim))


@pytest.mark.parametrize("num_tokens", [1, 16, 1000, 131072])
@pytest.mark.parametrize("bytes_per_token", [1, 100, 70_000])
@pytest.mark.parametrize("size", [1, 10**6, 1 << 30])
def test_chunks_fit_the_workspace(num_tokens, bytes_per_token, size):
    workspace.set_workspace_limit(size)
    tokens = workspace.tokens_per_range(num_tokens, bytes_per_token)
    assert tokens % 16 == 0 and tokens < num_tokens + 16
    assert tokens == 16 or tokens * bytes_per_token <= size + 16 * bytes_per_token
