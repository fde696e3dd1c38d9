"""The backward of the main branch together with the index loss and its gradient."""

from torch import Tensor

from flexmsa.kernels.torch.attention import block_sparse_attention_backward
from flexmsa.kernels.torch.index_loss import index_loss


def attention_and_index_loss_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    loss: tuple[Tensor, Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    sequences: Tensor,
    block_size: int,
    scale: float,
    index_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, index_q and index_k, and the loss; given its gradient and its count, scalars."""
    grad_loss, count = loss
    main = block_sparse_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, block_indices, sequences, block_size, scale
    )
    branches = q, k, index_q, index_k, block_indices, lse, sequences
    value, *unit_grads = index_loss(*branches, block_size, scale, index_scale, True, count)
    index = [(grad * grad_loss).to(x.dtype) for grad, x in zip(unit_grads, (index_q, index_k), strict=True)]
    return *main, index[0], index[1], value
