"""Decoding: a few queries against a long cache.

Each (query, group) reads its own topk blocks, so they are gathered and multiplied directly; what is read is
proportional to topk * block_size, except for the index keys, which are scored once over their whole length.
"""

import torch
from torch import Tensor

from flexmsa.kernels.cpu.packing import compute_dtype, query_positions
from flexmsa.kernels.cpu.selection import select_blocks

# Numbers gathered at once, of keys and of values each.
_GATHERED = 2**23


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    sequences: Tensor,
    block_size: int,
    topk: int,
    num_local_blocks: int,
    num_init_blocks: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Selection and attention together: out [B,Hq,Sq,D], lse [B,Hq,Sq], block_indices [B,Hkv,Sq,topk].

    The results are those of ``select_blocks`` and ``block_sparse_attention_forward``.
    """
    block_indices = select_blocks(index_q, index_k, sequences, block_size, topk, num_local_blocks, num_init_blocks)
    batch, _, seqlen_q, head_dim = q.shape
    dtype = compute_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=dtype)
    sequence, position = query_positions(sequences, batch, seqlen_q)
    sequence, position = sequence.flatten(), position.flatten()
    k_start = sequences[:, 3].to(torch.int64)[sequence]
    step = max(1, _GATHERED // (k.shape[1] * topk * block_size * head_dim))
    for query in (position >= 0).nonzero()[:, 0].split(step):
        b, token = query // seqlen_q, query % seqlen_q
        ids = block_indices[b, :, token]
        keys, visible = _gathered_keys(ids, position[query], k_start[query], block_size)
        where = (b[:, None, None], torch.arange(k.shape[1])[:, None], keys)
        grouped = q[b, :, token].to(dtype).unflatten(1, (k.shape[1], -1))
        scores = grouped @ k[where].to(dtype).transpose(-1, -2) * scale
        scores.masked_fill_(~visible[:, :, None], -torch.inf)
        row_lse = scores.logsumexp(-1, keepdim=True)
        result = scores.sub_(row_lse).exp_() @ v[where].to(dtype)
        out[b, :, token] = result.flatten(1, 2).to(out.dtype)
        lse[b, :, token] = row_lse.flatten(1)
    return out, lse, block_indices


def _gathered_keys(ids: Tensor, position: Tensor, k_start: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """For ids [n, Hkv, topk]: the keys of these blocks [n, Hkv, topk * block_size], and which of them are visible.

    In place of an invisible key stands the query's newest one, whose memory is sure to be initialised.
    """
    newest = position[:, None, None]
    key = (ids.to(torch.int64)[..., None] * block_size + torch.arange(block_size)).flatten(2)
    visible = (key >= 0) & (key <= newest)
    return k_start[:, None, None] + key.where(visible, newest), visible
