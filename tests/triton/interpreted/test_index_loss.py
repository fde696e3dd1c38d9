"""The fused index loss and its gradient against the dense definition in float64 and its autograd."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
import triton
import triton.language as tl
from helpers import hide_unowned, plain

from flexmsa import reference
from flexmsa.kernels.sequences import key_ranges
from flexmsa.kernels.triton import (
    attention_and_index_loss_backward,
    block_sparse_attention_backward,
    block_sparse_attention_forward,
)
from flexmsa.kernels.triton.loss.config import LossConfig
from flexmsa.kernels.triton.loss.gradient import fast_log2
from flexmsa.kernels.triton.loss.launch import index_loss
from flexmsa.kernels.workspace import set_workspace_limit
from flexmsa.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@triton.jit
def log2_kernel(x_ptr, out_ptr, count, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    x = tl.load(x_ptr + place, mask=place < count, other=1.0)
    tl.store(out_ptr + place, fast_log2(x), mask=place < count)


SMALL = LossConfig(rows=16, columns=16, num_warps=4, num_stages=1)


@dataclass(frozen=True)
class Case:
    """Shapes of a test; `table` holds the sequences, of a plain batch if None; topk None: every visible block."""

    groups: int = 2
    group_size: int = 3
    seqlen_q: int = 24
    seqlen_k: int = 24
    head_dim: int = 16
    index_dim: int = 16
    block_size: int = 16
    topk: int | None = 2
    table: tuple | None = None
    batch: int = 1
    dtype: torch.dtype = torch.float32
    stretch: float = 1.0


CASES = {
    "one head": Case(group_size=1, batch=2),
    "sixteen heads": Case(groups=1, group_size=16, index_dim=32),
    "odd sizes": Case(group_size=5, head_dim=80, index_dim=32, block_size=48, seqlen_q=70, seqlen_k=70),
    "small blocks": Case(block_size=5, topk=3),
    "large blocks": Case(block_size=100, seqlen_q=130, seqlen_k=130, groups=1, group_size=2, topk=1),
    "packed": Case(table=((0, 0, 1, 0, 1), (0, 1, 15, 1, 15), (0, 15, 16, 15, 16), (0, 16, 24, 16, 24)), block_size=5),
    "left padding": Case(table=((0, 0, 24, 7, 24), (1, 0, 24, 0, 24)), batch=2),
    "cache": Case(seqlen_q=5, seqlen_k=60, table=((0, 0, 5, 0, 41), (1, 0, 5, 13, 60)), batch=2, topk=3),
    "no keys": Case(seqlen_q=4, seqlen_k=20, table=((0, 0, 4, 3, 3),)),
    "far teacher": Case(stretch=12.0, index_dim=32),
    "half": Case(dtype=torch.float16, group_size=4, index_dim=32),
    "warm-up": Case(topk=None, batch=2, block_size=5),
    "warm-up, packed": Case(topk=None, table=((0, 0, 1, 0, 1), (0, 1, 17, 1, 17), (0, 17, 24, 17, 24)), block_size=5),
}


def inputs_of(case):
    """(q, k, index_q, index_k, block_indices, sequences), NaN in the keys of no sequence."""
    sequences = torch.tensor(case.table or plain(case.batch, case.seqlen_q, case.seqlen_k).tolist()).int()
    heads = (case.groups * case.group_size, case.groups, case.groups, 1)
    lengths = (case.seqlen_q, case.seqlen_k) * 2
    dims = (case.head_dim, case.head_dim, case.index_dim, case.index_dim)
    q, k, index_q, index_k = (
        torch.randn(case.batch, h, s, d).to(case.dtype) for h, s, d in zip(heads, lengths, dims, strict=True)
    )
    k, index_k = hide_unowned(sequences, k, index_k)
    blocks = -(-case.seqlen_k // case.block_size)
    ids = None
    if case.topk is not None:
        ids = torch.randint(-1, blocks + 1, (case.batch, case.groups, case.seqlen_q, case.topk + 2)).int()
        ids[..., 0] = torch.randint(-(2**31), 2**31, ids.shape[:3]).int()
    return q * case.stretch, k, index_q, index_k, ids, sequences


def wanted(inputs, block_size, scales, dtype):
    """lse, and the loss with its gradients, of the definition in `dtype`."""
    q, k, index_q, index_k, ids, sequences = inputs
    work = torch.float64 if dtype == torch.float64 else q.dtype
    q, k, index_q, index_k = (x.to(work).nan_to_num() for x in (q, k, index_q, index_k))
    leaves = index_q.requires_grad_(), index_k.requires_grad_()
    start, end = key_ranges(sequences, q.shape[0], q.shape[2])
    _, lse = reference.block_sparse_attention(q, k, k, ids, start, end, block_size, scales[0], dtype)
    loss = reference.index_loss(q, k, *leaves, ids, start, end, block_size, *scales, dtype)
    return lse, (loss.detach(), *(x.to(loss.dtype) for x in torch.autograd.grad(loss, leaves)))


def assert_loss(inputs, block_size, config, scales=None):
    """Compare value and gradients by the rule of every test; returns what was found."""
    q, k, index_q, index_k, ids, sequences = inputs
    scales = scales or (q.shape[3] ** -0.5, index_q.shape[3] ** -0.5)
    lse, exact = wanted(inputs, block_size, scales, torch.float64)
    _, eager = wanted(inputs, block_size, scales, q.dtype)
    lse = lse.float()
    found = index_loss(q, k, index_q, index_k, ids, lse, sequences, block_size, *scales, True, config=config)
    rows = max(1, int(lse.isfinite().sum()) * k.shape[1] // q.shape[1])
    largest = [scales[1] / rows * float(x.nan_to_num().abs().max()) for x in (index_k, index_q)]
    terms = {"loss": math.log(1 + k.shape[2]), "index_q": largest[0], "index_k": largest[1]}
    for name, result, right, baseline in zip(terms, found, exact, eager, strict=True):
        assert result.dtype == torch.float32 and result.is_contiguous()
        assert_close(name, result, right, baseline, terms[name])
    value, *empty = index_loss(q, k, index_q, index_k, ids, lse, sequences, block_size, *scales, False, config=config)
    assert torch.equal(value, found[0]) and all(x.numel() == 0 for x in empty)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("config", [None, replace(SMALL, length=20)], ids=["chosen", "work items"])
def test_loss_and_gradient(case, config):
    assert_loss(inputs_of(case), case.block_size, config)


@pytest.mark.parametrize("topk", [3, None])
def test_token_ranges(topk):
    set_workspace_limit(1)
    case = Case(seqlen_q=40, seqlen_k=40, batch=2, block_size=20, topk=topk)
    assert_loss(inputs_of(case), 20, replace(SMALL, length=7))


def assert_loss_beside_backward(case, wide_index_grad=2.0):
    """The loss that takes its teacher from the backward is right, and leaves the backward's own gradients alone."""
    inputs = inputs_of(case)
    q, k, index_q, index_k, ids, sequences = inputs
    v, scales = torch.randn_like(k.nan_to_num()), (q.shape[3] ** -0.5, index_q.shape[3] ** -0.5)
    _, exact = wanted(inputs, case.block_size, scales, torch.float64)
    _, eager = wanted(inputs, case.block_size, scales, q.dtype)
    out, lse = block_sparse_attention_forward(q, k, v, ids, sequences, case.block_size, scales[0])
    grad_out, grad_loss = torch.randn_like(out), torch.tensor(wide_index_grad)
    main = q, k, v, index_q, index_k, out, lse, ids, sequences, case.block_size
    *grads, loss = attention_and_index_loss_backward(grad_out, lse.cos(), (grad_loss, None), *main, *scales)
    alone = block_sparse_attention_backward(
        grad_out, lse.cos(), q, k, v, out, lse, ids, sequences, case.block_size, scales[0]
    )
    # The teacher takes room in the workspace, so that token ranges, and the order of sums, may differ.
    torch.testing.assert_close(grads[:3], list(alone))
    rows = max(1, int(lse.isfinite().sum()) * k.shape[1] // q.shape[1])
    largest = [scales[1] / rows * float(x.nan_to_num().abs().max()) for x in (index_k, index_q)]
    terms = {"loss": math.log(1 + k.shape[2]), "index_q": largest[0], "index_k": largest[1]}
    found = loss, *(grad / grad_loss for grad in grads[3:])
    for name, result, right, baseline in zip(terms, found, exact, eager, strict=True):
        assert_close(name, result, right, baseline.to(result.dtype), terms[name])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.topk is not None])
def test_teacher_from_the_backward(name):
    assert_loss_beside_backward(CASES[name])


@pytest.mark.parametrize("limit", [1, 1 << 16])
@pytest.mark.parametrize("group_size", [1, 2, 7, 40])
def test_teacher_in_passes(limit, group_size):
    set_workspace_limit(limit)
    assert_loss_beside_backward(Case(groups=2, group_size=group_size, block_size=8), 0.25)


def test_strides():
    inputs = inputs_of(Case(batch=2))
    *tensors, sequences = inputs
    shuffled = [x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0) for x in tensors]
    assert_loss((*shuffled, sequences), 16, SMALL)


def test_no_visible_key():
    loss, *grads = assert_loss(inputs_of(CASES["no keys"]), 16, None)
    assert loss == 0 and all((x == 0).all() for x in grads)


def test_scales_and_repetition():
    inputs = inputs_of(Case(batch=2))
    first, second = (assert_loss(inputs, 16, SMALL, (0.03, 2.5)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_fast_log2():
    x = torch.cat([torch.rand(4096) * 2 + 2**-20, 2.0 ** torch.arange(-126, 127), torch.tensor([2 / 3, 4 / 3])])
    found = torch.empty_like(x)
    log2_kernel[(1,)](x, found, x.numel(), SIZE=8192)
    torch.testing.assert_close(found.double(), x.double().log2(), rtol=1e-7, atol=1.6e-7)
    assert found[x == 1.0] == 0.0


@pytest.mark.parametrize("count", [torch.tensor(7), torch.tensor(12.5, dtype=torch.float64)])
def test_a_given_count(count):
    q, k, index_q, index_k, ids, sequences = inputs_of(Case(batch=2))
    v, numbers = torch.randn_like(k.nan_to_num()), (16, 0.3, 0.3)
    out, lse = block_sparse_attention_forward(q, k, v, ids, sequences, *numbers[:2])
    factor = 2 * 2 * q.shape[2] / count.item()
    tensors = q, k, index_q, index_k, ids, lse, sequences
    for number, mean in zip(
        index_loss(*tensors, *numbers, True, count), index_loss(*tensors, *numbers, True), strict=True
    ):
        torch.testing.assert_close(number, mean * factor)
    main = q, k, v, index_q, index_k, out, lse, ids, sequences, *numbers
    one = torch.ones(())
    counted = attention_and_index_loss_backward(out, None, (one, count), *main)
    default = attention_and_index_loss_backward(out, None, (one, None), *main)
    for number, mean in zip(counted[3:], default[3:], strict=True):
        torch.testing.assert_close(number, mean * factor)
