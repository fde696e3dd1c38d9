"""Tile sizes, warps and stages of the decoding kernels: pure functions of Problem, Target and number of rows."""

import functools
from dataclasses import dataclass

import triton

from ...problem import Problem
from ..common.target import Target, padded

# A program of `combine` holds the partial results of all splits at once.
MOST_SPLITS = 64


@dataclass(frozen=True)
class AttendConfig:
    """columns: keys per step; num_splits: programs that share the chosen blocks of one query and group."""

    columns: int
    num_warps: int
    num_stages: int
    num_splits: int


def num_steps(problem: Problem, columns: int) -> int:
    """Steps of `columns` keys in all chosen blocks of a query."""
    return (problem.topk or 1) * triton.cdiv(problem.block_size, columns)


def max_splits(problem: Problem, columns: int) -> int:
    """The largest number of splits, whatever the number of rows."""
    return min(num_steps(problem, columns), MOST_SPLITS)


@functools.lru_cache
def default_config(problem: Problem, target: Target, num_rows: int) -> AttendConfig:
    """Tiles of the attention; num_rows: pairs of a query and a group.

    The number of rows decides the number of splits, which is known at run time, and one of two variants of the other
    fields: few rows get a split per step, more rows several steps per split.
    """
    vector = padded(problem.head_dim) * problem.element_size
    # More of wide vectors would spill, or exceed shared memory.
    columns = min(padded(problem.block_size), 64 if vector <= 512 else 16)
    num_stages = max(1, min(3, 1 + (target.shared_memory - (16 << 10)) // (columns * vector * 2)))
    if target.backend == "hip":
        num_stages = min(num_stages, 2)
    steps = num_steps(problem, columns)
    num_splits = min(max_splits(problem, columns), max(1, 2 * target.num_sms // max(num_rows, 1)))
    if num_splits == steps:
        # Programs of one step have no next step to load; with fewer than two stages each load would be waited for.
        num_stages = min(num_stages, 2)
    return AttendConfig(columns, 4, num_stages, triton.cdiv(steps, triton.cdiv(steps, num_splits)))
