"""flexmsa::block_sparse_attention: softmax attention over the selected blocks, and its backward."""

import torch

from .checks import check_block_indices
from .dispatch import run_kernel
from .library import operator


def statistics_dtype(q: torch.Tensor) -> torch.dtype:
    """The dtype of lse and of losses: float32, and float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def empty_out_and_lse(q, *_):
    """Tensors like out and lse."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


def _empty_grads(grad_out, grad_lse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@operator(
    "block_sparse_attention_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor lse, Tensor? block_indices, Tensor sequences, int block_size, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_empty_grads,
    cast=0,
)
def block_sparse_attention_backward(*args):
    """Return the gradients of q, k and v; the schema names the arguments."""
    *inputs, backend = args
    return run_kernel(backend, "block_sparse_attention_backward", *inputs)


def _setup_context(ctx, inputs, output):
    q, k, v, block_indices, sequences, ctx.block_size, ctx.scale, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, *output, block_indices, sequences)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out, grad_lse):
    q, k, v, out, lse, block_indices, sequences = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * 8
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = block_sparse_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, block_indices, sequences, ctx.block_size, ctx.scale, ctx.backend
    )
    return (*grads, None, None, None, None, None)


@operator(
    "block_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor? block_indices, Tensor sequences, int block_size, "
    "float scale, str backend) -> (Tensor, Tensor)",
    fake=empty_out_and_lse,
    backward=_backward,
    setup_context=_setup_context,
    cast=3,
)
def block_sparse_attention(q, k, v, block_indices, sequences, block_size, scale, backend):
    """Return out [B, Hq, Sq, D] and lse [B, Hq, Sq]; block_indices None selects every visible block."""
    if block_indices is not None:
        check_block_indices(block_indices, -(-k.shape[2] // block_size))
    return run_kernel(backend, "attend_blocks", q, k, v, block_indices, sequences, block_size, scale)
