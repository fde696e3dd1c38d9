"""Tile sizes, warps and stages of the backward kernels: pure functions of target and shape."""

from dataclasses import dataclass

from ..common.target import Target, gathers_on_hopper, padded


@dataclass(frozen=True)
class BackwardConfig:
    """rows: query rows a step; columns: keys of a block that one program holds, further ones taking further launches;
    length: entries of a piece, one program's share of a list; swap: how dQ is multiplied, see `gradient_tile`;
    hopper: by `backward_hopper`, where that takes the tensors, with its own rows and warps.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    length: int
    swap: bool
    hopper: bool = False


def backward_config(
    target: Target, *, group_size: int, head_dim: int, block_size: int, element_size: int
) -> BackwardConfig:
    """Tiles of the main branch's backward: dK, dV fill the registers, K, V and the rows on their way shared memory."""
    depth = padded(head_dim)
    large = target.backend == "cuda" and target.shared_memory >= 163 << 10
    if element_size > 2:
        rows, columns, num_stages = 16, 4096 // depth, 1
    elif large and target.arch in (90, 100, 103):
        rows, columns, num_stages = (64, 128, 3) if depth <= 128 else (32, 64, 2)
    elif large:
        rows, columns, num_stages = (32, 128, 2) if depth <= 128 else (16, 64, 2)
    elif target.backend == "cuda":
        rows, columns, num_stages = 32 if depth <= 64 else 16, 128 if depth <= 128 else 32, 2
    else:
        rows, columns, num_stages = (32, 128, 1) if depth <= 128 else (16, 32, 1)
    columns = min(columns, padded(block_size))
    few = element_size <= 2 and columns * depth <= 64 * 64
    swap = target.backend == "cuda" and (element_size > 2 or depth > 128 or not large)
    num_warps = 4 if target.backend == "hip" or few else 8
    hopper = gathers_on_hopper(target, group_size, head_dim, block_size, element_size)
    return BackwardConfig(rows, columns, num_warps, num_stages, max(16, 8192 // group_size), swap, hopper)
