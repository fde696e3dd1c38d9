"""Block selection: scores, block maxima and top-k in one pass over the index keys.

    score[i, r, j] = <index_q[i, r], index_k[j]>                    fp32; NaN counts as -inf
    m[i, r, b]     = max over visible j of block b, clamped to [-FLT_MAX, FLT_MAX]; +inf if b is forced
    ids[i, r]      = the topk visible blocks with the largest m, the smaller id first among equals, ascending

Layouts: index_q [B, Hkv, Sq, Di], index_k [B, 1, Sk, Di], any strides; ids [B, Hkv, Sq, topk] int32 contiguous, padded
with -1. Sequences as in `flexmsa.kernels`. With page_table [B, max_pages], index_k is pages [num_pages, 1, block_size,
Di], and block b of row r lies in page page_table[r, b]. e4m3 keys have scales of the shape of index_k but for Di: a key
is multiplied as it is stored, and its score by its scale. Queries may be e4m3 too, to keys without scales: Hopper
multiplies them in half the time. It adds up products of e4m3 numbers with about 14 bits instead of fp32's 24.

One program owns `rows` query rows, rows // Hkv neighbouring tokens times all Hkv groups of one sequence, and a range of
its blocks: all of them, or one split's share. So each key is loaded once for all groups. The program holds its
queries, walks the blocks, and keeps each row's best ones (see `ranking.start_ranking`): with a period of 1 it inserts
the blocks into lists one by one, else it collects the maxima of `period` blocks, and merges them if any row has one
that beats its worst. Blocks that every row of the tile sees whole and that are not forced are walked without masks;
the last block always takes the masked path. A block of fp32 keys is scored in parts, as no tensor core multiplies them.

Cost: 2 Hkv Di FLOPs per (query, visible key): 8.8 TFLOP at 128K causal tokens with Hkv 4, Di 128, which is 11.2 ms at
783 TFLOP/s. A block costs each row block_size comparisons for the maximum and 5 kept operations for the insertion (or
about 8 exchanges of 64-bit keys for its part of a merge), against block_size * Di multiply-adds. Keys are read Sq * Hkv
/ rows times, from L2; memory sees index_k about once: decoding reads Sk * Di elements, 256 MB at 1M bf16, 60 us at 4.25
TB/s, and half of it in e4m3.

Few query rows leave the GPU idle, so the keys are then split; each split writes a list of its kept keys, int64,
and `merge` makes one of them: in a kernel of its own, or in that of the attention (see `decode`).
On Hopper a few rows are scored by `scoring_hopper`, if the bulk copy engine can read the keys.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...rules import SelectionRule
from ...tuning import tuned
from ..common.fp8 import as_bits, split_e4m3
from ..common.primitives import (
    await_previous,
    find_tile,
    key_limit,
    load_sequence,
    page_arguments,
    tile_ends,
    tma_ready,
)
from ..common.target import padded, storage_constants, target_of
from .config import SelectionConfig, most_splits, selection_config
from .merge import Lists, merge_splits
from .scoring import any_maximum, clear_maximum, load_keys, load_queries, look_ahead, score_keys, walk_halves
from .topk import collect, list_row, start_ranking, store_ranking
from .work_counters import tickets

LENGTHS = ["num_sequences", "seqlen_q", "seqlen_k", "max_pages", "num_pages", "num_splits", "num_local", "num_init"]


@triton.jit(do_not_specialize=LENGTHS)
def selection_kernel(
    index_q_ptr,
    index_k,
    sequences_ptr,
    tile_ends_ptr,
    page_table_ptr,
    index_k_scale_ptr,
    ids_ptr,
    lists_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_ks,
    stride_kd,
    num_sequences,
    seqlen_q,
    seqlen_k,
    max_pages,
    num_pages,
    num_splits,
    num_local,
    num_init,
    GROUPS: tl.constexpr,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    KEPT: tl.constexpr,
    PERIOD: tl.constexpr,
    CLEAR: tl.constexpr,
    HALVES: tl.constexpr,
    TABLE: tl.constexpr,
    SPLIT: tl.constexpr,
    USE_TMA: tl.constexpr,
    SWAP: tl.constexpr,
    FP8_PRODUCT: tl.constexpr,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """See the module's docstring. Grid (tiles, splits)."""
    tl.static_assert(COLUMNS >= BLOCK or not (CLEAR or SWAP), "blocks are taken whole but on the masked path")
    await_previous(OVERLAP)
    TOKENS: tl.constexpr = ROWS // GROUPS
    sequence, tile = find_tile(tl.program_id(0), tile_ends_ptr, num_sequences, seqlen_q, TOKENS, TABLE)
    if sequence >= num_sequences:
        return
    batch, q_start, q_end, k_start, k_end = load_sequence(sequences_ptr, sequence)
    first = q_start + tile * TOKENS
    if first >= q_end:
        return
    row = tl.arange(0, ROWS)
    token = first + row // GROUPS
    live = (token < q_end) & (row // GROUPS < TOKENS)
    num_keys = k_end - k_start
    visible = tl.where(live, num_keys - q_end + token + 1, 0)
    first_visible = num_keys - q_end + first + 1
    num_blocks = tl.cdiv(tl.maximum(num_keys - q_end + tl.minimum(first + TOKENS, q_end), 0), BLOCK)
    clear_end = tl.minimum(first_visible // BLOCK, (first_visible - 1) // BLOCK - num_local + 1)

    forced = tl.where(num_blocks <= TOPK, num_blocks, num_init)
    share = tl.cdiv(tl.maximum(num_blocks - forced, 0), num_splits)
    begin = forced + tl.program_id(1) * share
    end = tl.minimum(begin + share, num_blocks)

    queries = index_q_ptr + batch * stride_qb, stride_qh, stride_qs, stride_qd
    keys_of = index_k, stride_kb, stride_ks, stride_kd
    cache = page_table_ptr, max_pages, num_pages, index_k_scale_ptr, seqlen_k, batch, k_start, num_keys
    ranking = start_ranking(tl.where(tl.program_id(1) == 0, forced, 0), visible, KEPT, PERIOD, BLOCK)
    masked_begin = tl.maximum(begin, tl.minimum(clear_end, end - 1)) if CLEAR else begin
    if HALVES:
        ranking = walk_halves(
            ranking, queries, keys_of, cache, (begin, masked_begin, end), first, q_end, visible, num_local,
            GROUPS, TOKENS, HEAD_DIM, BLOCK, COLUMNS, DEPTH, USE_TMA, PAGED, SCALED, NATIVE, SWAP,
        )  # fmt: skip
    else:
        q = load_queries(queries, row, first, q_end, GROUPS, TOKENS, HEAD_DIM, DEPTH)
        if FP8_PRODUCT and SCALED:
            q = split_e4m3(q)
        place, key, scales = look_ahead(cache, begin, end - 1, BLOCK, COLUMNS, PAGED, SCALED)
        if CLEAR:
            for block in range(begin, masked_begin):
                keys = load_keys(keys_of, place, key, BLOCK, HEAD_DIM, BLOCK, COLUMNS, DEPTH, True, USE_TMA)
                best = clear_maximum(score_keys(q, keys, scales, SCALED, NATIVE, SWAP))
                place, key, scales = look_ahead(cache, block + 1, end - 1, BLOCK, COLUMNS, PAGED, SCALED)
                ranking = collect(ranking, best, block, False, PERIOD)
        for block in tl.range(masked_begin, end, num_stages=1 if CLEAR else None):
            best = any_maximum(
                q, keys_of, cache, place, key, scales, block, visible, num_local,
                HEAD_DIM, BLOCK, COLUMNS, DEPTH, USE_TMA, SCALED, NATIVE, SWAP, FP8_PRODUCT,
            )  # fmt: skip
            place, key, scales = look_ahead(cache, block + 1, end - 1, BLOCK, COLUMNS, PAGED, SCALED)
            ranking = collect(ranking, best, block, block == end - 1, PERIOD)
    ids_row = (batch * GROUPS + row % GROUPS) * seqlen_q + token
    lists_row = list_row(sequence, token - q_start, row % GROUPS, seqlen_q, GROUPS)
    store_ranking(ranking, ids_ptr, lists_ptr, ids_row, lists_row, live, num_splits, TOPK, KEPT, PERIOD, SPLIT)


def key_tiles(index_k: torch.Tensor, config: SelectionConfig, block_size: int):
    """index_k as the kernel takes it: a TMA descriptor of tiles [1, block_size, Di], or the tensor itself."""
    if not config.use_tma:
        return index_k
    return TensorDescriptor(
        index_k,
        [index_k.shape[0], index_k.shape[2], index_k.shape[3]],
        [index_k.stride(0), index_k.stride(2), index_k.stride(3)],
        [1, block_size, index_k.shape[3]],
    )


def kernel_and_tiles(
    index_k: torch.Tensor,
    index_k_scale: torch.Tensor | None,
    sequences: torch.Tensor,
    config: SelectionConfig,
    num_kv_heads: int,
    block_size: int,
    topk: int,
    num_tiles: int,
    table: bool,
) -> tuple[Any, Any, Any, dict[str, Any]]:
    """The kernel of a configuration, keys and scales as it takes them, and arguments that it has for itself."""
    shape = num_kv_heads, index_k.shape[3], block_size, topk, table
    if config.hopper:
        from .kernel_sm90 import scorer_constants, scorer_tiles, selection_hopper_kernel

        tiles = scorer_tiles(index_k, index_k_scale, block_size)
        counters = tickets(num_tiles, index_k.device) if config.num_splits > 1 else sequences
        return selection_hopper_kernel, *tiles, {"tickets_ptr": counters, **scorer_constants(config, *shape)}
    keys = key_tiles(index_k if config.fp8_product else as_bits(index_k), config, block_size)
    scales = sequences if index_k_scale is None else index_k_scale
    return selection_kernel, keys, scales, selection_constants(config, *shape)


def selection_constants(
    config: SelectionConfig,
    num_kv_heads: int,
    index_head_dim: int,
    block_size: int,
    topk: int,
    table: bool,
) -> dict[str, int | bool]:
    """The compile-time arguments of `selection_kernel`, beside those of `storage_constants`."""
    return {
        "GROUPS": num_kv_heads,
        "TOPK": topk,
        "BLOCK": block_size,
        "HEAD_DIM": index_head_dim,
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": padded(index_head_dim),
        "KEPT": config.kept,
        "PERIOD": config.period,
        "CLEAR": config.clear,
        "HALVES": config.halves,
        "TABLE": table,
        "SPLIT": config.num_splits > 1,
        "USE_TMA": config.use_tma,
        "SWAP": config.swap,
        "FP8_PRODUCT": config.fp8_product,
    }


def choose_config(
    index_q,
    index_k,
    sequences,
    rule: SelectionRule,
    page_table: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
) -> SelectionConfig:
    """`selection_config` for these tensors, with what tuning changed."""
    batch, num_kv_heads, seqlen_q, index_head_dim = index_q.shape
    return tuned(
        "selection",
        selection_config,
        target_of(index_q.device),
        # Of the two sequences of a row whose queries are not all new, one has no keys to score.
        num_sequences=batch if sequences.shape[0] <= 2 * batch else sequences.shape[0],
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=key_limit(page_table, index_k),
        index_head_dim=index_head_dim,
        block_size=rule.block_size,
        topk=rule.topk,
        dtype=index_q.dtype,
        key_size=index_k.element_size(),
        tma_ready=tma_ready(index_k),
        scales_ready=index_k_scale is None or (index_k_scale.is_contiguous() and index_k_scale.data_ptr() % 16 == 0),
    )


def rank_blocks(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    rule: SelectionRule,
    page_table: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
    config: SelectionConfig | None = None,
) -> tuple[torch.Tensor, Lists | None]:
    """(block_indices, None), or, where the keys are split, (block_indices to be written, lists to merge).

    The Lists are for `merge`. `config` overrides the choice of tiles, for
    tests and tuning.
    """
    batch, num_kv_heads, seqlen_q, _ = index_q.shape
    ids = torch.empty(batch, num_kv_heads, seqlen_q, rule.topk, dtype=torch.int32, device=index_q.device)
    if ids.numel() == 0:
        return ids, None
    target = target_of(index_q.device)
    config = config or choose_config(index_q, index_k, sequences, rule, page_table, index_k_scale)
    if index_q.dtype == torch.float8_e4m3fn and not config.fp8_product:
        index_q, index_k = index_q.to(torch.float16), index_k.to(torch.float16)
    ends, num_tiles, table = tile_ends(sequences, batch, seqlen_q, config.tokens(num_kv_heads))
    pages, max_pages, num_pages = page_arguments(page_table, sequences, index_k)
    lists = None
    if config.num_splits > 1:
        num_rows = sequences.shape[0] * seqlen_q * num_kv_heads
        lists = ids.new_empty(num_rows, config.num_splits, config.kept, dtype=torch.int64)
    kernel, keys, scales, arguments = kernel_and_tiles(
        index_k, index_k_scale, sequences, config, num_kv_heads, rule.block_size, rule.topk, num_tiles, table
    )
    kernel[(num_tiles, config.num_splits)](
        as_bits(index_q),
        keys,
        sequences,
        ends,
        pages,
        scales,
        ids,
        ids if lists is None else lists,
        *index_q.stride(),
        index_k.stride(0),
        index_k.stride(2),
        index_k.stride(3),
        sequences.shape[0],
        seqlen_q,
        index_k.shape[2],
        max_pages,
        num_pages,
        config.num_splits,
        rule.num_local_blocks,
        rule.num_init_blocks,
        **arguments,
        **storage_constants(target, page_table is not None, index_k_scale is not None),
        **target.overlap(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return ids, None if lists is None else Lists(lists, most_splits(config, target))


def select_blocks(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    rule: SelectionRule,
    page_table: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
    config: SelectionConfig | None = None,
) -> torch.Tensor:
    """block_indices [B, Hkv, Sq, topk] int32, as the module's docstring defines them; `config` as for `rank_blocks`."""
    ids, lists = rank_blocks(
        *(index_q, index_k, sequences, rule, page_table, index_k_scale, config),
    )
    if lists is not None:
        merge_splits(lists, ids, sequences)
    return ids
