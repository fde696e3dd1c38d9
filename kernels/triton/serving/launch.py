"""The attention of queries to chosen blocks, of a few queries or of many, and decoding, the selection with it."""

import functools
from typing import Any, NamedTuple

import torch

from ...problem import Problem
from ...rules import FEW_QUERIES, MOST_BLOCKS, SelectionRule
from ..common.fp8 import Cache
from ..common.launch import Launch, Options, compile_other_lengths, for_one_length, is_ahead, on_meta, view
from ..common.records import Scales, keys_per_row, pages_of
from ..common.target import target_of
from ..common.tiles import length_key, tile_table
from ..forward.launch import block_sparse_attention_forward
from ..selection.launch import VARIANTS, rank_blocks, with_room
from ..selection.merge import Lists, merge_splits
from .attend import Results, attend_constants, attend_kernel
from .combine import combine_constants, combine_splits
from .config import AttendConfig, default_config

# With more than FEW_QUERIES per row, and more pairs of a query and a group than these, the tiles of `forward` gain more
# from sharing the loads of neighbours than their many launches cost: measured on an H200 at M3's shape.
FEW_ROWS = 4000
# Longer lists are merged once, in a kernel of its own, and not by each program of the attention.
LONGEST_MERGED = 32


class Chosen(NamedTuple):
    """The blocks that queries chose: block_indices [B, Hkv, Sq, topk], None for every visible block.

    lists: of a selection whose keys were split; block_indices are then written, not read.
    """

    block_indices: torch.Tensor | None
    lists: Lists | None = None


# Made once, because the host's time counts in a decoding step.
attend_problem = functools.lru_cache(Problem)


def are_few(q: torch.Tensor, k: torch.Tensor, block_indices: torch.Tensor | None) -> bool:
    """Whether each query of a call attends to its own blocks; a program of `attend_kernel` holds all of their ids."""
    if block_indices is None or not 0 < block_indices.shape[3] <= MOST_BLOCKS:
        return False
    return q.shape[2] <= FEW_QUERIES or q.shape[0] * q.shape[2] * k.shape[1] <= FEW_ROWS


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Cache,
    chosen: Chosen,
    sequences: torch.Tensor,
    block_size: int,
    scale: float,
    config: AttendConfig | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention to the chosen blocks; ids that are no visible block are skipped.

    A few queries are taken one by one, more queries in the tiles of `forward`. `config` replaces the configuration of
    the former, for tests; `out` is written where it is given, with any strides.
    """
    block_indices, lists = chosen
    few = are_few(q, k, block_indices)
    if lists is not None and (not few or lists.kept > LONGEST_MERGED):
        assert block_indices is not None
        merge_splits(lists, block_indices, sequences)
        lists = None
    if block_indices is None or not few:
        inputs = q, k, v, block_indices, sequences, block_size, scale
        return block_sparse_attention_forward(*inputs, cache=cache, out=out)
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, topk = k.shape[1], block_indices.shape[3]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(batch, num_heads, seqlen_q, dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    target = target_of(q.device)
    sizes = num_heads // num_kv_heads, head_dim
    problem = attend_problem(num_kv_heads, q.dtype, *sizes, block_size=block_size, topk=topk, key_dtype=k.dtype)
    config = config or default_config(problem, target, batch * seqlen_q * num_kv_heads)
    splits = config.num_splits
    results = Results(view(out), lse, splits)
    if splits > 1:
        partial_out, partial_lse = lse.new_empty(*lse.shape, splits, head_dim), lse.new_empty(*lse.shape, splits)
        results = Results(view(partial_out[:, :, :, 0]), partial_lse, splits)
    tiles, num_queries = tile_table(sequences, batch, seqlen_q, 1)
    constants = attend_constants(problem, target, config, None if lists is None else lists.constants)
    Launch(
        attend_kernel,
        (num_queries, num_kv_heads, splits),
        {
            "q": view(q),
            "keys": view(k),
            "values": view(v),
            "scales": Scales(cache.k_scale, cache.v_scale, keys_per_row(cache.k_scale, k)),
            "pages": pages_of(cache.page_table, k),
            "ids_view": view(block_indices),
            "lists": lists,
            "sequences_ptr": sequences,
            "tiles": tiles,
            "results": results,
            "scale": scale,
        },
        {"C": constants},
        Options(config.num_warps, config.num_stages, overlap=constants.overlap),
    ).run()
    if splits > 1:
        combine_splits(partial_out, partial_lse, out, lse, combine_constants(problem, target, config))
    return out, lse


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
    out: torch.Tensor | None = None,
    config: AttendConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of attention to the given blocks, or all visible ones, as `attend` has it."""
    cache = Cache(page_table, k_scale, v_scale)
    return attend(q, k, v, cache, Chosen(block_indices), sequences, block_size, scale, config, out)


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
    out: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(out, lse, block_indices) of `select_blocks` and `attend_blocks`, in a launch less where the keys are split.

    `out` and `ids` are written where they are given. Scales of pages may be [block_size], of each page.
    """
    stored = k, v, index_k, k_scale, v_scale, index_k_scale
    if is_ahead():
        queries, written = (on_meta(q), on_meta(index_q)), (on_meta(out), on_meta(ids))
        for number in VARIANTS:
            attend_on_meta(queries, stored, page_table, on_meta(sequences), rule, scale, number, *written)
    else:
        kinds = length_key(q), length_key(index_q), q.dtype, k.dtype, index_k.dtype, page_table is None
        compile_other_lengths((q.device, *kinds, rule))
    ids, lists = rank_blocks(index_q, index_k, sequences, rule, page_table, index_k_scale, ids=ids, cached=True)
    cache = Cache(page_table, k_scale, v_scale)
    out, lse = attend(q, k, v, cache, Chosen(ids, lists), sequences, rule.block_size, scale, out=out)
    return out, lse, ids


def attend_on_meta(
    queries: Any,
    stored: Any,
    page_table: Any,
    sequences: Any,
    rule: SelectionRule,
    scale: float,
    num_blocks: int,
    out: Any = None,
    ids: Any = None,
) -> None:
    """`select_and_attend` on meta tensors, for caches whose rows have room for num_blocks blocks."""
    stored, table = with_room(stored, page_table, num_blocks, rule.block_size)
    arguments: Any = *queries, *stored[:3], sequences, rule, scale, table, *stored[3:], out, ids
    with for_one_length():
        select_and_attend(*arguments)
