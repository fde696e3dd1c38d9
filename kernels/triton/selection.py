"""Block selection: scores, block maxima and top-k in one pass over the index keys.

    score[i, r, j] = <index_q[i, r], index_k[j]>                    fp32; NaN counts as -inf
    m[i, r, b]     = max over visible j of block b, clamped to [-FLT_MAX, FLT_MAX]; +inf if b is forced
    ids[i, r]      = the topk visible blocks with the largest m, the smaller id first among equals, ascending

Layouts: index_q [B, Hkv, Sq, Di], index_k [B, 1, Sk, Di], any strides; ids [B, Hkv, Sq, topk] int32 contiguous, padded
with -1. Sequences as in `flexmsa.kernels`. With page_table [B, max_pages], index_k is pages [num_pages, 1, block_size,
Di], and block b of row r lies in page page_table[r, b]. e4m3 keys have scales of the shape of index_k but for Di: a key
is multiplied as it is stored, which is exact, and its score by its scale.

One program owns `rows` query rows, rows // Hkv neighbouring tokens times all Hkv groups of one sequence, and a range of
its blocks: all of them, or one split's share. So each key is loaded once for all groups. The program holds its
queries, walks the blocks, and collects the maxima of `period` blocks in a tile [period, rows]; then, if any row has
a new block that beats its worst kept one, it merges them into the kept keys [kept, rows]. Blocks that every row
of the tile sees whole and that are not forced are walked without masks; the last block always takes the masked path.

Cost: 2 Hkv Di FLOPs per (query, visible key): 8.8 TFLOP at 128K causal tokens with Hkv 4, Di 128, which is 11.2 ms at
783 TFLOP/s. A block costs each row block_size comparisons for the maximum and about 8 exchanges of 64-bit keys
for the merge, against block_size * Di multiply-adds. Keys are read Sq * Hkv / rows times, from L2; memory sees
index_k about once: decoding reads Sk * Di elements, 256 MB at 1M bf16, 60 us at 4.25 TB/s, and half of it in e4m3.

Few query rows leave the GPU idle, so the keys are then split; each split writes its kept keys to a workspace
[B*Hkv*Sq, splits, kept] int64, and a second kernel merges them: a tree of bitonic half merges.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .configs import SelectionConfig, merge_config, padded, selection_config, storage_constants, target_of
from .fp8 import as_bits, decode_e4m3, load_scales, split_e4m3
from .primitives import (
    EMPTY_KEY,
    FLT_MAX,
    ascending_ids,
    find_tile,
    keep_best,
    keep_best_few,
    key_limit,
    load_sequence,
    locate_block,
    log2,
    merge_bitonic,
    overlap_launches,
    pack_keys,
    page_arguments,
    reverse_columns,
    tile_ends,
    tma_ready,
    worst_kept,
)


@triton.jit
def load_keys(
    index_k, row, key, count, stride_kb, stride_ks, stride_kd,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    USE_TMA: tl.constexpr,
):  # fmt: skip
    """The keys [COLUMNS, DEPTH] of the block that begins at (row, key) of the cache, `count` keys of it, or WHOLE.

    Columns past a block size that is no power of two repeat its last key, which changes no maximum.
    """
    if USE_TMA:
        return tl.reshape(index_k.load([row.to(tl.int32), key, 0]), [COLUMNS, DEPTH])
    else:
        column = tl.minimum(tl.arange(0, COLUMNS), BLOCK - 1)
        depth = tl.arange(0, DEPTH)
        base = index_k + row * stride_kb + key.to(tl.int64) * stride_ks
        place = base + column.to(tl.int64)[:, None] * stride_ks + depth.to(tl.int64)[None, :] * stride_kd
        if WHOLE and HEAD_DIM == DEPTH:
            return tl.load(place)
        else:
            return tl.load(place, mask=(column < count)[:, None] & (depth < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def look_ahead(
    page_table_ptr, max_pages, num_pages, scale_ptr, seqlen_k, batch, k_start, num_keys, block, last,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PAGED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Of a block, or of block `last` if that comes before: where it lies, (row, key), and its scales [COLUMNS].

    Asked for a step before they are needed: what an address waits for would keep the loads of keys from running ahead.
    """
    if PAGED or SCALED:
        block = tl.maximum(tl.minimum(block, last), 0)
    row, key = locate_block(page_table_ptr, max_pages, batch, k_start, block, num_pages, BLOCK, PAGED)
    if SCALED:
        column = tl.minimum(tl.arange(0, COLUMNS), BLOCK - 1)
        scales = load_scales(scale_ptr + row * seqlen_k + key, column, column < num_keys - block * BLOCK)
    else:
        scales = tl.full([COLUMNS], 1.0, tl.float32)
    return row, key, scales


@triton.jit
def score_keys(q, keys, scales, SCALED: tl.constexpr, NATIVE: tl.constexpr, SWAP: tl.constexpr):
    """Scores [rows, columns] of queries [rows, DEPTH] and keys [columns, DEPTH]; SWAP: keys are the product's rows."""
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    if SCALED:
        keys = decode_e4m3(keys, q.dtype, NATIVE)
    if SWAP:
        scores = tl.trans(tl.dot(keys, tl.trans(q), input_precision=precision))
    else:
        scores = tl.dot(q, tl.trans(keys), input_precision=precision)
    return scores * scales[None, :] if SCALED else scores


@triton.jit
def score_e4m3(q, keys, scales):
    """Scores [rows, columns] of queries [2 rows, DEPTH] from `split_e4m3` and e4m3 keys [columns, DEPTH], scaled.

    The tensor cores add up e4m3 products in less than fp32, so no more than 32 of them at a time.
    """
    products = tl.dot(keys, tl.trans(q), max_num_imprecise_acc=32)
    products = tl.reshape(products, [keys.shape[0], 2, q.shape[0] // 2])
    weights = tl.where(tl.arange(0, 2) == 0, 1.0, 1.0 / 16)[None, :, None]
    return tl.trans(tl.sum(products * weights, axis=1) * scales[:, None])


@triton.jit
def clear_maximum(scores):
    """m [rows] of a block that every row sees whole and that is not forced, from its scores [rows, columns]."""
    return tl.minimum(tl.maximum(tl.max(scores, axis=1), -FLT_MAX), FLT_MAX)


@triton.jit
def masked_maximum(scores, block, visible, num_local, BLOCK: tl.constexpr):
    """m [rows] of any block: -inf where a row sees none of it, +inf where it is forced; visible [rows] in keys."""
    column = tl.minimum(tl.arange(0, scores.shape[1]), BLOCK - 1)
    seen = (block * BLOCK + column)[None, :] < visible[:, None]
    best = clear_maximum(tl.where(seen, scores, float("-inf")))
    newest = (visible - 1) // BLOCK
    best = tl.where(block > newest - num_local, float("inf"), best)
    return tl.where(block * BLOCK < visible, best, float("-inf"))


@triton.jit
def collect(kept, fresh, worst, best, block, origin, flush, PERIOD: tl.constexpr, LIVE: tl.constexpr):
    """Note block's maxima `best` [rows] in fresh; merge fresh into kept when it is full, or when told to flush.

    Periods are counted from block `origin` on.
    """
    slot = (block - origin) % PERIOD
    fresh = tl.where(tl.arange(0, PERIOD)[:, None] == slot, best[None, :], fresh)
    if (slot == PERIOD - 1) | flush:
        if tl.max((tl.max(fresh, axis=0) > worst).to(tl.int32), axis=0) > 0:
            kept = keep_best_few(kept, fresh, block - slot, LIVE) if LIVE > 0 else keep_best(kept, fresh, block - slot)
            worst = worst_kept(kept)
        fresh = tl.full(fresh.shape, float("-inf"), tl.float32)
    return kept, fresh, worst


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
    workspace_ptr,
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
    LIVE: tl.constexpr,
    CLEAR: tl.constexpr,
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
    overlap_launches(OVERLAP)
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
    # A long period holds all of a split's share; a short one is counted from 0, which takes a register less.
    origin = begin if LIVE > 0 else 0

    rank = tl.arange(0, KEPT)[:, None]
    given = (rank < forced) & (rank * BLOCK < visible[None, :]) & (tl.program_id(1) == 0)
    kept = tl.where(given, pack_keys(tl.where(given, float("inf"), 0.0), rank), EMPTY_KEY)
    worst = worst_kept(kept)
    fresh = tl.full([PERIOD, ROWS], float("-inf"), tl.float32)

    query_row = (batch * GROUPS + row % GROUPS) * seqlen_q + token
    depth = tl.arange(0, DEPTH)
    q_rows = batch * stride_qb + (row % GROUPS).to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qs
    q = tl.load(
        index_q_ptr + q_rows[:, None] + depth.to(tl.int64)[None, :] * stride_qd,
        mask=live[:, None] & (depth < HEAD_DIM)[None, :],
        other=0.0,
    )
    if FP8_PRODUCT:
        q = split_e4m3(q)
    place, key, scales = look_ahead(
        page_table_ptr, max_pages, num_pages, index_k_scale_ptr, seqlen_k, batch, k_start, num_keys, begin, end - 1,
        BLOCK, COLUMNS, PAGED, SCALED,
    )  # fmt: skip
    masked_begin = begin
    if CLEAR:
        masked_begin = tl.maximum(begin, tl.minimum(clear_end, end - 1))
        for block in range(begin, masked_begin):
            keys = load_keys(
                index_k, place, key, BLOCK, stride_kb, stride_ks, stride_kd,
                HEAD_DIM, BLOCK, COLUMNS, DEPTH, True, USE_TMA,
            )  # fmt: skip
            best = clear_maximum(score_keys(q, keys, scales, SCALED, NATIVE, SWAP))
            place, key, scales = look_ahead(
                page_table_ptr, max_pages, num_pages, index_k_scale_ptr, seqlen_k, batch, k_start, num_keys, block + 1,
                end - 1, BLOCK, COLUMNS, PAGED, SCALED,
            )  # fmt: skip
            kept, fresh, worst = collect(kept, fresh, worst, best, block, origin, False, PERIOD, LIVE)
    for block in tl.range(masked_begin, end, num_stages=1 if CLEAR else None):
        keys = load_keys(
            index_k, place, key, num_keys - block * BLOCK, stride_kb, stride_ks, stride_kd,
            HEAD_DIM, BLOCK, COLUMNS, DEPTH, False, USE_TMA,
        )  # fmt: skip
        scores = score_e4m3(q, keys, scales) if FP8_PRODUCT else score_keys(q, keys, scales, SCALED, NATIVE, SWAP)
        best = masked_maximum(scores, block, visible, num_local, BLOCK)
        place, key, scales = look_ahead(
            page_table_ptr, max_pages, num_pages, index_k_scale_ptr, seqlen_k, batch, k_start, num_keys, block + 1,
            end - 1, BLOCK, COLUMNS, PAGED, SCALED,
        )  # fmt: skip
        kept, fresh, worst = collect(kept, fresh, worst, best, block, origin, block == end - 1, PERIOD, LIVE)

    if SPLIT:
        place = (query_row * num_splits + tl.program_id(1)) * KEPT
        tl.store(workspace_ptr + place[None, :] + rank, kept, mask=live[None, :])
    else:
        ids = ascending_ids(kept, TOPK)
        tl.store(ids_ptr + query_row[None, :] * TOPK + rank, ids, mask=live[None, :] & (rank < TOPK))


@triton.jit(do_not_specialize=["num_rows", "num_splits"])
def merge_kernel(
    workspace_ptr,
    ids_ptr,
    num_rows,
    num_splits,
    TOPK: tl.constexpr,
    KEPT: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """ids of ROWS query rows from the kept keys of their splits, [num_rows, num_splits, KEPT], each descending.

    Columns (row, lane) take the splits lane, lane + LANES, ... in turn, then a tree joins the lanes. To join two
    sorted columns, one of them is reversed and the larger of each pair kept, a bitonic column to be sorted again.
    """
    overlap_launches(OVERLAP)
    COLUMNS: tl.constexpr = ROWS * LANES
    column = tl.arange(0, COLUMNS)[None, :]
    query_row = tl.program_id(0).to(tl.int64) * ROWS + column // LANES
    rank = tl.arange(0, KEPT)[:, None]
    keys = tl.full([KEPT, COLUMNS], EMPTY_KEY, tl.int64)
    for first in range(0, num_splits, LANES):
        split = first + column % LANES
        place = (query_row * num_splits + split) * KEPT + (KEPT - 1 - rank)
        live = (query_row < num_rows) & (split < num_splits)
        more = tl.load(workspace_ptr + place, mask=live, other=EMPTY_KEY)
        keys = merge_bitonic(tl.maximum(keys, more), KEPT, 1)
    for step in tl.static_range(log2(LANES)):
        odd = tl.arange(0, COLUMNS >> step)[None, :] % 2
        keys = tl.where(odd == 1, reverse_columns(keys), keys)
        keys = tl.max(tl.reshape(keys, [KEPT, COLUMNS >> (step + 1), 2]), axis=2)
        keys = merge_bitonic(keys, KEPT, 1)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
    ids = ascending_ids(keys, TOPK)
    tl.store(ids_ptr + row * TOPK + rank, ids, mask=(row < num_rows) & (rank < TOPK))


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
        "COLUMNS": padded(block_size),
        "DEPTH": padded(index_head_dim),
        "KEPT": config.kept,
        "PERIOD": config.period,
        "LIVE": config.live,
        "CLEAR": config.clear,
        "TABLE": table,
        "SPLIT": config.num_splits > 1,
        "USE_TMA": config.use_tma,
        "SWAP": config.swap,
        "FP8_PRODUCT": config.fp8_product,
    }


def choose_config(
    index_q, index_k, sequences, block_size: int, topk: int, page_table: torch.Tensor | None = None
) -> SelectionConfig:
    """`selection_config` for these tensors."""
    batch, num_kv_heads, seqlen_q, index_head_dim = index_q.shape
    return selection_config(
        target_of(index_q.device),
        # Of the two sequences of a row whose queries are not all new, one has no keys to score.
        num_sequences=batch if sequences.shape[0] <= 2 * batch else sequences.shape[0],
        num_kv_heads=num_kv_heads,
        seqlen_q=seqlen_q,
        seqlen_k=key_limit(page_table, index_k),
        index_head_dim=index_head_dim,
        block_size=block_size,
        topk=topk,
        dtype=index_q.dtype,
        key_size=index_k.element_size(),
        tma_ready=tma_ready(index_k),
    )


def select_blocks(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    block_size: int,
    topk: int,
    num_local_blocks: int,
    num_init_blocks: int,
    page_table: torch.Tensor | None = None,
    index_k_scale: torch.Tensor | None = None,
    config: SelectionConfig | None = None,
) -> torch.Tensor:
    """block_indices [B, Hkv, Sq, topk] int32, as the module's docstring defines them.

    `config` overrides the choice of tiles, for tests and tuning.
    """
    batch, num_kv_heads, seqlen_q, index_head_dim = index_q.shape
    ids = torch.empty(batch, num_kv_heads, seqlen_q, topk, dtype=torch.int32, device=index_q.device)
    if ids.numel() == 0:
        return ids
    target = target_of(index_q.device)
    config = config or choose_config(index_q, index_k, sequences, block_size, topk, page_table)
    ends, num_tiles, table = tile_ends(sequences, batch, seqlen_q, config.tokens(num_kv_heads))
    pages, max_pages, num_pages = page_arguments(page_table, sequences, index_k)
    split = config.num_splits > 1
    num_rows = batch * num_kv_heads * seqlen_q
    workspace = ids
    if split:
        workspace = ids.new_empty(num_rows, config.num_splits, config.kept, dtype=torch.int64)
    selection_kernel[(num_tiles, config.num_splits)](
        index_q,
        key_tiles(index_k if config.fp8_product else as_bits(index_k), config, block_size),
        sequences,
        ends,
        pages,
        sequences if index_k_scale is None else index_k_scale,
        ids,
        workspace,
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
        num_local_blocks,
        num_init_blocks,
        **selection_constants(config, num_kv_heads, index_head_dim, block_size, topk, table),
        **storage_constants(target, page_table is not None, index_k_scale is not None),
        **target.overlap(),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if split:
        lanes, rows, num_warps = merge_config(target, num_rows, config.num_splits)
        merge_kernel[(triton.cdiv(num_rows, rows),)](
            workspace,
            ids,
            num_rows,
            config.num_splits,
            TOPK=topk,
            KEPT=config.kept,
            LANES=lanes,
            ROWS=rows,
            **target.overlap(),
            num_warps=num_warps,
        )
    return ids
