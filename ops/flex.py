"""Operators for FlexAttention: make the lists of a BlockMask, and pack a GQA group into rows.

They are operators, not traced code, for two reasons. If one graph makes a table with scatter and captures it in
mask_mod, the table's values are wrong; and packing with views fails in the compiler's CPU template.
"""

import torch

from flexmsa.kernels import block_mask as kernel

from .checks import check_block_indices
from .library import operator


def _empty_block_lists(
    block_indices, sequences, seqlen_k, block_size, mask_block, tokens, width, aligned, with_backward
):
    batch, heads, seqlen_q, _ = block_indices.shape
    rows = (seqlen_q + tokens - 1) // tokens
    num_blocks = (seqlen_k + mask_block - 1) // mask_block
    forward = [(batch, heads, rows), (batch, heads, rows, width)] * 2
    backward = [(batch, heads, num_blocks), (batch, heads, num_blocks, rows)] * 2 if with_backward else [(0,)] * 4
    membership = (batch, heads, seqlen_q, (seqlen_k + block_size - 1) // block_size)
    return [
        *(block_indices.new_empty(shape, dtype=torch.int32) for shape in forward + backward),
        block_indices.new_empty(membership, dtype=torch.bool),
        *(block_indices.new_empty((batch, seqlen_q), dtype=torch.int32) for _ in range(2)),
    ]


@operator(
    "block_mask_lists(Tensor block_indices, Tensor sequences, SymInt seqlen_k, int block_size, int mask_block, "
    "int tokens, SymInt width, bool aligned, bool with_backward) -> Tensor[]",
    fake=_empty_block_lists,
    has_gradient=False,
)
def block_mask_lists(block_indices, sequences, seqlen_k, block_size, mask_block, tokens, width, aligned, with_backward):
    """Return the lists described in flexmsa.kernels.block_mask."""
    check_block_indices(block_indices, -(-seqlen_k // block_size))
    return kernel.block_mask_lists(
        block_indices, sequences, seqlen_k, block_size, mask_block, tokens, width, aligned, with_backward
    )


def _empty_dense_lists(sequences, batch, seqlen_q, seqlen_k, mask_block, tokens, with_backward):
    rows = (seqlen_q + tokens - 1) // tokens
    num_blocks = (seqlen_k + mask_block - 1) // mask_block
    forward = [(batch, 1, rows), (batch, 1, rows, num_blocks)] * 2
    backward = [(batch, 1, num_blocks), (batch, 1, num_blocks, rows)] * 2 if with_backward else [(0,)] * 4
    return [sequences.new_empty(shape) for shape in [*forward, *backward, (batch, seqlen_q), (batch, seqlen_q)]]


@operator(
    "dense_mask_lists(Tensor sequences, SymInt batch, SymInt seqlen_q, SymInt seqlen_k, int mask_block, int tokens, "
    "bool with_backward) -> Tensor[]",
    fake=_empty_dense_lists,
    has_gradient=False,
)
def dense_mask_lists(sequences, batch, seqlen_q, seqlen_k, mask_block, tokens, with_backward):
    """Return the lists described in flexmsa.kernels.block_mask."""
    return kernel.dense_mask_lists(sequences, batch, seqlen_q, seqlen_k, mask_block, tokens, with_backward)


def _empty_packed(q, num_kv_heads):
    group_size = q.shape[1] // num_kv_heads
    return q.new_empty((q.shape[0], num_kv_heads, q.shape[2] * group_size, *q.shape[3:]))


def _pack_context(ctx, inputs, output):
    ctx.num_heads = inputs[0].shape[1]


def _pack_backward(ctx, grad):
    return unpack_gqa(grad, ctx.num_heads), None


@operator(
    "pack_gqa(Tensor q, SymInt num_kv_heads) -> Tensor",
    fake=_empty_packed,
    backward=_pack_backward,
    setup_context=_pack_context,
)
def pack_gqa(q, num_kv_heads):
    """Return [B, Hkv, Sq*G, ...] contiguous, rows ordered (token, head in group), from [B, Hq, Sq, ...]."""
    grouped = q.unflatten(1, (num_kv_heads, -1)).transpose(2, 3).contiguous()
    return grouped.flatten(2, 3).clone() if grouped.data_ptr() == q.data_ptr() else grouped.flatten(2, 3)


def _empty_unpacked(packed, num_heads):
    group_size = num_heads // packed.shape[1]
    return packed.new_empty((packed.shape[0], num_heads, packed.shape[2] // group_size, *packed.shape[3:]))


def _unpack_context(ctx, inputs, output):
    ctx.num_kv_heads = inputs[0].shape[1]


def _unpack_backward(ctx, grad):
    return pack_gqa(grad, ctx.num_kv_heads), None


@operator(
    "unpack_gqa(Tensor packed, SymInt num_heads) -> Tensor",
    fake=_empty_unpacked,
    backward=_unpack_backward,
    setup_context=_unpack_context,
)
def unpack_gqa(packed, num_heads):
    """Return [B, Hq, Sq, ...] contiguous from the rows of `pack_gqa`."""
    group_size = num_heads // packed.shape[1]
    grouped = packed.unflatten(2, (-1, group_size)).transpose(2, 3).contiguous()
    return grouped.flatten(1, 2).clone() if grouped.data_ptr() == packed.data_ptr() else grouped.flatten(1, 2)
