"""Attention of a few new queries, or of a chunk of a prompt, to the chosen blocks of a cache.

A few queries share hardly any block, so each (query, group) gathers its own: what is read is proportional to
topk * block_size. Many queries work through the blocks as in training.
"""

import torch
from torch import Tensor

from flexmsa.kernels.cpu import fp8
from flexmsa.kernels.cpu.attention import block_sparse_attention_forward
from flexmsa.kernels.cpu.packing import Scratch, check_page_table, compute_dtype, locate_block, query_positions
from flexmsa.kernels.cpu.selection import select_blocks

# The most queries of a row that gather their blocks.
_FEW_QUERIES = 16
# Widening these would take longer than all else; float32 is as fast by plain products.
_FUSED = (torch.bfloat16, torch.float16)
# Numbers gathered at once, of keys and of values each.
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
) -> tuple[Tensor, Tensor]:
    """out [B,Hq,Sq,D] and lse [B,Hq,Sq] of ``block_sparse_attention_forward``, whose arguments these are."""
    check_page_table(page_table, sequences, block_size, k.shape[0])
    if block_indices is None or q.shape[2] > _FEW_QUERIES:
        return block_sparse_attention_forward(
            q, k, v, block_indices, sequences, block_size, scale, page_table, k_scale, v_scale
        )
    num_heads, dtype = k.shape[1], compute_dtype(q.dtype)
    out = torch.zeros(q.shape, dtype=q.dtype)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=dtype)
    sequence, position = query_positions(sequences, q.shape[0], q.shape[2])
    k_start = sequences[:, 3].to(torch.int64)[sequence]
    scratch = Scratch(dtype)
    step = max(1, _GATHERED // (num_heads * max(1, block_indices.shape[-1]) * block_size * q.shape[-1]))
    queries = (position >= 0).nonzero()
    for start in range(0, len(queries), step):
        batch, token = queries[start : start + step].unbind(1)
        ids = block_indices[batch, :, token].to(torch.int64)
        keys = _ChosenKeys(
            ids, batch, position[batch, token], k_start[batch, token], block_size, k.shape[2], page_table
        )
        rows = q[batch, :, token].view(len(batch) * num_heads, -1, q.shape[-1])
        if k_scale is None and v_scale is None and q.dtype in _FUSED:
            result, row_lse = _attend_fused(rows, k, v, scale, keys, scratch)
        else:
            result, row_lse = _attend(rows.to(dtype).mul_(scale), k, v, k_scale, v_scale, keys, scratch)
        out[batch, :, token] = result.reshape(len(batch), -1, q.shape[-1]).to(out.dtype)
        lse[batch, :, token] = row_lse.reshape(len(batch), -1)
    return out, lse


def select_and_attend(
    q: Tensor,
    index_q: Tensor,
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    sequences: Tensor,
    block_size: int,
    topk: int,
    num_local_blocks: int,
    num_init_blocks: int,
    scale: float,
    page_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    index_k_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, block_indices) of ``select_blocks`` and ``attend_blocks``."""
    rules = block_size, topk, num_local_blocks, num_init_blocks
    ids = select_blocks(index_q, index_k, sequences, *rules, page_table, index_k_scale)
    return *attend_blocks(q, k, v, ids, sequences, block_size, scale, page_table, k_scale, v_scale), ids


def _attend_fused(
    rows: Tensor, k: Tensor, v: Tensor, scale: float, keys: "_ChosenKeys", scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """rows [J, G, D] to their results [J, G, D] and lse [J, G], by the kernel of scaled_dot_product_attention.

    It takes keys and values as they are stored, and its own lse, which the public function keeps to itself.
    """
    mask = torch.zeros(keys.is_padding.shape, dtype=rows.dtype).masked_fill_(keys.is_padding, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows[None],
        keys.gather_stored(k, scratch, "gathered keys")[None],
        keys.gather_stored(v, scratch, "gathered values")[None],
        attn_mask=mask[None, :, None].expand(1, *rows.shape[:2], -1),
        scale=scale,
    )
    sees_nothing = keys.is_padding.all(-1)[:, None]
    return out[0].masked_fill_(sees_nothing[..., None], 0.0), lse[0].masked_fill_(sees_nothing, -torch.inf)


def _attend(
    rows: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    keys: "_ChosenKeys",
    scratch: Scratch,
) -> tuple[Tensor, Tensor]:
    """rows [J, G, D], times the scale, to their results [J, G, D] and lse [J, G, 1]."""
    gathered = keys.gather(k, scratch)
    scores = torch.bmm(rows, gathered.transpose(1, 2), out=scratch.take("scores", *rows.shape[:2], gathered.shape[1]))
    if k_scale is not None:
        scores.mul_(fp8.factors(keys.gather(fp8.as_scales(k_scale), scratch))[:, None])
    scores.masked_fill_(keys.is_padding[:, None], torch.finfo(scores.dtype).min)
    # Softmax is one fused pass, and its largest value gives back the logsumexp.
    maximum = scores.amax(-1, keepdim=True)
    probs = torch.softmax(scores, -1, out=scratch.take("probs", *scores.shape))
    lse = maximum.sub_(probs.amax(-1, keepdim=True).log_())
    if v_scale is not None:
        probs.mul_(fp8.factors(keys.gather(fp8.as_scales(v_scale), scratch))[:, None])
    out = torch.bmm(probs, keys.gather(v, scratch))
    sees_nothing = keys.is_padding.all(-1)[:, None, None]
    return out.masked_fill_(sees_nothing, 0.0), lse.masked_fill_(sees_nothing, -torch.inf)


class _ChosenKeys:
    """The visible keys of the chosen blocks of J jobs, one for each query and group: L places for each job.

    A job with fewer keys has some of them again, as padding: so nothing is read that it does not attend to. (One
    without any key has keys of its newest block.)
    """

    def __init__(
        self,
        ids: Tensor,
        batch: Tensor,
        position: Tensor,
        k_start: Tensor,
        block_size: int,
        seqlen_k: int,
        page_table: Tensor | None,
    ) -> None:
        """ids [n, Hkv, topk]; batch row, newest visible key and first key of the sequence [n].

        seqlen_k is the cache's third dimension.
        """
        batch, position, k_start = (x[:, None, None] for x in (batch, position, k_start))
        newest = position // block_size
        ids = torch.where((ids >= 0) & (ids <= newest), ids, -1).sort(-1).values
        ids[..., 1:].masked_fill_(ids[..., 1:] == ids[..., :-1], -1)
        ids = ids.sort(-1, descending=True).values
        visible = ids >= 0
        longest = max(1, int(visible.sum(-1).max()))
        ids, visible = ids[..., :longest], visible[..., :longest]
        ids = torch.where(visible, ids, torch.where(visible[..., :1], ids[..., :1], newest))
        row, first = locate_block(batch, k_start, ids, block_size, page_table)
        offset, last = torch.arange(block_size), (position - ids * block_size)[..., None]
        head = torch.arange(ids.shape[1])[:, None]
        key = first[..., None] + torch.minimum(offset, last)
        self._where = row[..., None], head[..., None], key
        self._index = (((row * ids.shape[1] + head) * seqlen_k)[..., None] + key).flatten()
        self.is_padding = (~visible[..., None] | (offset > last)).flatten(2).flatten(0, 1)

    def gather_stored(self, x: Tensor, scratch: Scratch, name: str) -> Tensor:
        """x [B,Hkv,S,...] or pages of it to [J, L, ...] as it is stored, in the buffer of that name."""
        stored = x.view(torch.int8) if fp8.is_e4m3(x) else x
        if stored.is_contiguous():
            gathered = scratch.take(name, self._index.numel(), *x.shape[3:], dtype=stored.dtype)
            torch.index_select(stored.flatten(0, 2), 0, self._index, out=gathered)
        else:
            gathered = stored[self._where]
        return gathered.view(x.dtype).view(*self.is_padding.shape, *x.shape[3:])

    def gather(self, x: Tensor, scratch: Scratch) -> Tensor:
        """The same in the compute dtype, e4m3 divided by ``fp8.SHIFT``; valid until the next call."""
        gathered = self.gather_stored(x, scratch, "gathered")
        return (
            gathered if x.dtype == scratch.dtype else scratch.widen(gathered, scratch.take("widened", *gathered.shape))
        )
