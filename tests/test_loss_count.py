"""The sum and the count of the index loss, and a count that is given."""

import math

import pytest
import torch

import flexmsa
from flexmsa import AuxRequest, MSAConfig, MSAttention, attention

SETTINGS = {"block_size": 4, "topk": 2}
SEQUENCES = {
    "whole": {},
    "packed": {"cu_seqlens": torch.tensor([0, 7, 21], dtype=torch.int32)},
    "padded": {"kv_starts": torch.tensor([5], dtype=torch.int32)},
    "part filled": {"kv_lens": torch.tensor([30], dtype=torch.int32)},
}


def inputs(seqlen_q=21, seqlen_k=21, dtype=torch.float64):
    torch.manual_seed(0)
    sizes = ((4, seqlen_q), (2, seqlen_k), (2, seqlen_k), (2, seqlen_q), (1, seqlen_k))
    return [torch.randn(1, heads, n, 8, dtype=dtype, requires_grad=True) for heads, n in sizes]


def visible(name):
    """Groups and queries that see a key."""
    return 2 * {"whole": 21, "packed": 21, "padded": 16, "part filled": 21}[name]


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_sum_is_the_mean_times_the_count(name, backend):
    tensors = inputs(seqlen_k=40 if name == "part filled" else 21)
    request = AuxRequest(index_loss=True, index_loss_sum=True)
    _, aux = attention(*tensors, **SETTINGS, **SEQUENCES[name], return_aux=request, backend=backend)
    assert aux.index_loss_count.item() == visible(name)
    torch.testing.assert_close(aux.index_loss_sum, aux.index_loss * visible(name), rtol=1e-14, atol=0)
    default = attention(*tensors, **SETTINGS, **SEQUENCES[name], return_aux=AuxRequest(index_loss=True))[1]
    torch.testing.assert_close(aux.index_loss, default.index_loss, rtol=1e-12, atol=0)
    assert default.index_loss_sum is None and default.index_loss_count is None


def test_a_sum_has_the_dtype_of_the_loss():
    tensors = [x.float() for x in inputs(seqlen_k=21)]
    _, aux = attention(*tensors, **SETTINGS, return_aux=AuxRequest(index_loss_sum=True), index_loss_count=48)
    assert aux.index_loss_sum.dtype == torch.float32


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("count", [100, 12.5, torch.tensor(7)])
def test_a_given_count_divides_value_and_gradient(deferred, count):
    def loss_and_gradients(number):
        tensors, value = inputs(), torch.tensor(math.nan, dtype=torch.float64)
        extra = {"index_loss_value": value if deferred else None, "index_loss_count": number}
        out, aux = attention(*tensors, **SETTINGS, **extra, return_aux=AuxRequest(index_loss=True))
        grads = torch.autograd.grad((out.sum(), aux.index_loss), tensors)
        return (value if deferred else aux.index_loss), grads

    (loss, grads), (mean, mean_grads) = loss_and_gradients(count), loss_and_gradients(None)
    factor = visible("whole") / float(count)
    torch.testing.assert_close(loss, mean * factor, rtol=1e-12, atol=0)
    for grad, want in zip(grads, (*mean_grads[:3], *(x * factor for x in mean_grads[3:])), strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-12, atol=1e-14)


def test_micro_batches_of_unequal_lengths_add_up():
    config = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8, index_head_dim=8, **SETTINGS)
    torch.manual_seed(0)
    layer = MSAttention(config).double()
    batches = [torch.randn(1, n, 32, dtype=torch.float64) for n in (5, 24)]
    total = sum(layer.index_loss_count(x) for x in batches)
    losses = [layer(x, index_loss_count=total)[1] for x in batches]
    cu_seqlens = torch.tensor([0, 5, 29], dtype=torch.int32)
    together = layer(torch.cat(batches, dim=1), cu_seqlens=cu_seqlens)[1]
    torch.testing.assert_close(sum(losses), together, rtol=1e-12, atol=0)
    assert layer.index_loss_count(torch.cat(batches, dim=1), cu_seqlens=cu_seqlens) == total


def test_the_loss_alone_and_compiled():
    q, k, v, index_q, index_k = inputs()
    request = AuxRequest(lse=True, block_indices=True, index_loss_sum=True)
    whole = torch.compile(lambda *x: attention(*x, **SETTINGS, return_aux=request)[1], fullgraph=True, backend="eager")
    aux = whole(q, k, v, index_q, index_k)
    alone = flexmsa.index_loss(q, k, index_q, index_k, aux.block_indices, aux.lse, block_size=4, count=1)
    torch.testing.assert_close(alone, aux.index_loss_sum, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("count", "error", "message"),
    [
        (0, ValueError, "index_loss_count: expected a number > 0, got 0"),
        ("3", TypeError, "index_loss_count: expected a number or a scalar tensor, got str"),
        (torch.ones(2), ValueError, r"got torch.float32 \[2\]"),
        (torch.tensor(1.0, requires_grad=True), ValueError, "requires_grad=True"),
        (torch.tensor(1.0).half(), ValueError, "got torch.float16"),
    ],
)
def test_counts_that_are_refused(count, error, message):
    with pytest.raises(error, match=message):
        attention(*inputs(), **SETTINGS, return_aux=AuxRequest(index_loss=True), index_loss_count=count)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("deferred", [False, True])
def test_a_count_of_zero_is_that_of_padding_alone(backend, deferred):
    tensors, value = [x.requires_grad_() for x in inputs()], torch.full((), torch.nan)
    padding = {"kv_starts": torch.tensor([tensors[1].shape[2]], dtype=torch.int32), "backend": backend}
    extra = {"index_loss_count": torch.tensor(0), "index_loss_value": value if deferred else None}
    out, aux = attention(*tensors, **SETTINGS, **padding, **extra, return_aux=AuxRequest(index_loss=True))
    (out.sum() + aux.index_loss).backward()
    assert aux.index_loss == 0 and (not deferred or value == 0)
    assert all(x.grad is None or not x.grad.isnan().any() for x in tensors)


def test_rows_of_padding_count_nothing():
    kv_starts = torch.tensor([21], dtype=torch.int32)
    request = AuxRequest(index_loss=True, index_loss_sum=True)
    _, aux = attention(*inputs(), **SETTINGS, kv_starts=kv_starts, return_aux=request)
    assert aux.index_loss_count == 0 and aux.index_loss_sum == 0 and aux.index_loss == 0
