"""Block selection: scores, block maxima and top-k in one pass over the index keys.

    score[i, r, j] = <index_q[i, r], index_k[j]>                    fp32; NaN counts as -inf
    m[i, r, b]     = max over visible j of block b, clamped to [-FLT_MAX, FLT_MAX]; +inf if b is forced
    ids[i, r]      = the topk visible blocks with the largest m, the smaller id first among equals, ascending

Layouts: index_q [B, Hkv, Sq, Di], index_k [B, 1, Sk, Di], any strides; ids [B, Hkv, Sq, topk] int32 contiguous, padded
with -1. Sequences as in `flexmsa.kernels`. With page_table [B, max_pages], index_k is pages [num_pages, 1, block_size,
Di], and block b of row r is in page page_table[r, b]. e4m3 keys have scales of the shape of index_k but for Di: a key
is multiplied as it is stored, and its score by its scale. Queries may be e4m3 too, to keys without scales: Hopper
multiplies them in half the time. It adds up products of e4m3 numbers with about 14 bits instead of fp32's 24. int8 keys
have such scales too; there queries are rounded to int8, and products are exact (see `common.int8`).

Two implementations: `kernel` takes all problems; `kernel_sm90` takes a few query rows on Hopper, if the bulk copy
engine can read the keys. Where the keys are split, each split writes a list of its best blocks, and `merge` makes one
of them: in a kernel of its own, or in that of the attention (see `serving`). For many queries and keys on Hopper,
`certified` finds the same ids from int8 scores, and leaves a few rows to `kernel`.

Cost: 2 Hkv Di FLOPs per (query, visible key): 8.8 TFLOP at 128K causal tokens with Hkv 4, Di 128, which is 11.2 ms at
783 TFLOP/s. Decoding reads Sk * Di elements, 256 MB at 1M bf16, 60 us at 4.25 TB/s, and half of it in e4m3 or int8.
"""

from dataclasses import replace
from typing import Any

import torch

from ...problem import Problem
from ...rules import SelectionRule
from ...sequences import table_rows
from ...tuning import certified_selection, tuned_config
from ..common.launch import Launch, Options, compile_other_lengths, for_one_length, is_ahead, on_meta, view
from ..common.records import capacity_of, keys_per_row, pages_of, table_on_meta
from ..common.target import GLUON, target_of
from ..common.tiles import length_key, tile_table, tma_ready
from . import kernel
from .certified.launch import fills, select_certified
from .config import CERTIFIED_KEYS, DEPENDS_ON, SelectionConfig, default_config, most_splits, selection_constants
from .merge import Lists, merge_splits
from .rule import ForcedBlocks
from .topk import Outputs, ids_of

# The first that supports a configuration runs. Other versions of Triton may lack what the kernel in Gluon needs.
IMPLEMENTATIONS: tuple[Any, ...] = (kernel,)
if GLUON:
    from . import kernel_sm90

    IMPLEMENTATIONS = (kernel_sm90, *IMPLEMENTATIONS)

# Numbers of blocks that between them take every variant of the kernels: without splits, with few and with many.
VARIANTS = (1, 40, 4096)
# The same where there are as many queries as keys: whether splits fill the GPU better changes several times, and from
# the last number on int8 scores are taken.
TRAINING_VARIANTS = (1, *range(8, 128, 8), 192, 256, 2 * CERTIFIED_KEYS // 128)


def choose_config(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    rule: SelectionRule,
    page_table: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
    cached: bool = False,
) -> SelectionConfig:
    """The configuration for these tensors: the default, with the changes of tuning.

    cached: index_k is a cache, which may hold no more keys than there are queries.
    """
    batch, num_kv_heads, seqlen_q, index_head_dim = index_q.shape
    scales_ready = index_k_scale is None or (index_k_scale.is_contiguous() and index_k_scale.data_ptr() % 16 == 0)
    problem = Problem(
        num_kv_heads,
        index_q.dtype,
        index_head_dim=index_head_dim,
        block_size=rule.block_size,
        topk=rule.topk,
        key_dtype=index_k.dtype,
        paged=page_table is not None,
        bulk_copies=scales_ready and tma_ready(index_k),
    )
    # Of the two sequences of a row whose queries are not all new, one has no keys to score.
    num_sequences = table_rows(sequences).shape[0]
    packed = num_sequences > 2 * batch
    num_sequences = num_sequences if packed else batch
    target = target_of(index_q.device)
    keys = capacity_of(page_table, index_k)
    # How long packed documents are, and which rows of a batch are padded, is not known here.
    known_keys = (min(keys, seqlen_q) if cached else keys) if sequences.shape == (1, 5) else 0
    shipped = default_config(problem, target, num_sequences, seqlen_q, keys, packed and problem.paged, known_keys)
    if shipped.certified and not (certified_selection() and fills(target, problem, keys)):
        shipped = replace(shipped, certified=False)
    return tuned_config("selection", problem, target, shipped, DEPENDS_ON)


def rank_blocks(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    rule: SelectionRule,
    page_table: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
    config: SelectionConfig | None = None,
    with_scores: bool = False,
    ids: torch.Tensor | None = None,
    cached: bool = False,
) -> tuple[torch.Tensor, Lists | None]:
    """(block_indices, None), or, where the keys are split, (block_indices to be written, Lists to merge).

    `config` overrides the choice of tiles, for tests and tuning. with_scores: there are Lists in any case, and all of
    their blocks are scored. `ids` are written where they are given, with any strides but the last. cached: as for
    `choose_config`.
    """
    batch, num_kv_heads, seqlen_q, _ = index_q.shape
    if ids is None:
        ids = torch.empty(batch, num_kv_heads, seqlen_q, rule.topk, dtype=torch.int32, device=index_q.device)
    if ids.numel() == 0:
        return ids, None
    config = config or choose_config(index_q, index_k, sequences, rule, page_table, index_k_scale, cached)
    if config.certified and not with_scores:
        select_certified(index_q, index_k, sequences, rule, config, ids)
        return ids, None
    if index_q.dtype == torch.float8_e4m3fn and not config.fp8_product:
        index_q, index_k = index_q.to(torch.float16), index_k.to(torch.float16)
    lists = None
    if config.num_splits > 1 or with_scores:
        num_rows = table_rows(sequences).shape[0] * seqlen_q * num_kv_heads
        keys = ids.new_empty(num_rows, config.num_splits, config.kept, dtype=torch.int64)
        lists = Lists(keys, config.num_splits, config.kept, most_splits(config, target_of(ids.device)))
    target = target_of(ids.device)
    tiles, num_tiles = tile_table(sequences, batch, seqlen_q, config.tokens(num_kv_heads))
    implementation = next(x for x in IMPLEMENTATIONS if x.supports(config))
    arguments = {
        "index_q": view(index_q),
        **implementation.key_arguments(index_k, index_k_scale, config, rule.block_size, num_tiles),
        "pages": pages_of(page_table, index_k),
        "seqlen_k": keys_per_row(index_k_scale, index_k),
        "sequences_ptr": sequences,
        "tiles": tiles,
        "forced": ForcedBlocks(rule.num_local_blocks, rule.num_init_blocks),
        "outputs": Outputs(ids_of(ids), None if lists is None else lists.keys, config.num_splits),
    }
    constants = selection_constants(config, num_kv_heads, index_q.shape[3], rule, target, with_scores)
    options = Options(config.num_warps, config.num_stages, overlap=target.overlaps)
    grid = num_tiles, config.num_splits, 1
    Launch(implementation.KERNEL, grid, arguments, {"C": constants}, options).run()
    return ids, lists


def select_blocks(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    rule: SelectionRule,
    page_table: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
    ids: torch.Tensor | None = None,
    config: SelectionConfig | None = None,
) -> torch.Tensor:
    """block_indices [B, Hkv, Sq, topk] int32, as the module's docstring defines them; others as for `rank_blocks`."""
    if is_ahead() and config is None:
        vectors, tables = (index_q, index_k, index_k_scale), (on_meta(sequences), page_table)
        for number in VARIANTS:
            select_on_meta(vectors, *tables, rule, number, ids=on_meta(ids))
        trains = page_table is None and index_q.shape[2] == index_k.shape[2]
        for number in TRAINING_VARIANTS if trains else ():
            select_on_meta(vectors, *tables, rule, number, number)
    elif page_table is not None:
        compile_other_lengths(("select", index_q.device, length_key(index_q), index_k.dtype, rule))
    ids, lists = rank_blocks(index_q, index_k, sequences, rule, page_table, index_k_scale, config, ids=ids)
    if lists is not None:
        merge_splits(lists, ids, sequences)
    return ids


def scored_blocks(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    rule: SelectionRule,
    page_table: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
    config: SelectionConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_indices, scores) [B, Hkv, Sq, topk], the best first, of a rule without forced blocks; then -1 and -inf."""
    if is_ahead() and config is None:
        vectors, table = (on_meta(index_q), index_k, index_k_scale), on_meta(sequences)
        for number in VARIANTS:
            scored_on_meta(vectors, page_table, table, rule, number)
    ids, lists = rank_blocks(index_q, index_k, sequences, rule, page_table, index_k_scale, config, with_scores=True)
    scores = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    if lists is not None:
        merge_splits(lists, ids, sequences, scores)
    return ids, scores


def with_room(stored: Any, page_table: Any, num_blocks: int, block_size: int) -> tuple[Any, Any]:
    """Like `stored`, vectors and scales of a cache, and its page table: on meta, with room for num_blocks blocks."""
    if page_table is not None:
        return stored, table_on_meta(page_table, num_blocks)
    return [on_meta(x, num_blocks * block_size) for x in stored], None


def scored_on_meta(vectors: Any, page_table: Any, sequences: Any, rule: SelectionRule, num_blocks: int) -> None:
    """`scored_blocks` on meta tensors, for caches whose rows have room for num_blocks blocks."""
    (index_k, scale), table = with_room(vectors[1:], page_table, num_blocks, rule.block_size)
    with for_one_length():
        scored_blocks(vectors[0], index_k, sequences, rule, table, scale)


def select_on_meta(
    vectors: Any,
    sequences: torch.Tensor,
    page_table: Any,
    rule: SelectionRule,
    num_blocks: int,
    query_blocks: int | None = None,
    ids: Any = None,
) -> None:
    """`select_blocks` on meta tensors like `vectors` (index_q, index_k, its scales), of num_blocks blocks.

    query_blocks: if given, the number of queries, in blocks.
    """
    index_q = on_meta(vectors[0], query_blocks and query_blocks * rule.block_size)
    (index_k, scale), table = with_room(vectors[1:], page_table, num_blocks, rule.block_size)
    with for_one_length():
        select_blocks(index_q, index_k, sequences, rule, table, scale, ids)
