"""Tile sizes, warps and stages of the forward kernels: pure functions of target and shape."""

from dataclasses import dataclass

import triton

from ..common.target import GLUON, Target, gathers_on_hopper, launch_options, padded


@dataclass(frozen=True)
class ForwardConfig:
    """How the main branch's forward is cut up.

    rows: packed query rows a step of the KV-outer kernel; length: entries of a piece; walk_rows: rows of a tile that
    walks the union of its tokens' blocks, walk_columns: keys a step of it, and walk_limit: the longest union that it
    walks, 0 for never; walk_all: a block is too large for the KV-outer kernel, so every tile walks; walk_hopper and
    hopper: by `walk_hopper` and `by_block_hopper`, where these take the tensors.
    """

    rows: int
    num_warps: int
    num_stages: int
    max_registers: int | None
    length: int
    walk_rows: int
    walk_columns: int
    walk_warps: int
    walk_stages: int
    walk_registers: int | None
    walk_tma: bool
    walk_limit: int
    walk_all: bool
    walk_hopper: bool
    hopper: bool

    def launch_options(self) -> dict[str, int]:
        """Launch options of the KV-outer kernel."""
        return launch_options(self.num_warps, self.num_stages, self.max_registers)

    def walk_options(self) -> dict[str, int]:
        """Launch options of the walking kernel."""
        return launch_options(self.walk_warps, self.walk_stages, self.walk_registers)

    def walk_tokens(self, group_size: int, topk: int) -> int:
        """Tokens of a walking tile: a bit each of an int64, and no more choices between them than one sort takes."""
        return max(1, min(64, self.walk_rows // group_size, 4096 // triton.next_power_of_2(topk)))


def forward_config(
    target: Target,
    *,
    group_size: int,
    head_dim: int,
    block_size: int,
    topk: int,
    element_size: int,
    decoded: bool = False,
) -> ForwardConfig:
    """Tiles of the main branch's forward: keys, values, queries and the copies in flight fill the shared memory.

    decoded: keys and values are e4m3, and pass through registers.
    """
    columns, depth = padded(block_size), padded(head_dim)
    hopper = target.backend == "cuda" and target.arch in (90, 100, 103)
    # What is meant for tiles of 128 keys of 128 numbers of 16 bits takes fewer rows of anything larger.
    large = max(1, columns * depth * element_size // (128 * 128 * 2))
    # Below Hopper the block's keys and values end up in registers, which leaves less room for rows.
    rows = max(16, (64 if hopper else 16 if depth <= 64 else 32) // large)
    # Half a block a step: with 128 registers a thread, two programs share a multiprocessor.
    walk_columns = max(16, min(columns, (32 if decoded and not hopper else 64) // large))
    walk_rows = max(padded(group_size), (128 if hopper else 64) // large)
    walk_tile = (walk_rows + 4 * walk_columns) * depth * element_size
    # Where a whole block of keys and values does not fit, every tile walks, in steps of part of a block.
    block_bytes = 2 * columns * depth * element_size
    fits = block_bytes + rows * depth * element_size <= max(target.shared_memory, 72 << 10)
    plain = element_size == 2 and not decoded and head_dim in (64, 128) and block_size in (64, 128)
    by_block_hopper = not decoded and gathers_on_hopper(target, group_size, head_dim, block_size, element_size)
    return ForwardConfig(
        rows=rows,
        num_warps=4 if hopper or target.backend == "hip" or depth <= 64 else 8,
        num_stages=1,
        max_registers=None,
        length=max(16, 2048 // group_size),
        walk_rows=walk_rows,
        walk_columns=walk_columns,
        walk_warps=8 if walk_rows * walk_columns > 64 * 64 else 4,
        walk_stages=2 if target.backend == "cuda" and walk_tile <= target.shared_memory else 1,
        walk_registers=128 if target.arch == 90 and large == 1 else None,
        walk_tma=hopper and element_size == 2,
        walk_limit=64 * topk if not fits else topk * 7 // 4 if by_block_hopper else topk * 2,
        walk_all=not fits,
        walk_hopper=GLUON and target.arch == 90 and plain and group_size in (2, 4, 8, 16, 32, 64),
        hopper=by_block_hopper,
    )
