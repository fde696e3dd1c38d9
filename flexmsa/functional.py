"""Attention and its single steps: check the input, fill in the defaults, and call the core."""

from typing import Literal, Unpack, overload

from torch import Tensor

from flexmsa import _core, _loss, ops, validation
from flexmsa._dtensors import takes_dtensors
from flexmsa._layouts import reject_wrong_layouts
from flexmsa._loss import index_loss
from flexmsa._sequences import check_sequences
from flexmsa._settings import checked_settings, default_scale
from flexmsa.backends import choose_backend
from flexmsa.kernels.rules import SelectionRule
from flexmsa.types import AttentionOptions, AuxOutput, AuxRequest, BlockAttentionOptions, SelectOptions

__all__ = ["attention", "block_sparse_attention", "index_loss", "select_blocks"]


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    return_aux: None = None,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    return_aux: AuxRequest,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, AuxOutput]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    return_aux: AuxRequest | None,
    **options: Unpack[AttentionOptions],
) -> Tensor | tuple[Tensor, AuxOutput]: ...
@takes_dtensors
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int = 128,
    topk: int | None = 16,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    scale: float | None = None,
    index_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    backend: str | None = None,
    return_aux: AuxRequest | None = None,
    index_loss_value: Tensor | None = None,
    index_loss_count: Tensor | float | None = None,
    block_indices: Tensor | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """MiniMax Sparse Attention (arXiv 2606.13392): the index branch selects blocks of keys, the main branch attends to
    them exactly.

    Causal; the last query is aligned with the last key. All tensors have the same floating dtype, and any strides.

    Args:
        q: [B, Hq, Sq, D].
        k, v: [B, Hkv, Sk, D]; Hkv divides Hq, G = Hq / Hkv heads share a group.
        index_q: [B, Hkv, Sq, Di], one index head for each group.
        index_k: [B, 1, Sk, Di], one head for all groups.
        block_size: keys in one block.
        topk: the number of blocks that a query selects in each group, including the forced blocks. None is the
            warm-up: both branches are dense, and the loss covers all visible keys.
        num_local_blocks: how many of the newest visible blocks are always selected; at least 1, the query's own.
        num_init_blocks: how many of the oldest blocks are always selected.
        scale: factor of the main scores; default 1 / sqrt(D).
        index_scale: factor of the index scores in the loss; default 1 / sqrt(Di).
        cu_seqlens: [documents + 1] int32, offsets of documents packed along S (B = 1, Sq = Sk). A document without
            tokens repeats an offset, so that offsets of a fixed number can be filled up.
        cu_seqlens_q, cu_seqlens_k: in place of cu_seqlens, where documents have fewer queries than keys: offsets of
            their queries along Sq and of their keys along Sk. The queries are the last tokens of their document.
        kv_starts, kv_lens: [B] int32; the keys of row b are kv_starts[b] .. kv_lens[b]-1 (left padding, a partly
            filled cache), and its queries are the last of these tokens. Blocks are counted from each sequence's first
            token, so a document or a padded row gives the same results as alone.
        backend: None picks the fastest backend for the device; "torch" (plain PyTorch, any device), "triton", "flex"
            and "reference" (dense) name one. A step that the named backend does not have uses the default.
        return_aux: the additional results to return.
        index_loss_value: a scalar tensor, for training. If given, the backward computes the index loss, which costs
            little there, and writes its value to this tensor; `index_loss` is then 0, with the loss's gradient.
        index_loss_count: a number or a scalar by which the sum of the losses is divided, instead of the number of
            groups and queries of this call that see a key: of all micro-batches, or of all processes
            (`flexmsa.distributed`).
        block_indices: [B, Hkv, Sq, topk] of another layer or of your own, as for `block_sparse_attention`, used instead
            of a selection; topk, num_local_blocks and num_init_blocks then have no meaning.

    Returns:
        out [B, Hq, Sq, D], contiguous, or (out, AuxOutput) if `return_aux` is given. `out` has gradients for q, k and
        v only, `index_loss` for index_q and index_k only. A query that sees no key gives 0.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NotImplementedError: the named backend cannot run this.

    >>> q, k, v = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
    >>> index_q, index_k = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16)
    >>> aux = AuxRequest(block_indices=True, index_loss=True)
    >>> out, aux = attention(q, k, v, index_q, index_k, block_size=16, topk=2, return_aux=aux)
    >>> out.shape, aux.block_indices[0, 0, 40:].amax().item()
    (torch.Size([1, 4, 64, 16]), 3)
    """
    validation.reject_context_parallel()
    validation.reject_forward_ad(q, k, v, index_q, index_k)
    branches, rule = (q, k, v, index_q, index_k), (block_size, topk, num_local_blocks, num_init_blocks)
    settings = checked_settings(*branches, *rule, scale, index_scale, backend)
    choose_backend("block_sparse_attention", backend, q)
    aux = validation.check_aux(return_aux)
    _loss.check_value(index_loss_value, aux, q)
    count = _loss.check_count("index_loss_count", index_loss_count, q)
    sequences = check_sequences(q, k.shape[2], cu_seqlens, kv_starts, kv_lens, cu_seqlens_q, cu_seqlens_k)
    if block_indices is not None:
        validation.check_block_indices(block_indices, q.shape[0], k.shape[1], q.shape[2], q.device)
    q, k, v, index_q, index_k = ops.cast_to_autocast(q, k, v, index_q, index_k)
    loss = {"loss_value": index_loss_value, "loss_count": count}
    out, found = _core.attention(q, k, v, index_q, index_k, sequences, settings, aux, block_indices, **loss)
    return out if return_aux is None else (out, found)


@overload
def select_blocks(
    index_q: Tensor, index_k: Tensor, *, return_scores: Literal[False] = False, **options: Unpack[SelectOptions]
) -> Tensor: ...
@overload
def select_blocks(
    index_q: Tensor, index_k: Tensor, *, return_scores: Literal[True], **options: Unpack[SelectOptions]
) -> tuple[Tensor, Tensor]: ...
@overload
def select_blocks(
    index_q: Tensor, index_k: Tensor, *, return_scores: bool, **options: Unpack[SelectOptions]
) -> Tensor | tuple[Tensor, Tensor]: ...
@takes_dtensors
def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    *,
    block_size: int = 128,
    topk: int = 16,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    backend: str | None = None,
    return_scores: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Select, for each query and group, the blocks of keys with the highest index scores (paper, index branch).

    The score of a block is the maximum of <index_q[i, r], index_k[j]> over its visible keys j; of equal scores, the
    smaller id is selected first. An id is always -1 or a visible block, even for NaN and infinite scores. No gradient.

    Args:
        index_q: [B, Hkv, Sq, Di]; index_k: [B, 1, Sk, Di]. Both may be float8_e4m3fn, which is faster on GPUs that
            multiply it (Hopper, Blackwell) and ranks blocks slightly differently. Cast `index_q * c` and `index_k * d`,
            with positive numbers c and d that bring all values within +-448; such factors do not change the selection.
        Others: as for `attention`; "flex" has no kernel for this.
        return_scores: also return the score of each selected block. They are computed apart from the selection, for
            analysis and for rules of your own: on a GPU this takes many times as long.

    Returns:
        block_indices [B, Hkv, Sq, topk] int32, ascending, padded on the right with -1. Id 0 is the first block of
        the query's own sequence. With return_scores (block_indices, scores), scores float32 (float64 for float64
        inputs) of the same shape, -inf for -1.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NotImplementedError: the named backend cannot run this.

    >>> index_k = torch.tensor([[3.0], [0.0], [1.0], [9.0]]).view(1, 1, 4, 1)
    >>> select_blocks(torch.ones(1, 1, 4, 1), index_k, block_size=1, topk=2)[0, 0].tolist()
    [[0, -1], [0, 1], [0, 2], [0, 3]]
    """
    validation.reject_context_parallel()
    validation.reject_forward_ad(index_q, index_k)
    try:
        validation.check_index_inputs(index_q, index_k, e4m3=True)
    except ValueError:
        reject_wrong_layouts(index_q=index_q, index_k=index_k)
        raise
    validation.check_settings(block_size, topk, num_local_blocks, num_init_blocks)
    if topk is None:
        raise TypeError("topk: expected an int, got None; the dense warm-up selects nothing")
    lengths = cu_seqlens, kv_starts, kv_lens, cu_seqlens_q, cu_seqlens_k
    sequences = check_sequences(index_q, index_k.shape[2], *lengths)
    backend = choose_backend("select_blocks", backend, index_q)
    index_q, index_k = ops.cast_to_autocast(index_q, index_k)
    rule = SelectionRule(block_size, topk, num_local_blocks, num_init_blocks)
    block_indices = _core.select_blocks(index_q, index_k, sequences, rule, backend)
    if not return_scores:
        return block_indices
    return block_indices, _core.chosen_scores(index_q.detach(), index_k.detach(), block_indices, sequences, block_size)


@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor | None,
    *,
    return_aux: None = None,
    **options: Unpack[BlockAttentionOptions],
) -> Tensor: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor | None,
    *,
    return_aux: AuxRequest,
    **options: Unpack[BlockAttentionOptions],
) -> tuple[Tensor, AuxOutput]: ...
@overload
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor | None,
    *,
    return_aux: AuxRequest | None,
    **options: Unpack[BlockAttentionOptions],
) -> Tensor | tuple[Tensor, AuxOutput]: ...
@takes_dtensors
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor | None,
    *,
    block_size: int = 128,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    backend: str | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Softmax attention over the visible keys of the given blocks (paper, main branch).

    Args:
        q: [B, Hq, Sq, D]; k, v: [B, Hkv, Sk, D].
        block_indices: [B, Hkv, Sq, topk] int32 or int64, in any order; -1 is no block, an id given twice counts once,
            and a block that the query does not see adds nothing. None selects every visible block. An id out of range
            raises on a CPU. On a GPU it is ignored like -1, because reading ids back would wait for the device.
        Others: as for `attention`.

    Returns:
        out [B, Hq, Sq, D], or (out, AuxOutput) if `return_aux` is given. A query with no visible key gives 0.

    Raises:
        ValueError, TypeError: an argument is not as described, or `return_aux` asks for the loss.
        NotImplementedError: the named backend cannot run this.

    >>> q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    >>> every_block = torch.arange(2).expand(1, 2, 8, 2)
    >>> out = block_sparse_attention(q, k, v, every_block, block_size=4)
    >>> dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    >>> torch.allclose(out, dense, atol=1e-5)
    True
    """
    validation.reject_context_parallel()
    validation.reject_forward_ad(q, k, v)
    try:
        validation.check_main_inputs(q, k, v, scale)
        if block_indices is not None:
            validation.check_block_indices(block_indices, q.shape[0], k.shape[1], q.shape[2], q.device)
    except ValueError:
        given = {} if block_indices is None else {"index_q": block_indices}
        reject_wrong_layouts(q=q, k=k, v=v, **given)
        raise
    aux = validation.check_aux(return_aux)
    if aux.any_loss:
        raise ValueError("return_aux: expected lse or block_indices, got the loss; call flexmsa.index_loss for it")
    validation.check_settings(block_size)
    sequences = check_sequences(q, k.shape[2], cu_seqlens, kv_starts, kv_lens, cu_seqlens_q, cu_seqlens_k)
    choose_backend("block_sparse_attention", backend, q)
    q, k, v = ops.cast_to_autocast(q, k, v)
    settings = _core.Settings(block_size, default_scale(scale, q), backend=backend)
    out, lse = _core.main_branch(q, k, v, block_indices, sequences, settings, aux)
    return out if return_aux is None else (out, _core.requested(aux, lse, block_indices))
