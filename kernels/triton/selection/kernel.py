"""The scorer: scores, block maxima and top-k of query rows in one pass over the index keys.

Formulas and layouts are in `launch`. One program owns `rows` query rows, rows // Hkv neighbouring tokens times all Hkv
groups of one sequence, and a range of its blocks: all of them, or one split's share. So each key is loaded once for all
groups. The program holds its queries, loops over the blocks, and keeps each row's best ones (see `topk.start_topk`):
with a period of 1 it inserts the blocks into lists one by one, else it collects the maxima of `period` blocks, and
merges them if any row has one that beats its worst. Blocks that every row of the tile sees whole and that are not
forced are scored without masks; the last block always takes the masked path. A block of fp32 keys is scored in parts,
as no tensor core multiplies them.

Cost: 2 Hkv Di FLOPs per (query, visible key). A block costs each row block_size comparisons for the maximum and 5 kept
operations for the insertion (or about 8 exchanges of 64-bit keys for its part of a merge), against block_size * Di
multiply-adds. Keys are read Sq * Hkv / rows times, from L2; memory sees index_k about once.

Few query rows leave the GPU idle, so the keys are then split; each split writes a list of its kept keys, int64.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.fp8 import as_bits, split_e4m3
from ..common.launch import View
from ..common.overlap import await_previous
from ..common.records import load_sequence
from ..common.tiles import box_strides, find_tile
from .config import SelectionConfig
from .rule import first_kept, forced_from
from .scoring import (
    Bounds,
    IndexKeys,
    QueryTile,
    any_maximum,
    clear_maximum,
    load_keys,
    load_queries,
    look_ahead,
    score_halves,
    score_keys,
    tile_rows,
)
from .topk import collect, ids_place, list_row, start_topk, store_topk


class Seen(NamedTuple):
    """The keys that rows of a tile see: visible [rows], 0 where there is no row; and the least and the most of them."""

    visible: Any
    first: Any
    last: Any


@triton.jit
def selection_kernel(
    index_q, index_k, index_k_scale, pages, seqlen_k, sequences_ptr, tiles, forced, outputs, C: tl.constexpr
):
    """See the module's docstring. Grid (tiles, splits)."""
    await_previous(C.overlap)
    number = find_tile(tl.program_id(0), tiles, C.tokens)
    if number.sequence >= tiles.num_sequences:
        return
    sequence = load_sequence(sequences_ptr, number.sequence)
    q_end = sequence.q_end
    first = sequence.q_start + number.number * C.tokens
    if first >= q_end:
        return
    num_keys = sequence.k_end - sequence.k_start
    tile = QueryTile(number.sequence, sequence.batch, sequence.q_start, q_end, first, sequence.k_start, num_keys, None)
    token, _, live = tile_rows(tile, tl.arange(0, C.rows), C)
    visible = tl.where(live, num_keys - q_end + token + 1, 0)
    seen = Seen(visible, num_keys - q_end + first + 1, num_keys - q_end + tl.minimum(first + C.tokens, q_end))
    keys = IndexKeys(index_k, index_k_scale, pages, seqlen_k)
    rank_tile(index_q, keys, tile, seen, tiles.seqlen_q, forced, outputs, C)


@triton.jit
def rank_tile(index_q, keys, tile, seen, seqlen_q, forced, outputs, C: tl.constexpr):
    """Write the top-k of a QueryTile's rows; seqlen_q: tokens that a sequence has lists for, if there are lists."""
    tl.static_assert(C.columns >= C.block_size or not (C.clear or C.swap), "only the masked path takes parts of blocks")
    row = tl.arange(0, C.rows)
    visible = seen.visible
    num_blocks = tl.cdiv(tl.maximum(seen.last, 0), C.block_size)
    clear_end = tl.minimum(seen.first // C.block_size, forced_from(forced, (seen.first - 1) // C.block_size))

    unscored = first_kept(forced, num_blocks, C.unscored)
    share = tl.cdiv(tl.maximum(num_blocks - unscored, 0), outputs.num_splits)
    begin = unscored + tl.program_id(1) * share
    end = tl.minimum(begin + share, num_blocks)

    topk = start_topk(tl.where(tl.program_id(1) == 0, unscored, 0), visible, C)
    masked = tl.maximum(begin, tl.minimum(clear_end, end - 1)) if C.clear else begin
    if C.halves:
        topk = score_halves(topk, index_q, keys, tile, Bounds(begin, masked, end), visible, forced, C)
    else:
        scaled: tl.constexpr = keys.scale is not None
        q = load_queries(index_q, row, tile, C)
        if C.fp8_product and scaled:
            q = split_e4m3(q)
        found = look_ahead(keys, tile, begin, end - 1, C)
        if C.clear:
            for block in range(begin, masked):
                loaded = load_keys(keys, found.place, C.block_size, C.block_size, True, C)
                best = clear_maximum(score_keys(q, loaded, found.scales, scaled, C))
                found = look_ahead(keys, tile, block + 1, end - 1, C)
                topk = collect(topk, best, block, False, C)
        for block in tl.range(masked, end, num_stages=1 if C.clear else None):
            best = any_maximum(q, keys, tile, found, block, visible, forced, C)
            found = look_ahead(keys, tile, block + 1, end - 1, C)
            topk = collect(topk, best, block, block == end - 1, C)
    token, group, live = tile_rows(tile, row, C)
    ids_row = ids_place(outputs.ids, tile.batch, group, token)
    if tile.listed is None:
        lists_row = list_row(tile.sequence, token - tile.q_start, group, seqlen_q, C.num_kv_heads)
    else:
        lists_row = tile.first + row
    store_topk(topk, outputs, ids_row, lists_row, live, C)


def key_arguments(
    index_k: torch.Tensor, index_k_scale: torch.Tensor | None, config: SelectionConfig, block_size: int, num_tiles: int
) -> dict[str, Any]:
    """The kernel's arguments for the keys: a TMA descriptor of tiles [1, block_size, Di], or a View, and the scales."""
    # e4m3 keys that are multiplied as they are keep their type, which `view` would change; so do int8 keys.
    index_k = index_k if config.fp8_product else as_bits(index_k)
    tiles: TensorDescriptor | View = View(index_k, *index_k.stride())
    if config.use_tma:
        keys = index_k[:, 0]
        tiles = TensorDescriptor(keys, list(keys.shape), box_strides(keys), [1, block_size, keys.shape[2]])
    return {"index_k": tiles, "index_k_scale": index_k_scale}


KERNEL = selection_kernel


def supports(config: SelectionConfig) -> bool:
    """Every configuration."""
    return True
