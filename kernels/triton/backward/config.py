"""Tile sizes, warps and stages of the backward kernels: pure functions of the problem and the target."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from ...problem import Problem
from ...tuning import Changes
from ..common.candidates import near, stages
from ..common.target import Target, fits_gather_sm90, padded

# The fields of a Problem that a configuration depends on, and the fields of a configuration that tuning may change.
DEPENDS_ON = ("group_size", "head_dim", "block_size", "element_size")
TUNABLE = ("rows", "columns", "num_warps", "num_stages", "length", "swap", "sm90")


@dataclass(frozen=True)
class BackwardConfig:
    """Tiles of the main branch's backward.

    rows: query rows per step; columns: keys of a block that one program holds, where further keys take further
    launches; length: entries per work item, one program's share of a list; swap: how dQ is multiplied, see
    `gradient.gradient_tile`; teacher: `gradient` can leave the index loss its teacher; sm90: `gradient_sm90` computes
    the gradients, where it supports the problem, with its own rows and warps.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    length: int
    swap: bool
    teacher: bool = True
    sm90: bool = False


@functools.lru_cache
def default_config(problem: Problem, target: Target) -> BackwardConfig:
    """Tiles that ship. dK and dV fill the registers; K, V and the rows that are being copied fill the shared memory."""
    depth = padded(problem.head_dim)
    large = target.backend == "cuda" and target.shared_memory >= 163 << 10
    if problem.element_size > 2:
        rows, columns, num_stages = 16, 4096 // depth, 1
    elif large and target.arch in (90, 100, 103):
        rows, columns, num_stages = (64, 128, 3) if depth <= 128 else (32, 64, 2)
    elif large:
        rows, columns, num_stages = (32, 128, 2) if depth <= 128 else (16, 64, 2)
    elif target.backend == "cuda":
        rows, columns, num_stages = 32 if depth <= 64 else 16, 128 if depth <= 128 else 32, 2
    else:
        rows, columns, num_stages = (32, 128, 1) if depth <= 128 else (16, 32, 1)
    columns = min(columns, padded(problem.block_size))
    few = problem.element_size <= 2 and columns * depth <= 64 * 64
    swap = target.backend == "cuda" and (problem.element_size > 2 or depth > 128 or not large)
    num_warps = 4 if target.backend == "hip" or few else 8
    # The tensor memory of sm_100 has no room for another product.
    teacher = target.arch not in (100, 103) or rows % problem.group_size == 0
    sm90 = fits_gather_sm90(problem, target)
    length = max(16, 8192 // problem.group_size)
    return BackwardConfig(rows, columns, num_warps, num_stages, length, swap, teacher, sm90)


def candidates(problem: Problem, target: Target, config: BackwardConfig) -> Iterator[Changes]:
    """Changes to a configuration that are worth timing; none changes the results but for rounding."""
    if config.sm90:
        yield from stages(target, "num_stages", config.num_stages)
        yield from near("length", config.length, 16, 16384)
        yield {"sm90": False}
        return
    yield from near("num_warps", config.num_warps, 4, 8)
    yield from stages(target, "num_stages", config.num_stages)
    yield from near("rows", config.rows, 16, 128)
    yield from near("columns", config.columns, 16, padded(problem.block_size))
    yield from near("length", config.length, 16, 16384)
    yield {"swap": not config.swap}
