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
    """out [B, Hq, Sq, D] and lse [B, Hq, Sq] fp32, both contiguous."""

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


@triton.jit
def result_row(results, batch, group, head, query, group_size):
    """The row of out and lse of a query, for head `head` of its group, as int64."""
    batch = tl.cast(batch, tl.int64)
    return ((batch * results.num_kv_heads + group) * group_size + head) * results.seqlen_q + query
