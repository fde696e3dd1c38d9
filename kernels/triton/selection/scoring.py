"""Steps of the selection's scorer: loading queries and keys, scores, and the maxima of blocks."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common.fp8 import decode_e4m3, join_pairs, load_scales
from ..common.int8 import quantize_int8
from ..common.records import Place, locate_block
from .rule import is_forced
from .topk import FLT_MAX, insert_block


class IndexKeys(NamedTuple):
    """The index keys of all sequences.

    tiles: a View, or a descriptor of tiles [1, block_size, Di] for the bulk copy engine; scale [B or num_pages, 1,
    seqlen_k], uint8 of e4m3 keys, fp32 of int8 keys, else None; pages: of `common.records`; seqlen_k: scales of a row,
    or of a page, 0 where every page has the same.
    """

    tiles: Any
    scale: Any
    pages: Any
    seqlen_k: Any


class RowList(NamedTuple):
    """Query rows one by one, [count], as token * Hkv + group."""

    rows: Any
    count: Any


class QueryTile(NamedTuple):
    """The tile of a program: tokens first .. of a sequence that has queries q_start .. q_end - 1 and num_keys keys.

    listed: None, or a RowList, of which the tile has the rows first ..
    """

    sequence: Any
    batch: Any
    q_start: Any
    q_end: Any
    first: Any
    k_start: Any
    num_keys: Any
    listed: Any


class KeyBlock(NamedTuple):
    """Where a block of keys is, and its scales [columns]: ones that nobody reads where keys have none."""

    place: Any
    scales: Any


class Bounds(NamedTuple):
    """The blocks of a program: from begin to end - 1, those from `masked` on with masks."""

    begin: Any
    masked: Any
    end: Any


@triton.jit
def tile_rows(tile, row, C: tl.constexpr):
    """Token and group of rows of a QueryTile, and whether there is such a row."""
    if tile.listed is None:
        token = tile.first + row // C.num_kv_heads
        return token, row % C.num_kv_heads, (token < tile.q_end) & (row // C.num_kv_heads < C.tokens)
    else:
        live = tile.first + row < tl.load(tile.listed.count)
        found = tl.load(tile.listed.rows + tile.first + row, mask=live, other=0)
        return found // C.num_kv_heads, found % C.num_kv_heads, live


@triton.jit
def load_queries(index_q, row, tile, C: tl.constexpr):
    """Rows `row` of a QueryTile, [rows, depth]; zero past its last. uint8 numbers are taken as e4m3.

    index_q is a View. C.int8: rows are quantized.
    """
    token, group, live = tile_rows(tile, row, C)
    depth = tl.arange(0, C.depth)
    base = index_q.ptr + tile.batch * index_q.stride_b
    place = group.to(tl.int64) * index_q.stride_h + token.to(tl.int64) * index_q.stride_s
    places = base + place[:, None] + depth.to(tl.int64)[None, :] * index_q.stride_d
    q = tl.load(places, mask=live[:, None] & (depth < C.head_dim)[None, :], other=0.0)
    if C.int8:
        q, _ = quantize_int8(q)
    elif q.dtype == tl.uint8:
        q = q.to(tl.float8e4nv, bitcast=True)
    return q


@triton.jit
def load_keys(keys, place, count, size: tl.constexpr, whole: tl.constexpr, C: tl.constexpr):
    """`size` keys from `place` on, [columns, depth], of which `count` are the sequence's; `whole`: all of them are.

    Columns past a size that is no power of two repeat its last key, which changes no maximum.
    """
    if C.use_tma:
        return tl.reshape(keys.tiles.load([place.row.to(tl.int32), place.key, 0]), [C.columns, C.depth])
    else:
        column = tl.minimum(tl.arange(0, C.columns), size - 1)
        depth = tl.arange(0, C.depth)
        tiles = keys.tiles
        start = tiles.ptr + place.row * tiles.stride_b + place.key.to(tl.int64) * tiles.stride_s
        places = start + column.to(tl.int64)[:, None] * tiles.stride_s + depth.to(tl.int64)[None, :] * tiles.stride_d
        if whole and C.head_dim == C.depth:
            return tl.load(places)
        else:
            return tl.load(places, mask=(column < count)[:, None] & (depth < C.head_dim)[None, :], other=0.0)


@triton.jit
def look_ahead(keys, tile, block, last, C: tl.constexpr):
    """The KeyBlock of a block, or of block `last` if that comes before.

    It is asked for one step before it is needed: a load that an address waits for would keep the loads of keys from
    running ahead.
    """
    if keys.pages.table is not None or keys.scale is not None:
        block = tl.maximum(tl.minimum(block, last), 0)
    place = locate_block(keys.pages, tile.batch, tile.k_start, block, C.block_size)
    if keys.scale is None:
        return KeyBlock(place, tl.full([C.columns], 1.0, tl.float32))
    else:
        column = tl.minimum(tl.arange(0, C.columns), C.block_size - 1)
        start = keys.scale + place.row * keys.seqlen_k + place.key
        return KeyBlock(place, load_scales(start, column, column < tile.num_keys - block * C.block_size))


@triton.jit
def score_keys(q, keys, scales, scaled: tl.constexpr, C: tl.constexpr):
    """Scores [rows, columns] of queries [rows, depth] and keys [columns, depth].

    scaled: the keys are e4m3 or int8 numbers with scales [columns]. C.swap: keys are the rows of the product.
    """
    precision: tl.constexpr = "ieee" if q.dtype == tl.float32 else "tf32"
    if scaled and not C.int8:
        keys = decode_e4m3(keys, q.dtype, C.native)
    if C.swap:
        scores = tl.trans(tl.dot(keys, tl.trans(q), input_precision=precision))
    else:
        scores = tl.dot(q, tl.trans(keys), input_precision=precision)
    return scores.to(tl.float32) * scales[None, :] if scaled else scores


@triton.jit
def score_e4m3(q, keys, scales):
    """Scores [rows, columns] of queries [2 rows, depth] from `split_e4m3` and e4m3 keys [columns, depth], scaled.

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
def final_maximum(best, block, visible, forced, C: tl.constexpr):
    """m [rows] of any block: `best`, or -inf where a row sees none of it, +inf where it is forced; visible in keys."""
    best = tl.where(is_forced(forced, block, (visible - 1) // C.block_size), float("inf"), best)
    return tl.where(block * C.block_size < visible, best, float("-inf"))


@triton.jit
def masked_maximum(scores, block, visible, forced, C: tl.constexpr):
    """m [rows] of any block from its scores [rows, columns]."""
    column = tl.minimum(tl.arange(0, scores.shape[1]), C.block_size - 1)
    seen = (block * C.block_size + column)[None, :] < visible[:, None]
    best = clear_maximum(tl.where(seen, scores, float("-inf")))
    return final_maximum(best, block, visible, forced, C)


@triton.jit
def maximum_by_parts(q, keys, tile, place, block, visible, forced, C: tl.constexpr):
    """As `masked_maximum`, of a block that begins at `place`, C.columns keys at a time."""
    column = tl.arange(0, C.columns)
    best = tl.full([q.shape[0]], float("-inf"), tl.float32)
    for first in range(0, C.block_size, C.columns):
        count = tl.minimum(tile.num_keys - block * C.block_size, C.block_size) - first
        part = load_keys(keys, Place(place.row, place.key + first), count, C.columns, False, C)
        if keys.scale is None:
            scores = score_keys(q, part, 1.0, False, C)
        else:
            start = keys.scale + place.row * keys.seqlen_k + place.key + first
            scores = score_keys(q, part, load_scales(start, column, column < count), True, C)
        seen = (column < count)[None, :] & ((block * C.block_size + first + column)[None, :] < visible[:, None])
        best = tl.maximum(best, clear_maximum(tl.where(seen, scores, float("-inf"))))
    return final_maximum(best, block, visible, forced, C)


@triton.jit
def any_maximum(q, keys, tile, found, block, visible, forced, C: tl.constexpr):
    """m [rows] of any block; found: its KeyBlock."""
    if C.columns < C.block_size:
        best = maximum_by_parts(q, keys, tile, found.place, block, visible, forced, C)
    else:
        scaled: tl.constexpr = keys.scale is not None
        loaded = load_keys(keys, found.place, tile.num_keys - block * C.block_size, C.block_size, False, C)
        if C.fp8_product and scaled:
            scores = score_e4m3(q, loaded, found.scales)
        else:
            scores = score_keys(q, loaded, found.scales, scaled, C)
        best = masked_maximum(scores, block, visible, forced, C)
    return best


@triton.jit
def interleave(even, odd):
    """[rows] with the numbers of even rows and of odd rows, [rows // 2] each, in turn; one row per thread.

    As they leave a product, four threads have each row: the gather moves them, and all that is computed of them.
    """
    ROWS: tl.constexpr = 2 * even.shape[0]
    return tl.gather(tl.reshape(tl.join(even, odd), [ROWS]), tl.arange(0, ROWS), axis=0)


@triton.jit
def score_halves(topk, index_q, keys, tile, bounds, visible, forced, C: tl.constexpr):
    """The TopkLists of a tile's rows after the blocks of `bounds`, computed one half of the rows at a time.

    A clear block's products with the odd rows run while the maxima of the even rows are taken, and while these are
    inserted together with the odd rows' maxima of the block before. One by one, since that takes the same time at each
    step, which the products cover; collecting several blocks first would take longer than the products do.
    """
    scaled: tl.constexpr = keys.scale is not None
    rows: tl.constexpr = visible.shape[0]
    columns: tl.constexpr = C.columns
    row, half = tl.arange(0, rows), 2 * tl.arange(0, rows // 2)
    even_q = load_queries(index_q, half, tile, C)
    odd_q = load_queries(index_q, half + 1, tile, C)
    even_visible, odd_visible = tl.split(tl.reshape(visible, [rows // 2, 2]))
    nothing = tl.full([rows // 2], float("-inf"), tl.float32)
    odd_scores = tl.full([rows // 2, columns], float("-inf"), tl.float32)
    found = look_ahead(keys, tile, bounds.begin, bounds.end - 1, C)
    for block in range(bounds.begin, bounds.masked):
        loaded = load_keys(keys, found.place, C.block_size, C.block_size, True, C)
        even_scores = score_keys(even_q, loaded, found.scales, scaled, C)
        odd_best = tl.where(block > bounds.begin, clear_maximum(odd_scores), float("-inf"))
        odd_scores = score_keys(odd_q, loaded, found.scales, scaled, C)
        best = interleave(clear_maximum(even_scores), odd_best)
        topk = insert_block(topk, best, block - row % 2)
        found = look_ahead(keys, tile, block + 1, bounds.end - 1, C)
    # On the loop's own path only: where ptxas sees a path to here around the loop, it waits for each product.
    if bounds.masked > bounds.begin:
        topk = insert_block(topk, interleave(nothing, clear_maximum(odd_scores)), bounds.masked - 1)
    for block in tl.range(bounds.masked, bounds.end, num_stages=1):
        loaded = load_keys(keys, found.place, tile.num_keys - block * C.block_size, C.block_size, False, C)
        even_scores = score_keys(even_q, loaded, found.scales, scaled, C)
        even_best = masked_maximum(even_scores, block, even_visible, forced, C)
        odd_scores = score_keys(odd_q, loaded, found.scales, scaled, C)
        odd_best = masked_maximum(odd_scores, block, odd_visible, forced, C)
        topk = insert_block(topk, interleave(even_best, odd_best), block)
        found = look_ahead(keys, tile, block + 1, bounds.end - 1, C)
    return topk
