"""Tiles, warps and stages of the forward's kernels: pure functions of problem and target."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import triton

from ...problem import Problem
from ...tuning import Changes
from ..common.candidates import near, registers, stages
from ..common.target import GLUON, Target, padded

# The fields of a Problem that a configuration depends on, and the fields of a configuration that tuning may change.
DEPENDS_ON = ("group_size", "head_dim", "block_size", "topk", "element_size", "scaled")
TUNABLE = (
    *("rows", "num_warps", "num_stages", "max_registers", "length"),
    *("query_major_rows", "query_major_columns", "query_major_warps", "query_major_stages", "query_major_registers"),
    *("query_major_sm90", "key_major_sm90", "longest_union"),
)


@dataclass(frozen=True)
class ForwardConfig:
    """How the main branch's forward is cut into tiles.

    Key-major: rows: packed query rows per step; length: entries per work item.

    Query-major: query_major_rows: rows of a tile; query_major_columns: keys per step; query_major_bulk_copies: keys and
    values come by the bulk copy engine, where it can read them.

    longest_union: the longest tile union that is worked on in query-major order, 0 for none. query_major_only: a block
    is too large for the key-major kernel, so every tile is query-major. query_major_sm90, key_major_sm90: the kernels
    in Gluon may run, where they support the problem.
    """

    rows: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    length: int
    query_major_rows: int
    query_major_columns: int
    query_major_warps: int
    query_major_stages: int
    query_major_registers: int | None
    query_major_bulk_copies: bool
    query_major_sm90: bool
    key_major_sm90: bool
    longest_union: int
    query_major_only: bool

    def tile_tokens(self, problem: Problem) -> int:
        """Tokens of a query-major tile: at most one per bit of an int64, and no more choices than one sort takes."""
        slots = triton.next_power_of_2(problem.topk or 1)
        return max(1, min(64, self.query_major_rows // problem.group_size, 4096 // slots))


def fits_query_major_sm90(problem: Problem, target: Target) -> bool:
    """Whether `query_major_sm90` has tiles of this shape."""
    sizes = problem.head_dim in (64, 128) and problem.block_size in (64, 128) and problem.element_size == 2
    heads = problem.group_size in (2, 4, 8, 16, 32, 64)
    return GLUON and target.arch == 90 and sizes and heads and not problem.scaled


def fits_key_major_sm90(problem: Problem, target: Target) -> bool:
    """Whether `key_major_sm90` has tiles of this shape."""
    sizes = problem.head_dim in (64, 128) and problem.block_size in (64, 128) and problem.element_size == 2
    return GLUON and target.arch == 90 and sizes and not problem.scaled


@functools.lru_cache
def default_config(problem: Problem, target: Target) -> ForwardConfig:
    """Tiles of the forward: keys, values, queries and the copies in flight fill the shared memory."""
    columns, depth, topk = padded(problem.block_size), padded(problem.head_dim), problem.topk or 1
    size, scaled = problem.element_size, problem.scaled
    large_tiles = target.backend == "cuda" and target.arch in (90, 100, 103)
    # Tile sizes are meant for blocks of 128 keys of 128 numbers of 16 bits; larger ones take fewer rows.
    large = max(1, columns * depth * size // (128 * 128 * 2))
    # Below Hopper the block's keys and values end up in registers, which leaves less room for rows.
    rows = max(16, (64 if large_tiles else 16 if depth <= 64 else 32) // large)
    # Half a block per step: with 128 registers per thread, two programs share a multiprocessor. On Hopper, a product of
    # 128 rows of more than 128 numbers of 16 bits needs more registers than that (ptxas error C7602): longer heads take
    # rows, keys and registers as for larger blocks.
    large_step = max(large, 2) if target.arch == 90 and depth > 128 and size == 2 else large
    # E4m3 keys and values pass through registers.
    query_major_columns = max(16, min(columns, (32 if scaled and not large_tiles else 64) // large_step))
    query_major_rows = max(padded(problem.group_size), (128 if large_tiles else 64) // large_step)
    # NVIDIA GPUs hold a tile's queries and one step's keys and values in shared memory. On sm_86, fp32 head dims above
    # 128 leave room for half the keys only.
    step_bytes = (query_major_rows + 2 * query_major_columns) * depth * size
    if target.backend == "cuda" and size == 4 and step_bytes > target.shared_memory:
        query_major_columns = max(16, query_major_columns // 2)
    tile_bytes = (query_major_rows + 4 * query_major_columns) * depth * size
    # Where a whole block of keys and values does not fit, every tile is query-major, in steps of part of a block.
    block_bytes = 2 * columns * depth * size
    fits = block_bytes + rows * depth * size <= max(target.shared_memory, 72 << 10)
    gathers = fits_key_major_sm90(problem, target)
    return ForwardConfig(
        rows=rows,
        num_warps=4 if large_tiles or target.backend == "hip" or depth <= 64 else 8,
        num_stages=1,
        max_registers=None,
        length=max(16, 2048 // problem.group_size),
        query_major_rows=query_major_rows,
        query_major_columns=query_major_columns,
        query_major_warps=8 if query_major_rows * query_major_columns > 64 * 64 else 4,
        query_major_stages=2 if target.backend == "cuda" and tile_bytes <= target.shared_memory else 1,
        query_major_registers=128 if target.arch == 90 and large_step == 1 else None,
        query_major_bulk_copies=large_tiles and size == 2,
        query_major_sm90=fits_query_major_sm90(problem, target),
        key_major_sm90=gathers,
        longest_union=64 * topk if not fits else topk * 7 // 4 if gathers else topk * 2,
        query_major_only=not fits,
    )


def candidates(problem: Problem, target: Target, config: ForwardConfig) -> Iterator[Changes]:
    """What tuning tries: tiles of both orders of work, and the choice between the orders."""
    if config.key_major_sm90:
        yield from near("length", config.length, 16, 16384)
        yield {"key_major_sm90": False}
    elif not config.query_major_only:
        yield from near("num_warps", config.num_warps, 4, 8)
        yield from near("rows", config.rows, 16, 128)
        yield from stages(target, "num_stages", config.num_stages)
        yield from registers(target, "max_registers", config.max_registers)
        yield from near("length", config.length, 16, 16384)
    if config.query_major_sm90:
        yield from stages(target, "query_major_stages", config.query_major_stages)
        yield {"query_major_sm90": False}
    else:
        yield from near("query_major_warps", config.query_major_warps, 4, 8)
        yield from near("query_major_rows", config.query_major_rows, padded(problem.group_size), 256)
        yield from near("query_major_columns", config.query_major_columns, 16, padded(problem.block_size))
        yield from stages(target, "query_major_stages", config.query_major_stages)
        yield from registers(target, "query_major_registers", config.query_major_registers)
    if not config.query_major_only:
        yield {"longest_union": config.longest_union * 3 // 4}
        yield {"longest_union": config.longest_union * 4 // 3}
