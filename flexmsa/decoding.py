"""Attention from new tokens to a cache; `functional` attends within a batch."""

from typing import Unpack, overload

from torch import Tensor

from flexmsa import _core, validation
from flexmsa._profiling import profiled
from flexmsa._settings import default_scale
from flexmsa.backends import choose_backend
from flexmsa.cache import Cache
from flexmsa.kernels.rules import SelectionRule
from flexmsa.types import AuxOutput, AuxRequest, DecodeOptions

__all__ = ["decode"]


@overload
def decode(
    q: Tensor, cache: Cache, index_q: Tensor | None, *, return_aux: None = None, **options: Unpack[DecodeOptions]
) -> Tensor: ...
@overload
def decode(
    q: Tensor, cache: Cache, index_q: Tensor | None, *, return_aux: AuxRequest, **options: Unpack[DecodeOptions]
) -> tuple[Tensor, AuxOutput]: ...
@overload
def decode(
    q: Tensor, cache: Cache, index_q: Tensor | None, *, return_aux: AuxRequest | None, **options: Unpack[DecodeOptions]
) -> Tensor | tuple[Tensor, AuxOutput]: ...
@profiled("decode")
def decode(
    q: Tensor,
    cache: Cache,
    index_q: Tensor | None,
    *,
    block_size: int = 128,
    topk: int | None = 16,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    scale: float | None = None,
    block_indices: Tensor | None = None,
    backend: str | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Attend from new tokens to a cache that already holds their keys; for inference, without gradients: it raises
    RuntimeError for tensors that need one, except under torch.no_grad().

    Gives the results of `attention` on the filled part of each row, for one token, a few speculative tokens, or a part
    of a prompt. After an append with `lens`, row b's queries are the first lens[b]; the others give 0.

    Args:
        q: [B, Hq, Sq, D], the tokens of the last append; if that had another number of tokens, the last Sq tokens of
            each row.
        cache: filled by its `append`, including the keys of these tokens. With a `flexmsa.distributed.ShardedCache`,
            each of its processes calls this with the same arguments, and gets the same results.
        index_q: [B, Hkv, Sq, Di]; may be None if nothing is selected.
        block_size: as for `attention`; for a paged cache its page size, for a sharded one its block_size.
        block_indices: [B, Hkv, Sq, topk] of another layer, used instead of a selection; -1 and blocks that the query
            does not see are ignored.
        Others: as for `attention`; "flex" has no kernel for this.

    Returns:
        out [B, Hq, Sq, D], or (out, AuxOutput) if `return_aux` is given. A row without keys gives 0.

    Raises:
        ValueError, TypeError: an argument is not as described.
        NotImplementedError: the named backend cannot run this.

    >>> cache = MSACache(1, num_kv_heads=1, head_dim=16, index_head_dim=16, capacity=64)
    >>> cache.append(torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 16), torch.randn(1, 1, 20, 16))
    >>> decode(torch.randn(1, 4, 1, 16), cache, torch.randn(1, 1, 1, 16), block_size=8, topk=2).shape
    torch.Size([1, 4, 1, 16])
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: expected an MSACache or a PagedMSACache, got {type(cache).__name__}")
    aux = validation.check_aux(return_aux)
    if aux.any_loss:
        raise ValueError("return_aux: expected lse or block_indices, got index_loss, which decode does not compute")
    validation.check_settings(block_size, topk, num_local_blocks, num_init_blocks)
    validation.check_decode_inputs(q, index_q, cache, block_size, scale)
    validation.reject_gradients(q=q, index_q=index_q)
    backend = choose_backend("decode", backend, q)
    scale = default_scale(scale, q)
    choice = None
    if block_indices is not None:
        validation.check_block_indices(block_indices, q.shape[0], cache.k.shape[1], q.shape[2], q.device)
    elif topk is not None:
        if index_q is None:
            raise TypeError("index_q: expected a tensor to select with, got None; or pass block_indices or topk=None")
        choice = index_q, SelectionRule(block_size, topk, num_local_blocks, num_init_blocks)
    out, lse, block_indices = cache.attend(q, choice, block_indices, block_size, scale, backend)
    return out if return_aux is None else (out, _core.requested(aux, lse, block_indices))
