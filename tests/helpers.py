"""Inputs that several tests share."""

import itertools
from dataclasses import astuple
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from flexmsa import reference


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


def assert_refused(cache, call, message, error=ValueError):
    """The call raises, and leaves the cache as it was."""

    def state():
        pages = getattr(cache, "_pages", None)
        free = None if pages is None else torch.tensor(pages.num_free)
        return [x for x in (*cache.buffers, cache.kv_lens, cache.page_table, free) if x is not None]

    before = [x.clone() for x in state()]
    with pytest.raises(error, match=message):
        call()
    assert all(torch.equal(x, y) for x, y in zip(state(), before, strict=True))


def plain(batch, seqlen_q, seqlen_k):
    """The table of sequences of an unpacked batch."""
    return torch.tensor([[b, 0, seqlen_q, 0, seqlen_k] for b in range(batch)], dtype=torch.int32)


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


def hide_unowned(sequences, *keys):
    """The keys [B, H, S, D] with NaN in those that no sequence owns."""
    owned = torch.zeros(keys[0].shape[0], 1, keys[0].shape[2], 1, dtype=torch.bool)
    for row, _, _, k_start, k_end in sequences.tolist():
        owned[row, :, k_start:k_end] = True
    return [x.masked_fill(~owned, torch.nan) for x in keys]


def dense_selection(index_q, index_k, sequences, rule):
    """The dense definition, for the kernels' table of sequences."""
    start, end = visible(sequences, index_q.shape[0], index_q.shape[2])
    return reference.select_blocks(index_q, index_k, start, end, *astuple(rule))


def dense_scored_blocks(index_q, index_k, sequences, block_size, topk):
    """The topk best visible blocks and their scores by the dense definition, the best first; then -1 and -inf."""
    start, end = visible(sequences, index_q.shape[0], index_q.shape[2])
    scores = reference.block_scores(reference.token_scores(index_q, index_k), start, end, block_size)
    scores = torch.nn.functional.pad(scores, (0, max(0, topk - scores.shape[-1])), value=-torch.inf)
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    return ids.masked_fill(values == -torch.inf, -1)[..., :topk].int(), values[..., :topk]


def dense_attention(q, k, v, block_indices, sequences, block_size, scale, dtype=torch.float64):
    """The dense definition in dtype, for the kernels' table of sequences."""
    start, end = visible(sequences, q.shape[0], q.shape[2])
    q, k, v = (x.to(dtype) for x in (q, k, v))
    return reference.block_sparse_attention(q, k, v, block_indices, start, end, block_size, scale, dtype)


def least_scale(x: Tensor) -> Tensor:
    """The least power of two [...], float32, with which the largest of x [..., D] is at most 448, as e4m3 keeps it."""
    return torch.exp2((x.double().abs().amax(-1) / 448).log2().ceil()).clamp(min=2.0**-126).float()
