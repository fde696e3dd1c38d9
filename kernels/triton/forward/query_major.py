"""Query-major attention: each tile of neighbouring tokens loads every block of its tile union once.

A tile is T tokens times the G heads of a group, `query_major_rows` rows. It takes the blocks of its union one after the
other, in steps of `query_major_columns` keys, and keeps a running softmax as dense flash attention does; a token that
did not choose the block gives it no weight. No partial results go through memory. Blocks that all tokens see whole come
first and take no mask. The unions come from `find_tile_unions`; without block_indices a tile takes every visible block.

Cost: 4 U T G Bk D FLOPs per tile and group for a union of U blocks; 2 U Bk D elements of keys and values, mostly from
L2. Where 128K tokens of M3's shape choose like their neighbours (U = 18.4 for 8 tokens), 10.1 TFLOP: 13 ms at 783
TFLOP/s.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...problem import Problem
from ..common.fp8 import as_bits, dequantize, load_scales
from ..common.launch import Launch, Options, view
from ..common.records import Scales, keys_per_row, load_sequence, locate_block, pages_of
from ..common.sizes import Sizes, sizes_of
from ..common.softmax import LN_2, LOG2_E
from ..common.target import Target, padded
from ..common.tiles import TileTable, box_strides, find_tile, load_tile
from .config import ForwardConfig
from .records import Inputs, Results, Vectors, result_place
from .tile_unions import Tiles, load_tile_union


class Member(NamedTuple):
    """A block of a tile's union, and whether each row's token chose it."""

    block: Any
    chosen: Any


class Softmax(NamedTuple):
    """The running softmax of rows, base 2: weighted sums of values, largest score, and sum of weights."""

    acc: Any
    row_max: Any
    row_sum: Any


@dataclass(frozen=True)
class QueryMajorConstants(Sizes):
    """Constants of `query_major_kernel`.

    A block is taken in `parts` steps of `columns` keys; rows, tokens: of a tile; positive: the scale is; native: the
    GPU converts e4m3 numbers itself.
    """

    columns: int
    parts: int
    rows: int
    tokens: int
    stages: int
    positive: bool
    native: bool


@triton.jit
def load_member(unions, place, step, token):
    """The Member at `place` of the unions' lists; where every visible block is taken, block `step`."""
    if unions.blocks is None:
        return Member(step, token >= 0)
    else:
        chosen = ((tl.load(unions.members + place) >> token) & 1) != 0
        return Member(tl.load(unions.blocks + place), chosen)


@triton.jit
def load_vectors(
    vectors, boxes, place, group, key, num_keys, dtype: tl.constexpr, masked: tl.constexpr, C: tl.constexpr
):
    """Keys or values [columns, depth] in dtype, from key `key` of row place.row of the cache on.

    With boxes, the bulk copy engine loads all columns. Without, `masked` sets those from num_keys on to zero.
    """
    COLUMNS: tl.constexpr = C.columns
    DEPTH: tl.constexpr = C.depth
    x = vectors.view
    column, d = tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    if boxes is not None:
        rows = tl.reshape(boxes.load([place.row.to(tl.int32), group.to(tl.int32), key, 0]), [COLUMNS, DEPTH])
    else:
        base = x.ptr + group * x.stride_h + place.row * x.stride_b
        if masked or C.head_dim != C.depth:
            rows = load_tile(base, key, num_keys, x.stride_s, x.stride_d, COLUMNS, C.head_dim, DEPTH)
        else:
            row = base + (key + column).to(tl.int64)[:, None] * x.stride_s
            rows = tl.load(row + d.to(tl.int64)[None, :] * x.stride_d)
    if vectors.scale is not None:
        number = (place.row * tl.num_programs(1) + group) * vectors.seqlen_k + key
        rows = dequantize(rows, load_scales(vectors.scale + number, column, column < num_keys), dtype, C.native)
    return rows


@triton.jit
def fold_step(softmax, q, k, v, last, chosen, scale, masked: tl.constexpr, positive: tl.constexpr):
    """The Softmax after one step's keys, for the rows that are `chosen`.

    last [rows]: the newest column that each row sees; without `masked` every row sees all of them. A positive scale is
    multiplied in after the maximum, together with the subtraction of it.
    """
    column = tl.arange(0, k.shape[0])
    precision: tl.constexpr = "ieee" if k.dtype == tl.float32 else "tf32"
    scores = tl.dot(q, tl.trans(k), input_precision=precision)
    if not positive:
        scores, scale = scores * scale, 1.0
    if masked:
        scores = tl.where(column[None, :] <= last[:, None], scores, float("-inf"))
    best = tl.max(scores, axis=1) * scale
    row_max = tl.where(chosen, tl.maximum(softmax.row_max, best), softmax.row_max)
    # exp2(finite - inf) = 0: a row that is not chosen needs no mask of its own for each score.
    shift = tl.where(chosen & (row_max > float("-inf")), row_max, float("inf"))
    weights = tl.exp2(scores * scale - shift[:, None])
    decay = tl.exp2(softmax.row_max - tl.where(row_max == float("-inf"), 0.0, row_max))
    row_sum = softmax.row_sum * decay + tl.sum(weights, axis=1)
    acc = tl.dot(weights.to(v.dtype), v, softmax.acc * decay[:, None], input_precision=precision)
    return Softmax(acc, row_max, row_sum)


@triton.jit
def store_tile(softmax, number, group, sequences_ptr, tiles, results, C: tl.constexpr):
    """Write out and lse of the tile of that number."""
    row, d = tl.arange(0, C.rows), tl.arange(0, C.depth)
    token, head = row // C.group_size, row % C.group_size
    tile = find_tile(number, TileTable(tiles.ends, tiles.num_sequences, results.seqlen_q), C.tokens)
    sequence = load_sequence(sequences_ptr, tile.sequence)
    query = sequence.q_start + tile.number * C.tokens + token
    live = (token < C.tokens) & (query < sequence.q_end)
    place = result_place(results, sequence.batch, group, head, query, C.group_size)
    out = softmax.acc * tl.where(softmax.row_sum > 0, 1.0 / softmax.row_sum, 0.0)[:, None]
    mask = live[:, None] & (d < C.head_dim)[None, :]
    out_ptr = results.out.ptr
    tl.store(out_ptr + place.out[:, None] + d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(results.lse + place.lse, (softmax.row_max + tl.log2(softmax.row_sum)) * LN_2, mask=live)


@triton.jit
def query_major_kernel(
    q, keys, values, scales, k_boxes, v_boxes, pages, sequences_ptr, tiles, unions, results, scale, C: tl.constexpr
):
    """out and lse of one tile and one group. Grid (tiles, groups)."""
    ROWS: tl.constexpr = C.rows
    DEPTH: tl.constexpr = C.depth
    number, num_tiles = tl.program_id(0), tl.num_programs(0)
    group = tl.program_id(1).to(tl.int64)
    tile = find_tile(number, tiles, C.tokens)
    if tile.sequence >= tiles.num_sequences:
        return
    keys, values = Vectors(keys, scales.k, scales.seqlen_k), Vectors(values, scales.v, scales.seqlen_k)
    sequence = load_sequence(sequences_ptr, tile.sequence)
    first = sequence.q_start + tile.number * C.tokens
    if first >= sequence.q_end:
        return
    union = group * num_tiles + number
    shift = sequence.k_end - sequence.q_end - sequence.k_start
    if unions.blocks is None:
        stop = tl.minimum(first + C.tokens, sequence.q_end)
        length = tl.cdiv(tl.maximum(stop + shift, 0), C.block_size)
        num_whole = tl.maximum(first + 1 + shift, 0) // C.block_size
    else:
        found = load_tile_union(unions.rows, union)
        length, num_whole = found.length, found.num_whole
        if length == 0:
            return
    row, d = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    token, head = row // C.group_size, row % C.group_size
    query = first + token
    inside = ((token < C.tokens) & (query < sequence.q_end))[:, None] & (d < C.head_dim)[None, :]
    q_row = sequence.batch * q.stride_b + (group * C.group_size + head) * q.stride_h + query.to(tl.int64) * q.stride_s
    q_rows = tl.load(q.ptr + q_row[:, None] + d.to(tl.int64)[None, :] * q.stride_d, mask=inside, other=0.0)
    dtype: tl.constexpr = q_rows.dtype
    softmax = Softmax(
        tl.zeros([ROWS, DEPTH], tl.float32), tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    )
    places = union * unions.limit
    # Blocks that do not fill their last columns are never whole.
    num_clear = num_whole * C.parts if C.columns * C.parts == C.block_size else 0
    for step in tl.range(0, num_clear, num_stages=C.stages):
        member = load_member(unions, places + step // C.parts, step // C.parts, token)
        place = locate_block(pages, sequence.batch, sequence.k_start, member.block, C.block_size)
        key = place.key + step % C.parts * C.columns
        k = load_vectors(keys, k_boxes, place, group, key, C.columns, dtype, False, C)
        v = load_vectors(values, v_boxes, place, group, key, C.columns, dtype, False, C)
        softmax = fold_step(softmax, q_rows, k, v, row, member.chosen, scale, False, C.positive)
    # The last block of a union is the newest, of which the first steps may be all that anyone sees.
    newest = length - 1 if unions.blocks is None else tl.load(unions.blocks + places + length - 1)
    seen = tl.minimum(first + C.tokens, sequence.q_end) + shift - newest * C.block_size
    num_steps = (length - 1) * C.parts + tl.minimum(tl.cdiv(seen, C.columns), C.parts)
    for step in tl.range(num_clear, num_steps, num_stages=1):
        member = load_member(unions, places + step // C.parts, step // C.parts, token)
        first_column = member.block * C.block_size + step % C.parts * C.columns
        num_keys = tl.minimum(
            C.block_size - step % C.parts * C.columns, sequence.k_end - sequence.k_start - first_column
        )
        last = tl.minimum(query + shift - first_column, num_keys - 1)
        place = locate_block(pages, sequence.batch, sequence.k_start, member.block, C.block_size)
        key = place.key + step % C.parts * C.columns
        k = load_vectors(keys, k_boxes, place, group, key, num_keys, dtype, True, C)
        v = load_vectors(values, v_boxes, place, group, key, num_keys, dtype, True, C)
        if v_boxes is not None:
            # Beyond the last key there may be NaN, which a weight of 0 does not silence.
            v = tl.where((tl.arange(0, C.columns) < num_keys)[:, None], v, 0.0)
        softmax = fold_step(softmax, q_rows, k, v, last, member.chosen, scale, True, C.positive)
    # The tile is found once more, through a 0 that the compiler does not know to be one: values known from the start
    # would be kept, and spilled, through both loops.
    zero = tl.minimum(tl.load(sequences_ptr), 0)
    results = Results(results.out, results.lse, results.num_kv_heads, results.seqlen_q + zero)
    store_tile(softmax, number + zero, group, sequences_ptr, tiles, results, C)


@functools.lru_cache
def query_major_constants(problem: Problem, config: ForwardConfig, target: Target) -> QueryMajorConstants:
    """Constants of `query_major_kernel`."""
    columns = min(padded(problem.block_size), config.query_major_columns)
    return QueryMajorConstants(
        **sizes_of(problem),
        columns=columns,
        parts=triton.cdiv(problem.block_size, columns),
        rows=config.query_major_rows,
        tokens=config.tile_tokens(problem),
        stages=config.query_major_stages,
        positive=problem.positive_scale,
        native=problem.scaled and target.has_e4m3,
    )


def boxes_of(x: torch.Tensor, columns: int) -> TensorDescriptor:
    """k or v [B, Hkv, Sk, D] as boxes [1, 1, columns, D] for the bulk copy engine."""
    return TensorDescriptor(x, list(x.shape), box_strides(x), [1, 1, columns, x.shape[3]])


def supports(problem: Problem, target: Target, config: ForwardConfig) -> bool:
    """Every problem."""
    return True


def launch(
    inputs: Inputs, tiles: Tiles, results: Results, problem: Problem, config: ForwardConfig, target: Target
) -> Launch:
    """The launch that fills the results of the tokens in query-major tiles."""
    constants = query_major_constants(problem, config, target)
    k, v, cache = inputs.k, inputs.v, inputs.cache
    bulk = config.query_major_bulk_copies and problem.bulk_copies and constants.head_dim == constants.depth
    scales = Scales(cache.k_scale, cache.v_scale, keys_per_row(cache.k_scale, k))
    vectors = {"q": view(inputs.q), "keys": view(k), "values": view(v), "scales": scales}
    k_boxes, v_boxes = (boxes_of(as_bits(x), constants.columns) if bulk else None for x in (k, v))
    stored = {"k_boxes": k_boxes, "v_boxes": v_boxes, "pages": pages_of(cache.page_table, k)}
    work = {"sequences_ptr": inputs.sequences, "tiles": tiles.table, "unions": tiles.unions, "results": results}
    arguments = {**vectors, **stored, **work, "scale": inputs.scale * LOG2_E.value}
    options = Options(config.query_major_warps, config.query_major_stages, config.query_major_registers)
    grid = tiles.num_tiles, problem.num_kv_heads, 1
    return Launch(query_major_kernel, grid, arguments, {"C": constants}, options)
