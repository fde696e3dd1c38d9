"""Tile sizes, warps and stages of the decoding kernels: pure functions of target and shape."""

from dataclasses import dataclass

import triton

from ..common.target import Target, padded


@dataclass(frozen=True)
class AttendConfig:
    """chunk: keys a step; num_splits: programs that share the chosen blocks of one query and group."""

    chunk: int
    num_warps: int
    num_stages: int
    num_splits: int


def attend_config(
    target: Target, *, num_rows: int, head_dim: int, block_size: int, topk: int, element_size: int
) -> AttendConfig:
    """Tiles of the decode attention: num_rows is the number of (query, group) pairs."""
    vector = padded(head_dim) * element_size
    # More of wide vectors would spill, or not fit.
    chunk = min(padded(block_size), 64 if vector <= 512 else 16)
    width = chunk * vector * 2
    num_stages = max(1, min(3, 1 + (target.shared_memory - (16 << 10)) // width))
    if target.backend == "hip":
        num_stages = min(num_stages, 2)
    steps = topk * triton.cdiv(block_size, chunk)
    num_splits = min(steps, 64, max(1, 2 * target.num_sms // max(num_rows, 1)))
    if num_splits == steps:
        # Programs of one step have nothing to load ahead of; fewer than two stages, and it would wait for each load.
        num_stages = min(num_stages, 2)
    return AttendConfig(chunk, 4, num_stages, triton.cdiv(steps, triton.cdiv(steps, num_splits)))
