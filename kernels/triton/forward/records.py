"""What the forward's implementations are given, and where they write."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.fp8 import Cache


class Inputs(NamedTuple):
    """q [B, Hq, Sq, D], k and v [B, Hkv, Sk, D] or as `cache` says, the table of sequences, and the softmax's scale."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cache: Cache
    sequences: torch.Tensor
    scale: float


class Results(NamedTuple):
    """out, a View [B, Hq, Sq, D], and lse [B, Hq, Sq] fp32, contiguous."""

    out: Any
    lse: Any
    num_kv_heads: Any
    seqlen_q: Any


class Partial(NamedTuple):
    """Partial results of a pass: attention to one block for each top-k slot of each token, per head.

    out [tokens, topk, G, D]: normalised; lse [tokens, topk, G] fp32: base 2.
    """

    out: Any
    lse: Any


class Vectors(NamedTuple):
    """Keys or values as they are stored: their View, and their scales [.., Hkv, seqlen_k] (None: they are not e4m3)."""

    view: Any
    scale: Any
    seqlen_k: Any


class ResultPlace(NamedTuple):
    """Where a query's out begins, and where its lse is, in elements; int64."""

    out: Any
    lse: Any


@triton.jit
def result_place(results, batch, group, head, query, group_size):
    """The ResultPlace of a query, for head `head` of its group."""
    batch, query = tl.cast(batch, tl.int64), tl.cast(query, tl.int64)
    head = tl.cast(group, tl.int64) * group_size + head
    out = results.out
    lse_place = (batch * results.num_kv_heads * group_size + head) * results.seqlen_q + query
    return ResultPlace(batch * out.stride_b + head * out.stride_h + query * out.stride_s, lse_place)
