"""Which tile sizes, warps and stages each kernel is launched with: pure functions of target and shape.

The compile tests call the same functions for GPUs that are not there, so what they compile is what is launched.
"""

from dataclasses import dataclass

import triton

from .targets import Target, launch_options, padded

# Gluon is an experimental part of Triton: what is written in it is launched by versions that it has run with.
GLUON = triton.__version__.startswith(("3.6.", "3.7."))


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


def gathers_on_hopper(target: Target, group_size: int, head_dim: int, block_size: int, element_size: int) -> bool:
    """Whether the Gluon kernels that gather queries, `by_block_hopper` and `backward_hopper`, take this shape."""
    shape = element_size == 2 and head_dim in (64, 128) and block_size == 128 and group_size in (8, 16, 32, 64)
    return GLUON and target.arch == 90 and shape


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
