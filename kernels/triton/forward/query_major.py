"""Attention in tiles of neighbouring tokens, each tile walking the union of its tokens' blocks.

A tile is T tokens times the G heads of a group, `walk_rows` rows. It loads each block of the union once, in steps of
`walk_columns` keys, and keeps a running softmax as dense flash attention does; a token that did not choose the block
gives it no weight. No partial results go through memory. Blocks that all tokens see whole come first and take no mask.
The unions are those of `union.choose_tiles`; without block_indices every visible block is walked.

Cost: 4 U T G Bk D FLOPs a tile and group for a union of U blocks; 2 U Bk D elements of keys and values, mostly from L2.
Where 128K tokens of M3's shape choose like their neighbours (U = 18.4 for 8 tokens), 10.1 TFLOP: 13 ms at 783 TFLOP/s.
"""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.fp8 import Cache, as_bits, dequantize, load_scales
from ..common.primitives import (
    LN_2,
    LOG2_E,
    find_tile,
    load_sequence,
    load_tile,
    locate_block,
    page_arguments,
    tma_ready,
)
from ..common.target import padded, target_of
from .config import ForwardConfig
from .tile_unions import Tiles


@triton.jit
def load_member(list_ptr, members_ptr, place, step, token, DENSE: tl.constexpr):
    """(block, whether each row's token chose it) of one element of a union; of the step itself if all are walked."""
    if DENSE:
        return step, token >= 0
    return tl.load(list_ptr + place), ((tl.load(members_ptr + place) >> token) & 1) != 0


@triton.jit
def load_keys(
    source, at, num_keys, seqlen_k, dtype: tl.constexpr, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr, MASKED: tl.constexpr, USE_TMA: tl.constexpr, SCALED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Vectors [COLUMNS, DEPTH] of k or v from `at`, (row of the cache, group, key), on, in dtype.

    USE_TMA: by the bulk copy engine, all COLUMNS of them; else by pointer, and with MASKED zero from num_keys on.
    source: (tiles for the engine, the group's vectors, the scales, and the strides of rows, keys and elements).
    """
    tiles, base, scale_ptr, stride_b, stride_s, stride_d = source
    place, group, key = at
    column, d = tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    if USE_TMA:
        x = tl.reshape(tiles.load([place.to(tl.int32), group.to(tl.int32), key, 0]), [COLUMNS, DEPTH])
    elif MASKED or HEAD_DIM != DEPTH:
        x = load_tile(base + place * stride_b, key, num_keys, stride_s, stride_d, COLUMNS, HEAD_DIM, DEPTH)
    else:
        row = base + place * stride_b + (key + column).to(tl.int64)[:, None] * stride_s
        x = tl.load(row + d.to(tl.int64)[None, :] * stride_d)
    if SCALED:
        vector = (place * tl.num_programs(1) + group) * seqlen_k + key
        x = dequantize(x, load_scales(scale_ptr + vector, column, column < num_keys), dtype, NATIVE)
    return x


@triton.jit
def walk_step(acc, row_max, row_sum, q, k, v, last, member, scale, MASKED: tl.constexpr, POSITIVE: tl.constexpr):
    """Fold one step's keys into the running softmax (base 2) of the rows that are members.

    last [ROWS]: the newest column each row sees. Without MASKED every row sees all of them. A positive scale is
    multiplied in after the maximum, together with the subtraction of it.
    """
    column = tl.arange(0, k.shape[0])
    precision: tl.constexpr = "ieee" if k.dtype == tl.float32 else "tf32"
    scores = tl.dot(q, tl.trans(k), input_precision=precision)
    if not POSITIVE:
        scores, scale = scores * scale, 1.0
    if MASKED:
        scores = tl.where(column[None, :] <= last[:, None], scores, float("-inf"))
    best = tl.max(scores, axis=1) * scale
    new_max = tl.where(member, tl.maximum(row_max, best), row_max)
    # exp2(finite - inf) = 0: a row that is no member needs no mask of its own for each score.
    shift = tl.where(member & (new_max > float("-inf")), new_max, float("inf"))
    weights = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(row_max - tl.where(new_max == float("-inf"), 0.0, new_max))
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=precision)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["seqlen_k", "max_pages", "num_pages", "num_kv_heads"])
def walk_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_tiles,
    v_tiles,
    k_scale_ptr,
    v_scale_ptr,
    page_table_ptr,
    sequences_ptr,
    tile_ends_ptr,
    list_ptr,
    members_ptr,
    walks_ptr,
    out_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vs,
    stride_vd,
    num_sequences,
    seqlen_q,
    seqlen_k,
    max_pages,
    num_pages,
    limit,
    num_kv_heads,
    scale,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    DENSE: tl.constexpr,
    STAGES: tl.constexpr,
    POSITIVE: tl.constexpr,
    PARTS: tl.constexpr,
    USE_TMA: tl.constexpr,
    PAGED: tl.constexpr,
    SCALED: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """out and lse of one tile of TOKENS tokens and one group; DENSE walks every visible block, without a list.

    A block is walked in PARTS steps of COLUMNS keys.
    """
    number, num_tiles = tl.program_id(0), tl.num_programs(0)
    group = tl.program_id(1).to(tl.int64)
    sequence, tile = find_tile(number, tile_ends_ptr, num_sequences, seqlen_q, TOKENS, TABLE)
    if sequence >= num_sequences:
        return
    batch, q_start, q_end, k_start, k_end = load_sequence(sequences_ptr, sequence)
    first = q_start + tile * TOKENS
    if first >= q_end:
        return
    union = group * num_tiles + number
    shift = k_end - q_end - k_start
    if DENSE:
        stop = tl.minimum(first + TOKENS, q_end)
        length = tl.cdiv(tl.maximum(stop + shift, 0), BLOCK)
        num_whole = tl.maximum(first + 1 + shift, 0) // BLOCK
    else:
        length, num_whole = tl.load(walks_ptr + union * 8), tl.load(walks_ptr + union * 8 + 1)
        if length == 0:
            return
    row, d = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    token, head = row // GROUP_SIZE, row % GROUP_SIZE
    query = first + token
    live = (token < TOKENS) & (query < q_end)
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    q_row = batch * stride_qb + (group * GROUP_SIZE + head) * stride_qh + query.to(tl.int64) * stride_qs
    q = tl.load(q_ptr + q_row[:, None] + d[None, :] * stride_qd, mask=inside, other=0.0)
    keys = k_tiles, k_ptr + group * stride_kh, k_scale_ptr, stride_kb, stride_ks, stride_kd
    values = v_tiles, v_ptr + group * stride_vh, v_scale_ptr, stride_vb, stride_vs, stride_vd
    row_max, row_sum = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DEPTH], tl.float32)
    # Blocks that pad their columns are never whole.
    num_clear = num_whole * PARTS if COLUMNS * PARTS == BLOCK else 0
    for step in tl.range(0, num_clear, num_stages=STAGES):
        block, member = load_member(list_ptr, members_ptr, union * limit + step // PARTS, step // PARTS, token, DENSE)
        place, key = locate_block(page_table_ptr, max_pages, batch, k_start, block, num_pages, BLOCK, PAGED)
        at = place, group, key + step % PARTS * COLUMNS
        k = load_keys(keys, at, COLUMNS, seqlen_k, q.dtype, COLUMNS, HEAD_DIM, DEPTH, False, USE_TMA, SCALED, NATIVE)
        v = load_keys(values, at, COLUMNS, seqlen_k, q.dtype, COLUMNS, HEAD_DIM, DEPTH, False, USE_TMA, SCALED, NATIVE)
        acc, row_max, row_sum = walk_step(acc, row_max, row_sum, q, k, v, row, member, scale, False, POSITIVE)
    # The last block of a union is the newest, of which the first steps may be all that anyone sees.
    newest = length - 1 if DENSE else tl.load(list_ptr + union * limit + length - 1)
    seen = tl.minimum(first + TOKENS, q_end) + shift - newest * BLOCK
    num_steps = (length - 1) * PARTS + tl.minimum(tl.cdiv(seen, COLUMNS), PARTS)
    for step in tl.range(num_clear, num_steps, num_stages=1):
        block, member = load_member(list_ptr, members_ptr, union * limit + step // PARTS, step // PARTS, token, DENSE)
        first_column = block * BLOCK + step % PARTS * COLUMNS
        num_keys = tl.minimum(BLOCK - step % PARTS * COLUMNS, k_end - k_start - first_column)
        last = tl.minimum(query + shift - first_column, num_keys - 1)
        place, key = locate_block(page_table_ptr, max_pages, batch, k_start, block, num_pages, BLOCK, PAGED)
        at = place, group, key + step % PARTS * COLUMNS
        k = load_keys(keys, at, num_keys, seqlen_k, q.dtype, COLUMNS, HEAD_DIM, DEPTH, True, USE_TMA, SCALED, NATIVE)
        v = load_keys(values, at, num_keys, seqlen_k, q.dtype, COLUMNS, HEAD_DIM, DEPTH, True, USE_TMA, SCALED, NATIVE)
        if USE_TMA:
            # Beyond the last key there may be NaN, which a weight of 0 does not silence.
            v = tl.where((tl.arange(0, COLUMNS) < num_keys)[:, None], v, 0.0)
        acc, row_max, row_sum = walk_step(acc, row_max, row_sum, q, k, v, last, member, scale, True, POSITIVE)
    # Found once more, by way of a 0 that the compiler does not know to be one: what is known from the start would be
    # kept, and spilled, through both loops.
    zero = tl.minimum(tl.load(sequences_ptr), 0)
    seqlen_q += zero
    sequence, tile = find_tile(number + zero, tile_ends_ptr, num_sequences, seqlen_q, TOKENS, TABLE)
    batch, q_start, q_end, _, _ = load_sequence(sequences_ptr, sequence)
    query = q_start + tile * TOKENS + token
    live = (token < TOKENS) & (query < q_end)
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    out_row = ((batch * num_kv_heads + group) * GROUP_SIZE + head) * seqlen_q + query
    acc = acc * tl.where(row_sum > 0, 1.0 / row_sum, 0.0)[:, None]
    tl.store(out_ptr + out_row[:, None] * HEAD_DIM + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + out_row, (row_max + tl.log2(row_sum)) * LN_2, mask=live)


def walk_constants(
    config: ForwardConfig,
    group_size: int,
    head_dim: int,
    block_size: int,
    scale: float,
    tokens: int,
    table: bool,
    dense: bool,
    tma: bool,
) -> dict[str, int | bool]:
    """The compile-time arguments of `walk_kernel`, beside those of `storage_constants`."""
    columns = min(padded(block_size), config.walk_columns)
    return {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "BLOCK": block_size,
        "COLUMNS": columns,
        "PARTS": triton.cdiv(block_size, columns),
        "DEPTH": padded(head_dim),
        "ROWS": config.walk_rows,
        "TOKENS": tokens,
        "TABLE": table,
        "DENSE": dense,
        "STAGES": config.walk_stages,
        "POSITIVE": scale > 0,
        "USE_TMA": tma,
    }


def key_tiles(x, columns: int):
    """k or v [B, Hkv, Sk, D] as tiles [1, 1, columns, D] for the bulk copy engine."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, columns, x.shape[3]])


def walk_tiles(
    q, k, v, cache: Cache, tiles: Tiles, sequences, block_size: int, scale: float, config: ForwardConfig, out, lse
) -> None:
    """Fill out and lse of the tokens in walking tiles; layouts as in `attention`."""
    group_size, head_dim = q.shape[1] // k.shape[1], q.shape[3]
    dense = tiles.list is None
    tma = config.walk_tma and head_dim == padded(head_dim) and tma_ready(k) and tma_ready(v)
    constants = walk_constants(config, group_size, head_dim, block_size, scale, tiles.tokens, tiles.table, dense, tma)
    pages, max_pages, num_pages = page_arguments(cache.page_table, sequences, k)
    k, v = as_bits(k), as_bits(v)
    walk_kernel[(tiles.num_tiles, k.shape[1])](
        q,
        k,
        v,
        key_tiles(k, constants["COLUMNS"]) if tma else k,
        key_tiles(v, constants["COLUMNS"]) if tma else v,
        lse if cache.k_scale is None else cache.k_scale,
        lse if cache.v_scale is None else cache.v_scale,
        pages,
        sequences,
        tiles.ends,
        sequences if dense else tiles.list,
        sequences if dense else tiles.members,
        sequences if dense else tiles.walks,
        out,
        lse,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        sequences.shape[0],
        q.shape[2],
        k.shape[2],
        max_pages,
        num_pages,
        tiles.limit,
        k.shape[1],
        scale * LOG2_E.value,
        **constants,
        **cache.constants(target_of(q.device)),
        **config.walk_options(),
    )
