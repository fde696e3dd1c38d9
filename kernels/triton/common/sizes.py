"""The sizes of a problem, which most kernels take as constants."""

import functools
from dataclasses import dataclass
from typing import Any

from ...problem import Problem
from .target import padded


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: `triton.cdiv`, which takes microseconds, as it may also be called in a kernel."""
    return -(-a // b)


@dataclass(frozen=True)
class Sizes:
    """A kernel's constants that a Problem alone gives; depth: head_dim, padded. Kernels add their own by inheriting."""

    topk: int
    group_size: int
    head_dim: int
    block_size: int
    depth: int


@functools.lru_cache
def sizes_of(problem: Problem) -> dict[str, Any]:
    """The fields of a problem's Sizes; topk is 0 where every visible block is taken."""
    return {
        "topk": problem.topk or 0,
        "group_size": problem.group_size,
        "head_dim": problem.head_dim,
        "block_size": problem.block_size,
        "depth": padded(problem.head_dim),
    }
