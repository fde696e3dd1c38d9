"""MSA through FlexAttention: block_indices become a BlockMask over GQA groups packed into rows.

FlexAttention decides which keys to read per block of rows, MSA per token. Therefore the G query heads of a group are
packed into the rows, ordered (token, head in group), and one row block is one token or a few neighbouring ones. The
mask_mod tests each token's own selection, so it is exact with and without the lists, eager and compiled.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest as FlexAuxRequest
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexmsa import ops, validation
from flexmsa._sequences import Sequences, check_sequences

__all__ = ["create_block_mask", "pack_gqa", "packed_flex_attention", "unpack_gqa"]

# FlexAttention's CUDA backward needs row and key blocks that are multiples of this.
_BACKWARD_ROWS = 128
# The fewest rows of a tensor-core product.
_FORWARD_ROWS = 16
# A BlockMask's lists of key blocks per row block, then of row blocks per key block: partial ones, and full ones.
_LISTS = [f"{full}{kind}_{x}" for kind in ("kv", "q") for full in ("", "full_") for x in ("num_blocks", "indices")]


def pack_gqa(q: Tensor, num_kv_heads: int) -> Tensor:
    """Pack the heads of each GQA group into the rows.

    Args:
        q: [B, Hq, Sq, ...], any strides.
        num_kv_heads: the number of groups Hkv; divides Hq.

    Returns:
        [B, Hkv, Sq * G, ...] contiguous, with G = Hq / Hkv; row t * G + g is token t of head g of the group.

    Raises:
        ValueError: `num_kv_heads` does not divide the heads.

    >>> pack_gqa(torch.arange(4).view(1, 2, 2, 1), num_kv_heads=1).flatten().tolist()
    [0, 2, 1, 3]
    """
    if q.dim() < 3 or num_kv_heads < 1 or q.shape[1] % num_kv_heads:
        raise ValueError(
            f"q: expected [B, Hq, Sq, ...] with Hq a multiple of num_kv_heads={num_kv_heads}, got {list(q.shape)}"
        )
    return ops.pack_gqa(q, num_kv_heads)


def unpack_gqa(packed: Tensor, num_heads: int) -> Tensor:
    """Undo `pack_gqa`: [B, Hkv, Sq * G, ...] becomes [B, Hq, Sq, ...], contiguous.

    Raises:
        ValueError: `num_heads` is not a multiple of Hkv, or the rows are not whole tokens.

    >>> q = torch.randn(1, 6, 5, 8)
    >>> torch.equal(unpack_gqa(pack_gqa(q, num_kv_heads=2), num_heads=6), q)
    True
    """
    if packed.dim() < 3 or num_heads % packed.shape[1] or packed.shape[2] % (num_heads // packed.shape[1]):
        raise ValueError(
            f"packed: expected [B, Hkv, Sq * G, ...] with G * Hkv = num_heads={num_heads}, got {list(packed.shape)}"
        )
    return ops.unpack_gqa(packed, num_heads)


def create_block_mask(
    block_indices: Tensor,
    *,
    num_heads: int,
    seqlen_k: int,
    block_size: int = 128,
    cu_seqlens: Tensor | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    with_backward: bool = True,
) -> BlockMask:
    """Make the FlexAttention BlockMask of a selection, for rows packed by `pack_gqa`.

    Args:
        block_indices: [B, Hkv, Sq, topk] int32 or int64, as from `select_blocks`.
        num_heads: query heads Hq; G = Hq / Hkv of them are packed into the rows.
        seqlen_k: keys Sk.
        block_size: keys in one block of the selection.
        cu_seqlens, kv_starts, kv_lens: the sequences, as for `attention`.
        with_backward: make the lists that FlexAttention's backward needs. False also makes row blocks smaller, which
            is faster for inference.

    The membership table takes B * Hkv * Sq * blocks bytes, and on CUDA the lists for the backward take
    B * Hkv * (Sk / 128) * (Sq * G / 128) * 8 bytes.

    Returns:
        A BlockMask for q packed to [B, Hkv, Sq * G, D] and k, v [B, Hkv, Sk, D]. Its mask_mod(b, h, row, key) can be
        used alone; in a score_mod used with it, token = row // G and head = h * G + row % G.

    Raises:
        ValueError, TypeError: an argument is not as described.

    >>> ids = torch.tensor([[0, -1], [0, -1], [0, 1], [0, 1]], dtype=torch.int32).view(1, 1, 4, 2)
    >>> mask = create_block_mask(ids, num_heads=2, seqlen_k=4, block_size=2)
    >>> mask.shape
    (1, 1, 8, 4)
    """
    validation.check_block_mask_inputs(block_indices, num_heads, seqlen_k, block_size)
    sequences = check_sequences(block_indices, seqlen_k, cu_seqlens, kv_starts, kv_lens)
    return selection_block_mask(block_indices, num_heads, block_size, sequences, with_backward)


def _tokens_per_row_block(device: torch.device, group_size: int, with_backward: bool) -> int:
    """Return the fewest tokens that the kernels allow: the fewer share a row block, the fewer blocks it reads."""
    rows = 1 if device.type == "cpu" else (_BACKWARD_ROWS if with_backward else _FORWARD_ROWS)
    return rows // math.gcd(rows, group_size)


def selection_block_mask(
    block_indices: Tensor, num_heads: int, block_size: int, sequences: Sequences, with_backward: bool
) -> BlockMask:
    """Make the BlockMask of `create_block_mask` from checked input."""
    _, num_kv_heads, seqlen_q, topk = block_indices.shape
    seqlen_k, aligned = sequences.seqlen_k, sequences.are_aligned
    group_size = num_heads // num_kv_heads
    on_cpu = block_indices.device.type == "cpu"
    tokens = _tokens_per_row_block(block_indices.device, group_size, with_backward)
    mask_block = block_size if on_cpu or block_size % _BACKWARD_ROWS == 0 else _BACKWARD_ROWS
    num_blocks = (seqlen_k + mask_block - 1) // mask_block
    # The CPU template reads lists as wide as the keys; on CUDA a list holds at most the blocks that its tokens select.
    mask_blocks_per_block = (block_size + mask_block - 2) // mask_block + 1
    width = num_blocks if on_cpu else min(num_blocks, tokens * topk * mask_blocks_per_block)
    *lists, membership, start, end = ops.block_mask_lists(
        block_indices, sequences.table, seqlen_k, block_size, mask_block, tokens, width, aligned, with_backward
    )

    def aligned_mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        token = row // group_size
        return (key < end[b, token]) & membership[b, h, token, key // block_size]

    def shifted_mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        token = row // group_size
        offset = key - start[b, token]
        block = torch.clamp(offset, min=0) // block_size
        return (offset >= 0) & (key < end[b, token]) & membership[b, h, token, block]

    # If all blocks start at multiples of block_size, a key's block does not depend on the row.
    mask_mod = aligned_mask_mod if aligned else shifted_mask_mod
    row_block = tokens * group_size, mask_block
    return _block_mask(lists, (seqlen_q * group_size, seqlen_k), row_block, mask_mod, with_backward)


def dense_block_mask(q: Tensor, k: Tensor, sequences: Sequences, with_backward: bool) -> BlockMask:
    """Make the BlockMask of the warm-up: every visible key, for the rows of `pack_gqa(q)`."""
    group_size = q.shape[1] // k.shape[1]
    seqlen_q, seqlen_k = q.shape[2], k.shape[2]
    tokens = _tokens_per_row_block(q.device, group_size, with_backward)
    *lists, start, end = ops.dense_mask_lists(
        sequences.table, q.shape[0], seqlen_q, seqlen_k, _BACKWARD_ROWS, tokens, with_backward
    )

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        token = row // group_size
        return (key >= start[b, token]) & (key < end[b, token])

    row_block = tokens * group_size, _BACKWARD_ROWS
    return _block_mask(lists, (seqlen_q * group_size, seqlen_k), row_block, mask_mod, with_backward)


def _block_mask(
    lists: list[Tensor],
    lengths: tuple[int, int],
    row_block: tuple[int, int],
    mask_mod: Callable[..., Tensor],
    with_backward: bool,
) -> BlockMask:
    """Make a BlockMask from lists in the order of `_LISTS`; without a backward, it gets the first four."""
    named: dict[str, Any] = dict.fromkeys(_LISTS) | dict(zip(_LISTS[: 8 if with_backward else 4], lists, strict=False))
    return BlockMask(seq_lengths=lengths, **named, BLOCK_SIZE=row_block, mask_mod=mask_mod)


@functools.cache
def _compiled_flex_attention(device: str) -> Callable[..., Any]:
    # The CPU template does not compile for dynamic shapes.
    return torch.compile(flex_attention, dynamic=False if device == "cpu" else None)


def _flex_attention(q: Tensor, *args: Any, **settings: Any) -> Any:
    if torch.compiler.is_compiling():
        return flex_attention(q, *args, **settings)
    # The variants of one model (training or not, warm-up or not, with lse or not) can reach the default limit of 8.
    # Above the limit FlexAttention would silently run dense.
    with torch._dynamo.config.patch(recompile_limit=64):
        return _compiled_flex_attention(q.device.type)(q, *args, **settings)


@overload
def packed_flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    score_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...
@overload
def packed_flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    score_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def packed_flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    score_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def packed_flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    *,
    score_mod: Callable[..., Tensor] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Call FlexAttention with each group packed into rows: exact for any group size, on CPU and CUDA.

    This compiles FlexAttention, unless the caller is being compiled: uncompiled FlexAttention makes an S x S tensor.

    Args:
        q: [B, Hq, Sq, D]; k, v: [B, Hkv, Sk, D].
        block_mask: from `create_block_mask`.
        score_mod: as FlexAttention's, in packed coordinates: token = row // G, head = h * G + row % G.
        scale: factor of the scores; default 1 / sqrt(D).
        return_lse: return (out, lse [B, Hq, Sq] float32); on CUDA only.

    Returns:
        out [B, Hq, Sq, D], or (out, lse).

    Raises:
        NotImplementedError: a gradient or lse is needed on a CPU, where FlexAttention computes neither.

    >>> q, k, v = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    >>> ids = select_blocks(torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16), block_size=16, topk=2)
    >>> mask = create_block_mask(ids, num_heads=4, seqlen_k=64, block_size=16)
    >>> out = packed_flex_attention(q, k, v, mask)
    >>> torch.allclose(out, block_sparse_attention(q, k, v, ids, block_size=16), atol=1e-5)
    True
    """
    on_cpu = q.device.type == "cpu"
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if on_cpu and (needs_grad or return_lse):
        raise NotImplementedError(
            "FlexAttention on a CPU computes no gradient and no lse: "
            'use block_sparse_attention(backend="torch"), or call it under torch.no_grad() without lse'
        )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    packed = ops.pack_gqa(q, k.shape[1])
    options = None if on_cpu else _kernel_options(block_mask)
    aux = FlexAuxRequest(lse=True) if return_lse else None
    result = _flex_attention(
        packed, k, v, score_mod=score_mod, block_mask=block_mask, scale=scale, kernel_options=options, return_aux=aux
    )
    if not return_lse:
        return ops.unpack_gqa(result, q.shape[1])
    out, extra = result
    return ops.unpack_gqa(out, q.shape[1]), ops.unpack_gqa(extra.lse, q.shape[1])


def _kernel_options(block_mask: BlockMask) -> dict[str, Any]:
    """Return kernel options: row tiles that divide a row block, two stages, and never the decoding kernel.

    The decoding kernel ignores the size of our row blocks. mask_mod's loads are pipelined too, so with three stages a
    tile does not fit into Hopper's shared memory.
    """
    rows = block_mask.BLOCK_SIZE[0]
    options: dict[str, Any] = {"FORCE_USE_FLEX_ATTENTION": True, "fwd_num_stages": 2, "bwd_num_stages": 2}
    if rows % _BACKWARD_ROWS:
        options["BLOCK_M"] = _FORWARD_ROWS
    return options
