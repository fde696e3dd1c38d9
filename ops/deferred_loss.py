"""The index loss in the backward: the forward returns a 0 with the loss's gradient, the backward computes the rest.

The backward of the main branch recomputes the probabilities that are the loss's teacher, so that the loss costs little
there, and under activation checkpointing the forward that is thrown away computes none. The exact value of the loss is
written to the tensor `value`.

- flexmsa::attention_and_index_loss: `block_sparse_attention` and the loss of the same blocks;
- flexmsa::deferred_index_loss: the loss alone, where another operator attends (the dense warm-up).
"""

import torch

from .attention import block_sparse_attention_backward, empty_out_and_lse, statistics_dtype
from .checks import check_block_indices
from .dispatch import run_kernel
from .index_loss import index_loss, scaled_gradient
from .library import operator


def _loss_gradients(value, grad_loss, needed, branches, count, numbers):
    """Write the loss to `value`; return the gradients of index_q and index_k, each if `needed` says so."""
    *scales, backend = numbers
    loss, *unit_grads = index_loss(*branches, count, *scales, True, backend)
    value.copy_(loss.detach())
    return [
        scaled_gradient(grad_loss, unit_grad, x.dtype) if is_needed else None
        for unit_grad, x, is_needed in zip(unit_grads, branches[2:4], needed, strict=True)
    ]


def _empty_gradients_and_loss(grad_out, grad_lse, grad_loss, q, k, v, index_q, index_k, *_):
    gradients = [x.new_empty(x.shape) for x in (q, k, v, index_q, index_k)]
    return *gradients, q.new_empty((), dtype=statistics_dtype(q))


@operator(
    "attention_and_index_loss_backward(Tensor grad_out, Tensor? grad_lse, Tensor grad_loss, Tensor q, Tensor k, "
    "Tensor v, Tensor index_q, Tensor index_k, Tensor out, Tensor lse, Tensor block_indices, Tensor sequences, "
    "Tensor? count, int block_size, float scale, float index_scale, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_empty_gradients_and_loss,
    cast=0,
)
def attention_and_index_loss_backward(*args):
    """Return the gradients of q, k, v, index_q and index_k, and the loss; the schema names the arguments."""
    grad_out, grad_lse, grad_loss, *inputs, count, block_size, scale, index_scale, backend = args
    gradients, numbers = (grad_out, grad_lse, (grad_loss, count)), (block_size, scale, index_scale)
    return run_kernel(backend, "attention_and_index_loss_backward", *gradients, *inputs, *numbers)


# The value is kept on ctx: it is written by the backward, and a saved tensor must not change after the forward.
def _setup_attention(ctx, inputs, output):
    *tensors, block_indices, sequences, count, ctx.value, block_size, scale, index_scale, backend = inputs
    ctx.numbers = block_size, scale, index_scale, backend
    ctx.save_for_backward(*tensors, *output[:2], block_indices, sequences, count)
    ctx.set_materialize_grads(False)


def _attention_backward(ctx, grad_out, grad_lse, grad_loss):
    # Read once: checkpointing refuses a second time.
    saved = ctx.saved_tensors
    q, k, v, index_q, index_k, out, lse, ids, sequences, count = saved
    block_size, scale, _, backend = ctx.numbers
    needs = ctx.needs_input_grad
    with_loss = grad_loss is not None and any(needs[3:5])
    with_main = (grad_out is not None or grad_lse is not None) and any(needs[:3])
    main, index = [None] * 3, [None] * 2
    if with_main and grad_out is None:
        grad_out = torch.zeros_like(out)
    if with_main and with_loss:
        *grads, loss = attention_and_index_loss_backward(grad_out, grad_lse, grad_loss, *saved, *ctx.numbers)
        ctx.value.copy_(loss.detach())
        main, index = grads[:3], grads[3:]
    elif with_main:
        main = block_sparse_attention_backward(
            grad_out, grad_lse, q, k, v, out, lse, ids, sequences, block_size, scale, backend
        )
    elif with_loss:
        branches = q, k, index_q, index_k, ids, lse, sequences
        index = _loss_gradients(ctx.value, grad_loss, needs[3:5], branches, count, ctx.numbers)
    return *main, *index, *(None,) * 8


def _empty_out_lse_and_loss(q, *_):
    return *empty_out_and_lse(q), q.new_empty((), dtype=statistics_dtype(q))


@operator(
    "attention_and_index_loss(Tensor q, Tensor k, Tensor v, Tensor index_q, Tensor index_k, Tensor block_indices, "
    "Tensor sequences, Tensor? count, Tensor value, int block_size, float scale, float index_scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_empty_out_lse_and_loss,
    backward=_attention_backward,
    setup_context=_setup_attention,
    cast=5,
)
def attention_and_index_loss(
    q, k, v, index_q, index_k, block_indices, sequences, count, value, block_size, scale, index_scale, backend
):
    """Return out [B, Hq, Sq, D], lse [B, Hq, Sq], and the scalar 0 whose gradient is that of the index loss."""
    check_block_indices(block_indices, -(-k.shape[2] // block_size))
    inputs = q, k, v, block_indices, sequences, block_size, scale
    return *run_kernel(backend, "attend_blocks", *inputs), q.new_zeros((), dtype=statistics_dtype(q))


def _setup_loss(ctx, inputs, output):
    *tensors, count, ctx.value, block_size, scale, index_scale, backend = inputs
    ctx.numbers = block_size, scale, index_scale, backend
    ctx.save_for_backward(*tensors, count)


def _loss_backward(ctx, grad_loss):
    *branches, count = ctx.saved_tensors
    index = _loss_gradients(ctx.value, grad_loss, ctx.needs_input_grad[2:4], branches, count, ctx.numbers)
    return None, None, *index, *(None,) * 9


def _empty_loss(q, *_):
    return q.new_empty((), dtype=statistics_dtype(q))


@operator(
    "deferred_index_loss(Tensor q, Tensor k, Tensor index_q, Tensor index_k, Tensor? block_indices, Tensor lse, "
    "Tensor sequences, Tensor? count, Tensor value, int block_size, float scale, float index_scale, str backend) "
    "-> Tensor",
    fake=_empty_loss,
    backward=_loss_backward,
    setup_context=_setup_loss,
    cast=4,
)
def deferred_index_loss(q, k, index_q, index_k, block_indices, lse, *_):
    """Return the scalar 0 whose gradient is that of `index_loss`."""
    return q.new_zeros((), dtype=statistics_dtype(q))
