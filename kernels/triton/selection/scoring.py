"""Pieces of the selection: loading queries and keys, scores, the maxima of blocks, and the walk in halves."""

import triton
import triton.language as tl

from ..common.fp8 import decode_e4m3, join_pairs, load_scales
from ..common.primitives import FLT_MAX, locate_block
from .topk import insert_block


@triton.jit
def load_queries(
    index_q, row, first, q_end,
    GROUPS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Rows `row` of the tile whose first token is `first`, [rows, DEPTH]; zero past its last token. uint8 are e4m3.

    index_q: (pointer to a row of the batch, strides of head, token and number).
    """
    base, stride_h, stride_s, stride_d = index_q
    token, depth = first + row // GROUPS, tl.arange(0, DEPTH)
    live = (token < q_end) & (row // GROUPS < TOKENS)
    place = (row % GROUPS).to(tl.int64) * stride_h + token.to(tl.int64) * stride_s
    places = base + place[:, None] + depth.to(tl.int64)[None, :] * stride_d
    q = tl.load(places, mask=live[:, None] & (depth < HEAD_DIM)[None, :], other=0.0)
    return q.to(tl.float8e4nv, bitcast=True) if q.dtype == tl.uint8 else q


@triton.jit
def load_keys(
    index_k, row, key, count,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, WHOLE: tl.constexpr,
    USE_TMA: tl.constexpr,
):  # fmt: skip
    """The keys [COLUMNS, DEPTH] of the block that begins at (row, key) of the cache, `count` keys of it, or WHOLE.

    index_k: (tensor or TMA descriptor, strides of row, key and number). Columns past a block size that is no power of
    two repeat its last key, which changes no maximum.
    """
    base, stride_b, stride_s, stride_d = index_k
    if USE_TMA:
        return tl.reshape(base.load([row.to(tl.int32), key, 0]), [COLUMNS, DEPTH])
    else:
        column = tl.minimum(tl.arange(0, COLUMNS), BLOCK - 1)
        depth = tl.arange(0, DEPTH)
        start = base + row * stride_b + key.to(tl.int64) * stride_s
        place = start + column.to(tl.int64)[:, None] * stride_s + depth.to(tl.int64)[None, :] * stride_d
        if WHOLE and HEAD_DIM == DEPTH:
            return tl.load(place)
        else:
            return tl.load(place, mask=(column < count)[:, None] & (depth < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def look_ahead(
    cache, block, last, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, PAGED: tl.constexpr, SCALED: tl.constexpr
):
    """Of a block, or of block `last` if that comes before: where it lies, (row, key), and its scales [COLUMNS].

    cache: (page table, its width, number of pages, pointer to scales, keys of a row, and of the sequence its batch row,
    first key and number of keys). Asked for a step before they are needed: what an address waits for would keep the
    loads of keys from running ahead.
    """
    page_table, max_pages, num_pages, scale_ptr, seqlen_k, batch, k_start, num_keys = cache
    if PAGED or SCALED:
        block = tl.maximum(tl.minimum(block, last), 0)
    row, key = locate_block(page_table, max_pages, batch, k_start, block, num_pages, BLOCK, PAGED)
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

    The tensor cores add up e4m3 products with about 14 bits, 32 of them as well as all. To wait for each 32, and add
    these up in fp32, would take a twentieth of a decoding step, for an error that is far below that of the keys.
    """
    products = tl.dot(keys, tl.trans(q), max_num_imprecise_acc=q.shape[1])
    return tl.trans(join_pairs(products) * scales[:, None])


@triton.jit
def clear_maximum(scores):
    """m [rows] of a block that every row sees whole and that is not forced, from its scores [rows, columns]."""
    return tl.minimum(tl.maximum(tl.max(scores, axis=1), -FLT_MAX), FLT_MAX)


@triton.jit
def ranked_maximum(best, block, visible, num_local, BLOCK: tl.constexpr):
    """m [rows] of any block: `best`, or -inf where a row sees none of it, +inf where it is forced; visible in keys."""
    newest = (visible - 1) // BLOCK
    best = tl.where(block > newest - num_local, float("inf"), best)
    return tl.where(block * BLOCK < visible, best, float("-inf"))


@triton.jit
def masked_maximum(scores, block, visible, num_local, BLOCK: tl.constexpr):
    """m [rows] of any block from its scores [rows, columns]."""
    column = tl.minimum(tl.arange(0, scores.shape[1]), BLOCK - 1)
    seen = (block * BLOCK + column)[None, :] < visible[:, None]
    best = clear_maximum(tl.where(seen, scores, float("-inf")))
    return ranked_maximum(best, block, visible, num_local, BLOCK)


@triton.jit
def maximum_by_parts(
    q, index_k, cache, row, key, block, visible, num_local,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """As `masked_maximum`, of a block that begins at (row, key) of the cache, COLUMNS keys at a time."""
    _, _, _, scale_ptr, seqlen_k, _, _, num_keys = cache
    column = tl.arange(0, COLUMNS)
    best = tl.full([q.shape[0]], float("-inf"), tl.float32)
    for first in range(0, BLOCK, COLUMNS):
        count = tl.minimum(num_keys - block * BLOCK, BLOCK) - first
        keys = load_keys(index_k, row, key + first, count, HEAD_DIM, COLUMNS, COLUMNS, DEPTH, False, False)
        scales = load_scales(scale_ptr + row * seqlen_k + key + first, column, column < count) if SCALED else 1.0
        scores = score_keys(q, keys, scales, SCALED, NATIVE, False)
        seen = (column < count)[None, :] & ((block * BLOCK + first + column)[None, :] < visible[:, None])
        best = tl.maximum(best, clear_maximum(tl.where(seen, scores, float("-inf"))))
    return ranked_maximum(best, block, visible, num_local, BLOCK)


@triton.jit
def any_maximum(
    q, index_k, cache, row, key, scales, block, visible, num_local,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, USE_TMA: tl.constexpr,
    SCALED: tl.constexpr, NATIVE: tl.constexpr, SWAP: tl.constexpr, FP8_PRODUCT: tl.constexpr,
):  # fmt: skip
    """m [rows] of any block, which begins at (row, key) of the cache and whose keys have these scales."""
    if COLUMNS < BLOCK:
        best = maximum_by_parts(
            q, index_k, cache, row, key, block, visible, num_local,
            HEAD_DIM, BLOCK, COLUMNS, DEPTH, SCALED, NATIVE,
        )  # fmt: skip
    else:
        count = cache[7] - block * BLOCK
        keys = load_keys(index_k, row, key, count, HEAD_DIM, BLOCK, COLUMNS, DEPTH, False, USE_TMA)
        if FP8_PRODUCT and SCALED:
            scores = score_e4m3(q, keys, scales)
        else:
            scores = score_keys(q, keys, scales, SCALED, NATIVE, SWAP)
        best = masked_maximum(scores, block, visible, num_local, BLOCK)
    return best


@triton.jit
def interleave(even, odd):
    """[rows] of what even rows and odd rows have, [rows // 2] each, a row to a thread.

    As they leave a product, four threads have each row: the gather moves them, and all that is computed of them.
    """
    ROWS: tl.constexpr = 2 * even.shape[0]
    return tl.gather(tl.reshape(tl.join(even, odd), [ROWS]), tl.arange(0, ROWS), axis=0)


@triton.jit
def walk_halves(
    lists, index_q, index_k, cache, bounds, first, q_end, visible, num_local,
    GROUPS: tl.constexpr, TOKENS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, USE_TMA: tl.constexpr, PAGED: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """The lists of a tile's rows (see `first_blocks`) after the blocks of `bounds`: (first, first not clear, end).

    A clear block's products with the odd rows run while the maxima of the even rows are taken, and while these are
    inserted together with the odd rows' maxima of the block before. One by one, since that takes the same time at each
    step, which the products cover; ranking several blocks at once would take longer than they do.
    """
    begin, clear_end, end = bounds
    num_keys = cache[7]
    ROWS: tl.constexpr = visible.shape[0]
    row, half = tl.arange(0, ROWS), 2 * tl.arange(0, ROWS // 2)
    even_q = load_queries(index_q, half, first, q_end, GROUPS, TOKENS, HEAD_DIM, DEPTH)
    odd_q = load_queries(index_q, half + 1, first, q_end, GROUPS, TOKENS, HEAD_DIM, DEPTH)
    even_visible, odd_visible = tl.split(tl.reshape(visible, [ROWS // 2, 2]))
    nothing = tl.full([ROWS // 2], float("-inf"), tl.float32)
    odd_scores = tl.full([ROWS // 2, COLUMNS], float("-inf"), tl.float32)
    place, key, scales = look_ahead(cache, begin, end - 1, BLOCK, COLUMNS, PAGED, SCALED)
    for block in range(begin, clear_end):
        keys = load_keys(index_k, place, key, BLOCK, HEAD_DIM, BLOCK, COLUMNS, DEPTH, True, USE_TMA)
        even_scores = score_keys(even_q, keys, scales, SCALED, NATIVE, SWAP)
        odd_best = tl.where(block > begin, clear_maximum(odd_scores), float("-inf"))
        odd_scores = score_keys(odd_q, keys, scales, SCALED, NATIVE, SWAP)
        best = interleave(clear_maximum(even_scores), odd_best)
        lists = insert_block(lists, best, block - row % 2)
        place, key, scales = look_ahead(cache, block + 1, end - 1, BLOCK, COLUMNS, PAGED, SCALED)
    # On the loop's own path only: where ptxas sees one to here that leaves the loop out, it waits for each product.
    if clear_end > begin:
        lists = insert_block(lists, interleave(nothing, clear_maximum(odd_scores)), clear_end - 1)
    for block in tl.range(clear_end, end, num_stages=1):
        count = num_keys - block * BLOCK
        keys = load_keys(index_k, place, key, count, HEAD_DIM, BLOCK, COLUMNS, DEPTH, False, USE_TMA)
        even_scores = score_keys(even_q, keys, scales, SCALED, NATIVE, SWAP)
        even_best = masked_maximum(even_scores, block, even_visible, num_local, BLOCK)
        odd_scores = score_keys(odd_q, keys, scales, SCALED, NATIVE, SWAP)
        odd_best = masked_maximum(odd_scores, block, odd_visible, num_local, BLOCK)
        lists = insert_block(lists, interleave(even_best, odd_best), block)
        place, key, scales = look_ahead(cache, block + 1, end - 1, BLOCK, COLUMNS, PAGED, SCALED)
    return lists
