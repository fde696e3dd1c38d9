"""flexmsa::index_loss: the KL loss that teaches the index branch, and its closed-form gradient.

Loss and gradient need the same teacher probabilities, which cost most of the time. Therefore the forward operator also
computes the gradient (if `with_grad`), in float32 so that it does not underflow before a loss scale is applied, and the
backward operator multiplies it by the gradient of the loss.
"""

import torch

from .attention import statistics_dtype
from .checks import check_block_indices
from .dispatch import run_kernel
from .library import operator


def _empty_loss_and_grads(
    q, k, index_q, index_k, block_indices, lse, sequences, count, block_size, scale, index_scale, with_grad, backend
):
    dtype = statistics_dtype(q)
    grads = [x.new_empty(x.shape if with_grad else (0,), dtype=dtype) for x in (index_q, index_k)]
    return q.new_empty((), dtype=dtype), *grads


def _empty_grad(grad_loss, unit_grad, dtype):
    return unit_grad.new_empty(unit_grad.shape, dtype=dtype)


@operator("index_loss_backward(Tensor grad_loss, Tensor unit_grad, ScalarType dtype) -> Tensor", fake=_empty_grad)
def index_loss_backward(grad_loss, unit_grad, dtype):
    """Return unit_grad, the gradient for grad_loss = 1, times the scalar `grad_loss`, in `dtype`."""
    return (unit_grad * grad_loss).to(dtype, copy=True)


def scaled_gradient(grad_loss, unit_grad, dtype):
    """`index_loss_backward`, through which no second backward passes without an error: unit_grad is no constant."""
    if torch.is_grad_enabled():
        unit_grad = unit_grad.detach().requires_grad_()
    return index_loss_backward(grad_loss, unit_grad, dtype)


def _setup_context(ctx, inputs, output):
    _, _, index_q, index_k, *_, ctx.with_grad, _ = inputs
    _, grad_index_q, grad_index_k = output
    ctx.dtypes = index_q.dtype, index_k.dtype
    ctx.save_for_backward(grad_index_q, grad_index_k)
    ctx.mark_non_differentiable(grad_index_q, grad_index_k)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss, *_):
    if grad_loss is None:
        return (None,) * 13
    if not ctx.with_grad:
        raise RuntimeError("index_loss: expected with_grad=True to compute a gradient, got with_grad=False")
    grads = [
        scaled_gradient(grad_loss, unit_grad, dtype) if needed else None
        for unit_grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[2:4], strict=True)
    ]
    return (None, None, *grads, *(None,) * 9)


@operator(
    "index_loss(Tensor q, Tensor k, Tensor index_q, Tensor index_k, Tensor? block_indices, Tensor lse, "
    "Tensor sequences, Tensor? count, int block_size, float scale, float index_scale, bool with_grad, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_empty_loss_and_grads,
    backward=_backward,
    setup_context=_setup_context,
    cast=4,
)
def index_loss(
    q, k, index_q, index_k, block_indices, lse, sequences, count, block_size, scale, index_scale, with_grad, backend
):
    """Return the scalar loss and its gradients for index_q and index_k (empty unless `with_grad`).

    count: a scalar by which the sum of the losses is divided; None is the number of them.
    """
    if block_indices is not None:
        check_block_indices(block_indices, -(-k.shape[2] // block_size))
    branches = q, k, index_q, index_k, block_indices, lse, sequences
    return run_kernel(backend, "index_loss", *branches, block_size, scale, index_scale, with_grad, count)
