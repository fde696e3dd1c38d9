"""Inputs that several tests share."""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor

    def rows(self, queries: slice, keys: slice, batch: slice = slice(None)) -> "Inputs":
        """The same inputs cut to some queries and keys."""
        q, k, v, index_q, index_k = self
        return Inputs(
            q[batch, :, queries],
            k[batch, :, keys],
            v[batch, :, keys],
            index_q[batch, :, queries],
            index_k[batch, :, keys],
        )


def make_inputs(
    seqlen: int,
    *,
    batch: int = 1,
    num_kv_heads: int = 2,
    group_size: int = 3,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    requires_grad: bool = False,
    seed: int = 0,
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    heads = (num_kv_heads * group_size, num_kv_heads, num_kv_heads, num_kv_heads, 1)
    tensors = (torch.randn(batch, h, seqlen, head_dim, generator=generator).to(dtype) for h in heads)
    return Inputs(*(x.requires_grad_(requires_grad) for x in tensors))


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def ragged(lens, kv_lens, seqlen_q, kv_starts=None):
    """The table of sequences when row b has lens[b] new tokens."""
    kv_starts = kv_starts or [0] * len(lens)
    rows = zip(itertools.count(), lens, kv_lens, kv_starts, strict=False)
    pairs = [[[b, 0, n, start, end], [b, n, seqlen_q, 0, 0]] for b, n, end, start in rows]
    return torch.tensor(pairs, dtype=torch.int32).flatten(0, 1)


def visible(sequences, batch, seqlen_q):
    """start, end [batch, seqlen_q]: the keys that each query sees."""
    start = torch.zeros(batch, seqlen_q, dtype=torch.int32)
    end = torch.zeros(batch, seqlen_q, dtype=torch.int32)
    for row, q_start, q_end, k_start, k_end in sequences.tolist():
        start[row, q_start:q_end] = k_start
        last = torch.arange(q_start, q_end, dtype=torch.int32) + (k_end - q_end + 1)
        end[row, q_start:q_end] = last.clamp(min=k_start)
    return start, end


def least_scale(x: Tensor) -> Tensor:
    """The least power of two [...], float32, with which the largest of x [..., D] is at most 448, as e4m3 keeps it."""
    return torch.exp2((x.double().abs().amax(-1) / 448).log2().ceil()).clamp(min=2.0**-126).float()
