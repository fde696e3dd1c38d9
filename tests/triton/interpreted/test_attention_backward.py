"""The backward of block-sparse attention against autograd of the dense definition in float64."""

from dataclasses import replace

import pytest
import torch
from helpers import dense_attention, hide_unowned, plain, visible

from flexmsa.kernels import workspace
from flexmsa.kernels.triton.backward.config import BackwardConfig
from flexmsa.kernels.triton.backward.launch import block_sparse_attention_backward
from flexmsa.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TILES = BackwardConfig(rows=16, columns=32, num_warps=4, num_stages=1, length=6, swap=False)
PACKED = [[0, 0, 1, 0, 1], [0, 1, 30, 1, 30], [0, 30, 47, 30, 47]]
PADDED = [[0, 0, 40, 7, 40], [1, 0, 40, 0, 40]]
CACHE = [[0, 0, 7, 5, 90], [1, 0, 7, 0, 3]]
CASES = {
    # name: (Hkv, G, Sq, Sk, D, block_size, topk or None, sequences or None, dtype)
    "one head": (2, 1, 40, 40, 16, 16, 3, None, torch.float32),
    "packed": (1, 3, 47, 47, 80, 16, 2, PACKED, torch.float32),
    "left padding": (2, 5, 40, 40, 16, 5, 4, PADDED, torch.float32),
    "cache": (1, 16, 7, 96, 16, 48, 2, CACHE, torch.float32),
    "half": (1, 8, 40, 40, 16, 16, 3, PADDED, torch.float16),
    "dense": (2, 3, 40, 40, 16, 16, None, None, torch.float32),
    "dense packed": (1, 8, 47, 47, 16, 16, None, PACKED, torch.float32),
}


class Problem:
    """A case's tensors, NaN in the keys that no sequence owns, and what the backward should give."""

    def __init__(self, case, use_grad_lse=True):
        groups, group_size, seqlen_q, seqlen_k, head_dim, self.block_size, topk, table, dtype = case
        batch = 2 if table is None else 1 + max(row[0] for row in table)
        self.sequences = torch.tensor(table, dtype=torch.int32) if table else plain(batch, seqlen_q, seqlen_k)
        self.scale = head_dim**-0.5
        rows = (batch, groups * group_size, seqlen_q)
        self.q, self.grad_out = (torch.randn(*rows, head_dim).to(dtype) for _ in range(2))
        self.k, self.v = (torch.randn(batch, groups, seqlen_k, head_dim).to(dtype) for _ in range(2))
        self.grad_lse = torch.randn(rows) if use_grad_lse else None
        self.ids = None
        if topk is not None:
            blocks = -(-seqlen_k // self.block_size)
            self.ids = torch.randint(-1, blocks + 1, (batch, groups, seqlen_q, topk), dtype=torch.int32)
            self.ids[..., 0] = 0
        self.exact = self.solve(torch.float64)
        self.baseline = self.solve(dtype)
        self.out, self.lse = self.exact[0].to(dtype), self.exact[1].float()
        self.k, self.v = hide_unowned(self.sequences, self.k, self.v)

    def solve(self, dtype):
        """(out, lse, grad_q, grad_k, grad_v) by autograd, computed in dtype."""
        inputs = [x.to(dtype).requires_grad_() for x in (self.q, self.k, self.v)]
        out, lse = dense_attention(*inputs, self.ids, self.sequences, self.block_size, self.scale, dtype)
        loss = (out * self.grad_out.to(out.dtype)).sum()
        if self.grad_lse is not None:
            loss = loss + (lse.masked_fill(lse == -torch.inf, 0.0) * self.grad_lse.to(lse.dtype)).sum()
        return out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)

    def run(self, config=None, change=lambda x: x):
        return block_sparse_attention_backward(
            change(self.grad_out),
            None if self.grad_lse is None else change(self.grad_lse),
            *map(change, (self.q, self.k, self.v, self.out, self.lse)),
            None if self.ids is None else change(self.ids),
            self.sequences,
            self.block_size,
            self.scale,
            config,
        )

    def check(self, grads):
        start, end = visible(self.sequences, *self.q.shape[::2])
        blind = (end <= start)[:, None, :, None].expand_as(self.q)
        assert (grads[0][blind] == 0).all()
        for name, grad, exact, baseline in zip("qkv", grads, self.exact[2:], self.baseline[2:], strict=True):
            assert grad.is_contiguous() and grad.dtype == self.q.dtype
            assert_close(f"grad_{name}", grad, exact, baseline)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("use_grad_lse", [True, False], ids=["grad_lse", "no grad_lse"])
def test_gradients(case, use_grad_lse):
    problem = Problem(case, use_grad_lse)
    problem.check(problem.run(TILES))


@pytest.mark.parametrize("name", ["packed", "half", "dense"])
def test_token_ranges_and_work_items(name):
    workspace.set_workspace_limit(1)
    problem = Problem(CASES[name])
    chunked = problem.run(TILES)
    problem.check(chunked)
    assert all(map(torch.equal, chunked, problem.run(TILES)))
    workspace.set_workspace_limit(1 << 30)
    whole = problem.run(replace(TILES, length=1000))
    problem.check(whole)
    # A query's gradient is the sum of the same numbers in the same order, however the rest is cut.
    assert torch.equal(chunked[0], whole[0])


def test_a_short_last_range_stays_within_the_workspace():
    # Room for 18 tokens of one group: ranges of 16, 16 and 8 tokens, of which the last alone would leave room for three
    # groups at a time.
    workspace.set_workspace_limit(18 * 5 * 128 + 320)
    problem = Problem((5, 2, 40, 40, 16, 8, None, [[0, 0, 40, 0, 40]], torch.float32))
    problem.check(problem.run(TILES))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("left padding", None),
        ("one head", replace(TILES, rows=32, swap=True)),
        ("cache", replace(TILES, columns=16, length=1)),
    ],
)
def test_tiles(name, config):
    problem = Problem(CASES[name])
    problem.check(problem.run(config))


def test_strides():
    problem = Problem(CASES["left padding"])
    wanted = problem.run(TILES)

    def shuffled(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    assert all(map(torch.equal, problem.run(TILES, shuffled), wanted))
    summed = torch.ones_like(problem.grad_out[..., :1, :1]).expand_as(problem.grad_out)
    problem.grad_out = summed
    expanded = problem.run(TILES)
    problem.grad_out = summed.contiguous()
    assert all(map(torch.equal, problem.run(TILES), expanded))


@pytest.mark.parametrize(("seqlen_q", "seqlen_k", "topk"), [(0, 8, 2), (3, 0, 2), (3, 8, 0)])
def test_nothing_to_do(seqlen_q, seqlen_k, topk):
    q = torch.randn(1, 2, seqlen_q, 16)
    k = torch.randn(1, 1, seqlen_k, 16)
    ids = torch.zeros(1, 1, seqlen_q, topk, dtype=torch.int32)
    sequences = torch.tensor([[0, 0, seqlen_q, 0, seqlen_k]], dtype=torch.int32)
    lse = torch.full((1, 2, seqlen_q), -float("inf"))
    grads = block_sparse_attention_backward(q, None, q, k, k, q, lse, ids, sequences, 8, 0.25)
    assert all(grad.shape == x.shape and (grad == 0).all() for grad, x in zip(grads, (q, k, k), strict=True))
