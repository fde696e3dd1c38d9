"""Decoding: the attention of new queries to chosen blocks of a cache, and the selection with it."""

import torch

from ...rules import SelectionRule
from ..common.fp8 import Cache, as_bits
from ..common.primitives import page_arguments, tile_ends
from ..common.target import storage_constants, target_of
from ..forward.launch import block_sparse_attention_forward
from ..selection.launch import rank_blocks
from ..selection.merge import Lists, merge_splits
from .attend import attend_constants, attend_kernel
from .combine import combine_splits
from .config import AttendConfig, attend_config

# With more queries a sequence, and more pairs of a query and a group in all, the tiles of `attention` gain more from
# sharing what neighbours load than their many launches cost: measured on an H200 at M3's shape.
FEW_QUERIES, FEW_ROWS = 16, 4000
# Longer lists are merged once, in a kernel of its own, and not by each program of the attention.
LONGEST_MERGED = 32


def attend_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor | None,
    sequences: torch.Tensor,
    block_size: int,
    scale: float,
    page_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    config: AttendConfig | None = None,
    lists: Lists | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention over the given blocks, or all visible ones; ids that are no visible block are skipped.

    A few queries are taken one by one, more in the tiles of `attention`. `config` overrides the choice of tiles of
    the former, for tests and tuning. With the lists of `selection.rank_blocks`, block_indices is written, not read.
    """
    many = q.shape[2] > FEW_QUERIES and q.shape[0] * q.shape[2] * k.shape[1] > FEW_ROWS
    if lists is not None and (many or lists.kept > LONGEST_MERGED):
        assert block_indices is not None
        merge_splits(lists, block_indices, sequences)
        lists = None
    if block_indices is None or many:
        cache = Cache(page_table, k_scale, v_scale)
        return block_sparse_attention_forward(q, k, v, block_indices, sequences, block_size, scale, cache=cache)
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, topk = k.shape[1], block_indices.shape[3]
    out = torch.empty(batch, num_heads, seqlen_q, head_dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    target = target_of(q.device)
    config = config or attend_config(
        target,
        num_rows=batch * seqlen_q * num_kv_heads,
        head_dim=head_dim,
        block_size=block_size,
        topk=topk,
        element_size=q.element_size(),
    )
    splits = config.num_splits
    partial_out, partial_lse = out, lse
    if splits > 1:
        partial_out = lse.new_empty(lse.numel(), splits, head_dim)
        partial_lse = lse.new_empty(lse.numel(), splits)
    ends, num_queries, table = tile_ends(sequences, batch, seqlen_q, 1)
    pages, max_pages, num_pages = page_arguments(page_table, sequences, k)
    attend_kernel[(num_queries, num_kv_heads, splits)](
        q,
        as_bits(k),
        as_bits(v),
        lse if k_scale is None else k_scale,
        lse if v_scale is None else v_scale,
        block_indices,
        sequences if lists is None else lists.keys,
        sequences,
        ends,
        pages,
        partial_out,
        partial_lse,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *block_indices.stride(),
        sequences.shape[0],
        seqlen_q,
        k.shape[2],
        max_pages,
        num_pages,
        splits,
        0 if lists is None else lists.num_lists,
        scale,
        **attend_constants(
            *(config, num_kv_heads, num_heads // num_kv_heads, head_dim, block_size, topk, table),
            lists,
        ),
        **storage_constants(target, page_table is not None, k_scale is not None),
        **target.overlap(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        combine_splits(partial_out, partial_lse, out, lse, target)
    return out, lse


def select_and_attend(
    q: torch.Tensor,
    index_q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    rule: SelectionRule,
    scale: float,
    page_table: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, block_indices) of `select_blocks` and `attend_blocks`, in a launch less where the keys are split."""
    ids, lists = rank_blocks(index_q, index_k, sequences, rule, page_table, index_k_scale)
    out, lse = attend_blocks(q, k, v, ids, sequences, rule.block_size, scale, page_table, k_scale, v_scale, lists=lists)
    return out, lse, ids
