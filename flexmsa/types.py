"""Small types of the public API."""

from typing import Any, NamedTuple, TypeAlias, TypedDict

import torch
from torch import Tensor

# A tensor if it was requested, otherwise None. Any, because who requested it need not ask a type checker whether.
Requested: TypeAlias = Tensor | Any


class Lengths(TypedDict, total=False):
    """Arguments of the public functions that say which keys a query sees."""

    cu_seqlens: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    kv_starts: Tensor | None
    kv_lens: Tensor | None


class Selection(TypedDict, total=False):
    """Arguments of the public functions that say which blocks a query selects, and where that is computed."""

    block_size: int
    topk: int | None
    num_local_blocks: int
    num_init_blocks: int
    scale: float | None
    backend: str | None


class AttentionOptions(Lengths, Selection, total=False):
    """The keyword arguments of `attention` that do not change the type of its result."""

    index_scale: float | None
    index_loss_value: Tensor | None
    index_loss_count: Tensor | float | None
    block_indices: Tensor | None


class SelectOptions(Lengths, total=False):
    """Those of `select_blocks`."""

    block_size: int
    topk: int
    num_local_blocks: int
    num_init_blocks: int
    backend: str | None


class BlockAttentionOptions(Lengths, total=False):
    """Those of `block_sparse_attention`."""

    block_size: int
    scale: float | None
    backend: str | None


class DecodeOptions(Selection, total=False):
    """Those of `decode`."""

    block_indices: Tensor | None


class CacheDtypes(TypedDict, total=False):
    """Arguments of `MSAttention.new_cache`, for every kind of cache."""

    index_dtype: torch.dtype | None
    dtype: torch.dtype | None


class ShardedAttentionOptions(Selection, total=False):
    """Those of `context_parallel_attention`."""

    index_scale: float | None
    kv_starts: Tensor | None
    index_loss_value: Tensor | None
    index_loss_count: Tensor | float | None


class AuxRequest(NamedTuple):
    """The additional results to return: pass as `return_aux`, as with `flex_attention`.

    >>> AuxRequest(lse=True)
    AuxRequest(lse=True, block_indices=False, index_loss=False, index_loss_sum=False)
    """

    lse: bool = False
    block_indices: bool = False
    index_loss: bool = False
    index_loss_sum: bool = False

    @property
    def any_loss(self) -> bool:
        """Whether the index loss is to be computed."""
        return self.index_loss or self.index_loss_sum


class AuxOutput(NamedTuple):
    """The results that an `AuxRequest` requested; the others are None.

    Attributes:
        lse: [B, Hq, Sq] float32, natural logarithm of the sum of exponentials of the scaled main scores over the
            visible keys of the selected blocks; -inf where a query sees no key.
        block_indices: [B, Hkv, Sq, topk] int32, ascending, padded on the right with -1; None in the warm-up.
        index_loss: scalar float32, the KL loss of the index branch.
        index_loss_sum: scalar float32, the same loss before it is divided by the count.
        index_loss_count: scalar, with index_loss_sum: by default int64, the number of groups and queries that see a
            key; or the count that was given.

    >>> q, index_q = torch.randn(1, 2, 32, 16), torch.randn(1, 1, 32, 16)
    >>> k = v = index_k = torch.randn(1, 1, 32, 16)
    >>> out, aux = attention(q, k, v, index_q, index_k, block_size=8, topk=2, return_aux=AuxRequest(lse=True))
    >>> aux.lse.shape, aux.block_indices
    (torch.Size([1, 2, 32]), None)
    """

    lse: Requested = None
    block_indices: Requested = None
    index_loss: Requested = None
    index_loss_sum: Requested = None
    index_loss_count: Requested = None


class Projections(NamedTuple):
    """q [B, Hq, S, D]; k, v [B, Hkv, S, D]; index_q [B, Hkv, S, Di]; index_k [B, 1, S, Di]; after norms and RoPE."""

    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor
