"""Tile sizes, warps and stages of the index loss: pure functions of the problem and the target, never of a length."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import triton

from ...problem import Problem
from ...tuning import Changes
from ..common.candidates import near, stages
from ..common.sizes import cdiv
from ..common.target import Target, padded

# The fields of a Problem that a configuration depends on, and the fields of a configuration that tuning may change.
DEPENDS_ON = ("head_dim", "index_head_dim", "block_size", "element_size")
TUNABLE = ("rows", "columns", "num_warps", "num_stages", "length")


@dataclass(frozen=True)
class LossConfig:
    """rows: entries per step; columns: keys per part of a block; length: entries per work item.

    sm90: whether the kernels for Hopper may run; they have tile sizes of their own.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    length: int = 1024
    sm90: bool = True


@dataclass(frozen=True)
class LossConstants:
    """Constants of the index loss's kernels.

    head_dim, index_head_dim: D and Di; depth, index_depth: the same, padded; rows, columns, stages: of the
    configuration; parts: parts of `columns` keys per block; shares: (top-k slot, part) pairs that `index_lse_kernel`
    reads at once; block_size, entries, teacher_rows: of the `teacher` that is given, 0 where there is none.
    """

    head_dim: int
    depth: int
    index_head_dim: int
    index_depth: int
    rows: int
    columns: int
    stages: int
    parts: int
    shares: int
    block_size: int
    entries: int = 0
    teacher_rows: int = 0


@functools.lru_cache
def default_config(problem: Problem, target: Target) -> LossConfig:
    """Tiles that fit the registers: the teacher's tile, and the gradient of a part's index keys."""
    depth, index_depth = padded(problem.head_dim), padded(problem.index_head_dim)
    wide = max(depth, index_depth) > 128
    columns = padded(problem.block_size)
    if problem.element_size > 2:
        return LossConfig(16, min(columns, 16 if wide else 32), 8 if wide else 4, 1)
    if target.backend == "hip":
        return LossConfig(16 if wide else 32, min(columns, 32 if wide else 128), 4, 1)
    sm90, sm100 = target.arch == 90, target.arch in (100, 103)
    rows = 64 if sm90 or (sm100 and not wide) else 32
    columns = min(columns, 64 if sm100 else 128)
    if wide:
        columns = min(columns, 64 if sm90 else 32)
    kept = columns * (depth + index_depth) + rows * (index_depth + columns)
    num_stages = (target.shared_memory // problem.element_size - kept) // (rows * depth)
    return LossConfig(rows, columns, 8, max(1, min(3 if rows == 64 else 2, num_stages)))


def candidates(problem: Problem, target: Target, config: LossConfig) -> Iterator[Changes]:
    """Changes that tuning tries; each leaves the loss and its gradients as they are but for rounding."""
    yield from near("num_warps", config.num_warps, 4, 8)
    yield from stages(target, "num_stages", config.num_stages)
    yield from near("rows", config.rows, 16, 128)
    yield from near("columns", config.columns, 16, padded(problem.block_size))
    yield from near("length", config.length, 16, 16384)


@functools.lru_cache
def loss_constants(config: LossConfig, problem: Problem, entries: int = 0, teacher_rows: int = 0) -> LossConstants:
    """Constants of the index loss's kernels; where every visible block is taken, topk grows with the length."""
    parts = cdiv(problem.block_size, config.columns)
    return LossConstants(
        head_dim=problem.head_dim,
        depth=padded(problem.head_dim),
        index_head_dim=problem.index_head_dim,
        index_depth=padded(problem.index_head_dim),
        rows=config.rows,
        columns=config.columns,
        stages=config.num_stages,
        parts=parts,
        shares=64 if problem.topk is None else min(64, triton.next_power_of_2(problem.topk * parts)),
        block_size=problem.block_size,
        entries=entries,
        teacher_rows=teacher_rows,
    )
