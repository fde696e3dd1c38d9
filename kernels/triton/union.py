"""Attention in tiles of neighbouring tokens, each tile walking the union of its tokens' blocks.

In trained models neighbours choose much the same blocks. A tile of T tokens times G heads (`walk_rows` rows) loads each
block of the union once; a token that did not choose the block gives it no weight. No partial results go through
memory. `choose_tiles` finds the union of every tile, sorted, with a bit for each token that chose the block; a tile whose
union is longer than `walk_limit` is left to the KV-outer order, and its list is never used. The choice is made on the
device, tile by tile, and is a function of block_indices alone.

A step of the walk costs 4 T G Bk D FLOPs whether all tokens chose the block or one. So it pays while the union is less
than about 1.75 topk: a token's topk blocks in KV-outer order cost the traffic of its partial results, 24 ms at
128K tokens of M3's shape, and topk steps of the walk 11.2 ms (bf16, 783 TFLOP/s, 4.25 TB/s).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .configs import ForwardConfig, padded
from .primitives import LN_2, LOG2_E, find_tile, load_sequence, tile_ends

NO_BLOCK = tl.constexpr(0x7FFFFFFF)


@triton.jit
def join_members(block_a, members_a, block_b, members_b):
    """Segmented or: the members of equal neighbouring blocks together."""
    return block_b, tl.where(block_a == block_b, members_a | members_b, members_b)


@triton.jit
def union_kernel(
    ids_ptr,
    sequences_ptr,
    tile_ends_ptr,
    list_ptr,
    members_ptr,
    counts_ptr,
    skip_ptr,
    stride_ib,
    stride_ih,
    stride_is,
    stride_ik,
    num_sequences,
    num_tiles,
    seqlen_q,
    num_tokens,
    limit,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    TABLE: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """The union of one tile and group: list, members [limit], counts (length, how many every token sees whole).

    Both counts are 0, and skip of the tile's tokens too, if the union is longer than `limit`.
    """
    number = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    sequence, tile = find_tile(number, tile_ends_ptr, num_sequences, seqlen_q, TOKENS, TABLE)
    if sequence >= num_sequences:
        return
    batch, q_start, q_end, k_start, k_end = load_sequence(sequences_ptr, sequence)
    first = q_start + tile * TOKENS
    if first >= q_end:
        return
    place = tl.arange(0, ROWS * SLOTS)
    row, slot = place // SLOTS, place % SLOTS
    query = first + row
    live = (row < TOKENS) & (query < q_end)
    ids_row = ids_ptr + batch * stride_ib + group * stride_ih + query.to(tl.int64) * stride_is
    ids = tl.load(ids_row + slot.to(tl.int64) * stride_ik, mask=live & (slot < TOPK), other=-1).to(tl.int64)
    seen = (ids >= 0) & (ids * BLOCK < k_end - q_end + query + 1 - k_start)
    ordered = tl.sort(tl.where(seen, ids, NO_BLOCK) * 64 + row)
    block, member = (ordered // 64).to(tl.int32), tl.full([ROWS * SLOTS], 1, tl.int64) << (ordered % 64)
    before = tl.gather(block, tl.maximum(place - 1, 0), axis=0)
    fresh = (block != NO_BLOCK) & ((block != before) | (place == 0))
    _, members = tl.associative_scan((block, member), axis=0, combine_fn=join_members, reverse=True)
    length = tl.sum(fresh.to(tl.int32), axis=0)
    rank = tl.cumsum(fresh.to(tl.int32), axis=0) - 1
    length = tl.where(length <= limit, length, 0)
    whole = fresh & ((block.to(tl.int64) + 1) * BLOCK <= k_end - q_end + first + 1 - k_start)
    num_whole = tl.sum(whole.to(tl.int32), axis=0)
    union = group * num_tiles + number
    tl.store(list_ptr + union * limit + rank, block, mask=fresh & (rank < length))
    tl.store(members_ptr + union * limit + rank, members, mask=fresh & (rank < length))
    tl.store(counts_ptr + union * 2, length)
    tl.store(counts_ptr + union * 2 + 1, tl.where(length > 0, num_whole, 0))
    token = batch * seqlen_q + first + tl.arange(0, ROWS)
    inside = (tl.arange(0, ROWS) < TOKENS) & (first + tl.arange(0, ROWS) < q_end)
    skipped = tl.where(length > 0, 1, 0).to(tl.int8)
    tl.store(skip_ptr + group * num_tokens + token, tl.broadcast_to(skipped, [ROWS]), mask=inside)


@triton.jit
def walk_step(
    acc,
    row_max,
    row_sum,
    q,
    k_base,
    v_base,
    first_key,
    num_keys,
    last,
    member,
    scale,
    stride_ks,
    stride_kd,
    stride_vs,
    stride_vd,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DEPTH: tl.constexpr,
    MASKED: tl.constexpr,
    POSITIVE: tl.constexpr,
):
    """Fold one block into the running softmax (base 2) of the rows that are its members.

    last [ROWS]: the newest column each row sees. Without MASKED every row sees num_keys = COLUMNS whole keys. A positive
    scale is multiplied in after the maximum, together with the subtraction of it.
    """
    column, d = tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    row = (first_key + column).to(tl.int64)[:, None]
    k_place, v_place = (
        k_base + row * stride_ks + d[None, :] * stride_kd,
        v_base + row * stride_vs + d[None, :] * stride_vd,
    )
    if MASKED or HEAD_DIM != DEPTH:
        inside = (column < num_keys)[:, None] & (d < HEAD_DIM)[None, :]
        k, v = tl.load(k_place, mask=inside, other=0.0), tl.load(v_place, mask=inside, other=0.0)
    else:
        k, v = tl.load(k_place), tl.load(v_place)
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


@triton.jit
def walk_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    sequences_ptr,
    tile_ends_ptr,
    list_ptr,
    members_ptr,
    counts_ptr,
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
    limit,
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
):
    """out and lse of one tile of TOKENS tokens and one group; DENSE walks every visible block, without a list."""
    number, num_tiles = tl.program_id(0), tl.num_programs(0)
    group, num_groups = tl.program_id(1).to(tl.int64), tl.num_programs(1)
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
        length, num_whole = tl.load(counts_ptr + union * 2), tl.load(counts_ptr + union * 2 + 1)
        if length == 0:
            return
    row, d = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    token, head = row // GROUP_SIZE, row % GROUP_SIZE
    query = first + token
    live = (token < TOKENS) & (query < q_end)
    inside = live[:, None] & (d < HEAD_DIM)[None, :]
    q_row = batch * stride_qb + (group * GROUP_SIZE + head) * stride_qh + query.to(tl.int64) * stride_qs
    q = tl.load(q_ptr + q_row[:, None] + d[None, :] * stride_qd, mask=inside, other=0.0)
    k_base, v_base = k_ptr + batch * stride_kb + group * stride_kh, v_ptr + batch * stride_vb + group * stride_vh
    row_max, row_sum = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DEPTH], tl.float32)
    # Blocks that pad their columns are never whole.
    num_clear = num_whole if COLUMNS == BLOCK else 0
    for step in tl.range(0, num_clear, num_stages=STAGES):
        block, members = step, tl.full([1], -1, tl.int64)
        if not DENSE:
            block, members = tl.load(list_ptr + union * limit + step), tl.load(members_ptr + union * limit + step)
        member = ((members >> token) & 1) != 0
        acc, row_max, row_sum = walk_step(
            acc, row_max, row_sum, q, k_base, v_base, k_start + block * BLOCK, BLOCK, row, member, scale,
            stride_ks, stride_kd, stride_vs, stride_vd, COLUMNS, HEAD_DIM, DEPTH, False, POSITIVE,
        )  # fmt: skip
    for step in tl.range(num_clear, length, num_stages=1):
        block, members = step, tl.full([1], -1, tl.int64)
        if not DENSE:
            block, members = tl.load(list_ptr + union * limit + step), tl.load(members_ptr + union * limit + step)
        member = ((members >> token) & 1) != 0
        num_keys = tl.minimum(BLOCK, k_end - k_start - block * BLOCK)
        last = tl.minimum(query + shift - block * BLOCK, num_keys - 1)
        acc, row_max, row_sum = walk_step(
            acc, row_max, row_sum, q, k_base, v_base, k_start + block * BLOCK, num_keys, last, member, scale,
            stride_ks, stride_kd, stride_vs, stride_vd, COLUMNS, HEAD_DIM, DEPTH, True, POSITIVE,
        )  # fmt: skip
    out_row = ((batch * num_groups + group) * GROUP_SIZE + head) * seqlen_q + query
    acc = acc * tl.where(row_sum > 0, 1.0 / row_sum, 0.0)[:, None]
    tl.store(out_ptr + out_row[:, None] * HEAD_DIM + d[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + out_row, (row_max + tl.log2(row_sum)) * LN_2, mask=live)


@dataclass(frozen=True)
class Tiles:
    """Made by `choose_tiles`; for G groups and T tiles.

    list [G, T, limit] int32 and members [G, T, limit] int64: the union's blocks, ascending, and a bit for each token
    that chose it. counts [G, T, 2] int32: blocks in the list, and how many of them every token sees whole.
    skip [G, B*Sq] int8: tokens that the KV-outer order leaves out, because their tile walks. All None when dense.
    """

    ends: torch.Tensor
    num_tiles: int
    table: bool
    limit: int
    list: torch.Tensor | None = None
    members: torch.Tensor | None = None
    counts: torch.Tensor | None = None
    skip: torch.Tensor | None = None


def union_constants(
    config: ForwardConfig, group_size: int, topk: int, block_size: int, table: bool
) -> dict[str, int | bool]:
    """The compile-time arguments of `union_kernel`."""
    tokens = config.walk_tokens(group_size)
    return {
        "TOPK": topk,
        "BLOCK": block_size,
        "TOKENS": tokens,
        "TABLE": table,
        "ROWS": triton.next_power_of_2(tokens),
        "SLOTS": triton.next_power_of_2(topk),
    }


def union_warps(constants) -> int:
    """Warps of `union_kernel`: four choices to sort a thread, as far as that goes."""
    return max(1, min(8, constants["ROWS"] * constants["SLOTS"] // 128))


def choose_tiles(block_indices, sequences, q, k, block_size: int, config: ForwardConfig) -> Tiles:
    """Find which tiles walk, and their unions; block_indices None makes every tile walk every visible block."""
    batch, num_heads, seqlen_q, _ = q.shape
    num_kv_heads = k.shape[1]
    tokens = config.walk_tokens(num_heads // num_kv_heads)
    ends, num_tiles, table = tile_ends(sequences, batch, seqlen_q, tokens)
    if block_indices is None:
        return Tiles(ends, num_tiles, table, 0)
    topk = block_indices.shape[3]
    limit = config.walk_limit
    skip = sequences.new_zeros(num_kv_heads, batch * seqlen_q, dtype=torch.int8)
    counts = sequences.new_zeros(num_kv_heads, num_tiles, 2)
    blocks = sequences.new_empty(num_kv_heads, num_tiles, limit)
    members = sequences.new_empty(num_kv_heads, num_tiles, limit, dtype=torch.int64)
    constants = union_constants(config, num_heads // num_kv_heads, topk, block_size, table)
    # A union of this many choices is sorted in registers; more of them are left to the KV-outer order.
    if limit > 0 and constants["ROWS"] * constants["SLOTS"] <= 4096:
        union_kernel[(num_tiles, num_kv_heads)](
            block_indices,
            sequences,
            ends,
            blocks,
            members,
            counts,
            skip,
            *block_indices.stride(),
            sequences.shape[0],
            num_tiles,
            seqlen_q,
            batch * seqlen_q,
            limit,
            **constants,
            num_warps=union_warps(constants),
        )
    return Tiles(ends, num_tiles, table, limit, blocks, members, counts, skip)


def walk_constants(
    config: ForwardConfig, group_size: int, head_dim: int, block_size: int, scale: float, table: bool, dense: bool
) -> dict[str, int | bool]:
    """The compile-time arguments of `walk_kernel`."""
    return {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "BLOCK": block_size,
        "COLUMNS": padded(block_size),
        "DEPTH": padded(head_dim),
        "ROWS": config.walk_rows,
        "TOKENS": config.walk_tokens(group_size),
        "TABLE": table,
        "DENSE": dense,
        "STAGES": config.walk_stages,
        "POSITIVE": scale > 0,
    }


def walk_tiles(
    q, k, v, tiles: Tiles, sequences, block_size: int, scale: float, config: ForwardConfig, out, lse
) -> None:
    """Fill out and lse of the tokens in walking tiles."""
    group_size = q.shape[1] // k.shape[1]
    dense = tiles.list is None
    walk_kernel[(tiles.num_tiles, k.shape[1])](
        q,
        k,
        v,
        sequences,
        tiles.ends,
        sequences if dense else tiles.list,
        sequences if dense else tiles.members,
        sequences if dense else tiles.counts,
        out,
        lse,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        sequences.shape[0],
        q.shape[2],
        tiles.limit,
        scale * LOG2_E.value,
        **walk_constants(config, group_size, q.shape[3], block_size, scale, tiles.table, dense),
        num_warps=config.walk_warps,
        num_stages=config.walk_stages,
    )
