"""Tile sizes, warps and stages of the index-loss kernels: pure functions of target and shape."""

from dataclasses import dataclass

from ..common.target import Target, padded


@dataclass(frozen=True)
class LossConfig:
    """rows: entries a step; columns: keys of a part of a block; length: entries of a piece, one program's share."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    length: int = 1024


def loss_config(
    target: Target, *, head_dim: int, index_head_dim: int, block_size: int, element_size: int
) -> LossConfig:
    """Tiles of the index loss, by its registers: the tile of the teacher, and the gradient of a part's index keys."""
    depth, index_depth = padded(head_dim), padded(index_head_dim)
    wide = max(depth, index_depth) > 128
    columns = padded(block_size)
    if element_size > 2:
        return LossConfig(16, min(columns, 16 if wide else 32), 8 if wide else 4, 1)
    if target.backend == "hip":
        return LossConfig(16 if wide else 32, min(columns, 32 if wide else 128), 4, 1)
    hopper, blackwell = target.arch == 90, target.arch in (100, 103)
    rows = 64 if hopper or (blackwell and not wide) else 32
    columns = min(columns, 64 if blackwell else 128)
    if wide:
        columns = min(columns, 64 if hopper else 32)
    kept = columns * (depth + index_depth) + rows * (index_depth + columns)
    num_stages = (target.shared_memory // element_size - kept) // (rows * depth)
    return LossConfig(rows, columns, 8, max(1, min(3 if rows == 64 else 2, num_stages)))
