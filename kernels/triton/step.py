"""A training step of the layer: all that its launches need, so that they can be compiled before the first of them."""

from typing import Any

from torch import Tensor

from ..rules import SelectionRule
from .backward.launch import attention_and_index_loss_backward, block_sparse_attention_backward
from .forward.launch import block_sparse_attention_forward
from .loss.launch import index_loss
from .selection.launch import select_blocks


def recorded_tokens(block_size: int) -> int:
    """Tokens that a step is recorded with, as its kernels are the same for every length from here on."""
    return max(4096, 32 * block_size)


def short_training_step(*arguments: Any) -> None:
    """`training_step` on the first tokens of the tensors, which takes little memory, whatever their length is."""
    rule = arguments[6]
    branches = (x[:, :, : recorded_tokens(rule.block_size)] for x in arguments[:5])
    training_step(*branches, *arguments[5:])


def training_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    sequences: Tensor,
    rule: SelectionRule,
    scale: float,
    index_scale: float,
    with_loss: bool,
    loss_in_backward: bool,
) -> None:
    """Launch what the forward and the backward of `flexmsa.attention` launch; to be recorded, results are dropped."""
    ids = select_blocks(index_q, index_k, sequences, rule)
    out, lse = block_sparse_attention_forward(q, k, v, ids, sequences, rule.block_size, scale)
    branches = q, k, index_q, index_k, ids, lse, sequences, rule.block_size, scale, index_scale
    main = q, k, v, out, lse, ids, sequences, rule.block_size, scale
    if with_loss and loss_in_backward:
        inputs = q, k, v, index_q, index_k, out, lse, ids, sequences
        loss = lse.new_ones(()), None
        attention_and_index_loss_backward(out, None, loss, *inputs, rule.block_size, scale, index_scale)
        return
    if with_loss:
        index_loss(*branches, True)
    block_sparse_attention_backward(out, None, *main)
