"""Attention to the chosen blocks of a few queries or of many, with a cache or without.

A few queries share hardly any blocks, so each (query, group) gathers its own: it reads topk * block_size keys. Many
queries are computed in key-major order, as in training.
"""

import numpy as np
import torch
from torch import Tensor

from flexmsa.kernels.rules import FEW_QUERIES, SelectionRule
from flexmsa.kernels.torch import fp8
from flexmsa.kernels.torch.attention import block_sparse_attention_forward
from flexmsa.kernels.torch.packing import (
    Array,
    Scratch,
    array,
    compute_dtype,
    locate_block,
    query_positions,
    sequence_columns,
)
from flexmsa.kernels.torch.selection import select_blocks

# Dtypes for the fused kernel: conversion to float32 would take longer than everything else. For float32 itself, plain
# products are as fast.
_FUSED = (torch.bfloat16, torch.float16)
# Numbers gathered at once, for keys and for values each.
_GATHERED = 2**21


def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor | None,
    sequences: Tensor,
    block_size: int,
    scale: float,
    page_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of few queries or many; arguments and results are those of ``block_sparse_attention_forward``.

    ``out`` is written where it is given. Scales of pages may be [block_size], of each page.
    """
    k_scale, v_scale = fp8.each_scale(k_scale, k), fp8.each_scale(v_scale, v)
    if block_indices is None or q.shape[2] > FEW_QUERIES:
        found, lse = block_sparse_attention_forward(
            q, k, v, block_indices, sequences, block_size, scale, page_table, k_scale, v_scale
        )
        return found if out is None else out.copy_(found), lse
    num_heads, dtype = k.shape[1], compute_dtype(q.dtype)
    # Not written in place: out may be q.
    found = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=dtype)
    sequence, position = query_positions(sequences, q.shape[0], q.shape[2])
    k_start = sequence_columns(sequences).k_start[sequence]
    ids = array(block_indices).astype(np.int64)
    scratch = Scratch(dtype)
    step = max(1, _GATHERED // (num_heads * max(1, ids.shape[-1]) * block_size * q.shape[-1]))
    queries = np.argwhere(position >= 0)
    for start in range(0, len(queries), step):
        batch, token = queries[start : start + step].T
        query = batch, token
        keys = _ChosenKeys(
            ids[batch, :, token], batch, position[query], k_start[query], block_size, k.shape[2], page_table
        )
        batch, token = torch.as_tensor(batch), torch.as_tensor(token)
        # Gathered rows keep the order of q's strides, and the fused kernel needs dense ones.
        rows = q[batch, :, token].contiguous().view(len(batch) * num_heads, -1, q.shape[-1])
        if k_scale is None and v_scale is None and q.dtype in _FUSED and q.device.type == "cpu":
            result, row_lse = _attend_fused(rows, k, v, scale, keys, scratch)
        else:
            result, row_lse = _attend(rows.to(dtype).mul_(scale), k, v, k_scale, v_scale, keys, scratch)
        found[batch, :, token] = result.reshape(len(batch), -1, q.shape[-1]).to(q.dtype)
        lse[batch, :, token] = row_lse.reshape(len(batch), -1)
    return found if out is None else out.copy_(found), lse


def select_and_attend(
    q: Tensor,
    index_q: Tensor,
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    sequences: Tensor,
    rule: SelectionRule,
    scale: float,
    page_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    index_k_scale: Tensor | None = None,
    out: Tensor | None = None,
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, block_indices) of ``select_blocks`` and ``attend_blocks``."""
    ids = select_blocks(index_q, index_k, sequences, rule, page_table, index_k_scale, ids)
    return *attend_blocks(q, k, v, ids, sequences, rule.block_size, scale, page_table, k_scale, v_scale, out), ids


def _attend_fused(
    rows: Tensor, k: Tensor, v: Tensor, scale: float, keys: "_ChosenKeys", scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """out [J, G, D] and lse [J, G, 1] of rows [J, G, D], by the kernel of scaled_dot_product_attention.

    The kernel reads keys and values as they are stored, and returns its lse, unlike the public function.
    """
    mask = None
    if keys.is_padding is not None:
        mask = torch.zeros(keys.is_padding.shape, dtype=rows.dtype).masked_fill_(keys.is_padding, -torch.inf)
        mask = mask[None, :, None].expand(1, *rows.shape[:2], -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows[None],
        keys.gather_stored(k, scratch, "gathered keys")[None],
        keys.gather_stored(v, scratch, "gathered values")[None],
        attn_mask=mask,
        scale=scale,
    )
    out, lse = out[0], lse[0, ..., None]
    # An infinite score has no softmax, but the kernel may give 0.
    out.masked_fill_(lse == torch.inf, torch.nan)
    return keys.clear_blind(out, lse)


def _attend(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    keys: "_ChosenKeys",
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """out [J, G, D] and lse [J, G, 1] of rows [J, G, D], which include the factor scale."""
    gathered = keys.gather(k, scratch)
    scores = torch.bmm(rows, gathered.transpose(1, 2), out=scratch.take("scores", *rows.shape[:2], gathered.shape[1]))
    if k_scale is not None:
        scores.mul_(fp8.factors(keys.gather(fp8.as_scales(k_scale), scratch))[:, None])
    if keys.is_padding is not None:
        scores.masked_fill_(keys.is_padding[:, None], torch.finfo(scores.dtype).min)
    # Softmax is one fused pass, and its largest value gives the logsumexp.
    maximum = scores.amax(-1, keepdim=True)
    probs = torch.softmax(scores, -1, out=scratch.take("probs", *scores.shape))
    lse = maximum.sub_(probs.amax(-1, keepdim=True).log_())
    if v_scale is not None:
        probs.mul_(fp8.factors(keys.gather(fp8.as_scales(v_scale), scratch))[:, None])
    return keys.clear_blind(torch.bmm(probs, keys.gather(v, scratch)), lse)


class _ChosenKeys:
    """The visible keys of the chosen blocks of J rows, one row per query and group: L keys per row.

    A row with fewer keys repeats keys of its last block as padding, so no key is read that it does not attend to. (A
    row without keys repeats keys of its newest block.) ``is_padding`` [J, L] is None if no row has padding.
    """

    def __init__(
        self,
        ids: Array,
        batch: Array,
        position: Array,
        k_start: Array,
        block_size: int,
        seqlen_k: int,
        page_table: Tensor | None,
    ) -> None:
        """ids [n, Hkv, topk]; batch row [n], position of the newest visible key [n], first key of the sequence [n].

        seqlen_k is the cache's third dimension.
        """
        num_heads = ids.shape[1]
        batch, position, k_start = (x[:, None, None] for x in (batch, position, k_start))
        newest = position // block_size
        # Invisible blocks come last. Of the others, only the newest block can extend beyond the query.
        hidden = newest + 1
        ids = np.sort(np.where((ids < 0) | (ids > newest), hidden, ids))
        ids[..., 1:] = np.where(ids[..., 1:] == ids[..., :-1], hidden, ids[..., 1:])
        ids = np.sort(ids)
        num_keys = np.minimum(position + 1 - ids * block_size, block_size).clip(min=0).sum(-1).flatten()
        longest = max(1, int(num_keys.max()))
        ids = ids[..., : -(-longest // block_size)]
        last = np.where(ids < hidden, ids, -1).max(-1, keepdims=True)
        ids = np.where(ids < hidden, ids, np.where(last >= 0, last, newest))
        row, first = locate_block(batch, k_start, ids, block_size, page_table)
        key = first[..., None] + np.minimum(np.arange(block_size), (position - ids * block_size)[..., None])
        place = ((row * num_heads + np.arange(num_heads)[:, None]) * seqlen_k)[..., None] + key
        place = place.reshape(len(num_keys), -1)[:, :longest]
        self._place = torch.as_tensor(place.flatten())
        self._shape = *num_keys.shape, longest
        least = num_keys.min()
        self.is_padding = torch.as_tensor(np.arange(longest) >= num_keys[:, None]) if least < longest else None
        self._is_blind = torch.as_tensor(num_keys == 0)[:, None, None] if least == 0 else None

    def clear_blind(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """out [J, G, D] and lse [J, G, 1], set to 0 and -inf for rows without keys."""
        if self._is_blind is None:
            return out, lse
        return out.masked_fill_(self._is_blind, 0.0), lse.masked_fill_(self._is_blind, -torch.inf)

    def gather_stored(self, x: Tensor, scratch: Scratch, name: str) -> Tensor:
        """x [B,Hkv,S,...], or its pages, to [J, L, ...] in x's dtype, in the buffer of that name."""
        stored = x.view(torch.int8) if fp8.is_e4m3(x) else x
        try:
            # Equal steps between tokens, as in contiguous memory, or where an engine keeps values beside keys.
            rows = stored.view(-1, *x.shape[3:])
        except RuntimeError:
            gathered = stored[torch.unravel_index(self._place, x.shape[:3])]
        else:
            gathered = scratch.take(name, self._place.numel(), *x.shape[3:], dtype=stored.dtype)
            torch.index_select(rows, 0, self._place, out=gathered)
        return gathered.view(x.dtype).view(*self._shape, *x.shape[3:])

    def gather(self, x: Tensor, scratch: Scratch) -> Tensor:
        """The gathered keys in the compute dtype, e4m3 divided by ``fp8.SHIFT``; valid until the next call."""
        gathered = self.gather_stored(x, scratch, "gathered")
        if x.dtype == scratch.dtype:
            return gathered
        return scratch.widen(gathered, scratch.take("widened", *gathered.shape))
