"""What is worth trying beside the configurations that ship: for each kernel, fields and values near the shipped ones.

Every list holds changes that leave results right. Whether they fit into a GPU's registers and shared memory is for
the trial to find out.
"""

from collections.abc import Iterator

import torch

from ...problem import Problem
from ...tuning import Changes
from ..backward.config import BackwardConfig, candidates
from ..common.candidates import near, registers, stages
from ..common.target import Target, padded
from ..forward.config import ForwardConfig
from ..loss.config import LossConfig
from ..selection.config import SelectionConfig

# The fields that hold for every length: what a file of changes may name.
TUNABLE = {
    "selection": ("rows", "num_warps", "num_stages", "period"),
    "forward": (
        *("rows", "num_warps", "num_stages", "max_registers", "length"),
        *(
            "walk_rows",
            "walk_columns",
            "walk_warps",
            "walk_stages",
            "walk_registers",
            "walk_limit",
            "walk_hopper",
            "hopper",
        ),
    ),
    "backward": ("rows", "columns", "num_warps", "num_stages", "length", "swap", "sm90"),
    "loss": ("rows", "columns", "num_warps", "num_stages", "length"),
}


def selection_candidates(target: Target, config: SelectionConfig, num_kv_heads: int) -> Iterator[Changes]:
    """Changes to try for the selection."""
    if config.hopper:
        yield from stages(target, "num_stages", config.num_stages)
        return
    yield from near("num_warps", config.num_warps, 2, 16)
    yield from stages(target, "num_stages", config.num_stages)
    if config.period > 1:
        yield from near("period", config.period, 2, config.kept)
    if config.swap:
        return
    for rows, warps in ((config.rows // 2, config.num_warps // 2), (config.rows * 2, config.num_warps * 2)):
        if padded(num_kv_heads) <= rows <= min(512, 8192 // config.kept):
            yield {"rows": rows}
            yield {"rows": rows, "num_warps": warps}


def forward_candidates(target: Target, config: ForwardConfig, group_size: int, block_size: int) -> Iterator[Changes]:
    """Changes to try for the forward: of the KV-outer kernel, of the walking one, and of the choice between them."""
    if config.hopper:
        yield from near("length", config.length, 16, 16384)
        yield {"hopper": False}
    elif not config.walk_all:
        yield from near("num_warps", config.num_warps, 4, 8)
        yield from near("rows", config.rows, 16, 128)
        yield from stages(target, "num_stages", config.num_stages)
        yield from registers(target, "max_registers", config.max_registers)
        yield from near("length", config.length, 16, 16384)
    if config.walk_hopper:
        yield from stages(target, "walk_stages", config.walk_stages)
        yield {"walk_hopper": False}
    else:
        yield from near("walk_warps", config.walk_warps, 4, 8)
        yield from near("walk_rows", config.walk_rows, padded(group_size), 256)
        yield from near("walk_columns", config.walk_columns, 16, padded(block_size))
        yield from stages(target, "walk_stages", config.walk_stages)
        yield from registers(target, "walk_registers", config.walk_registers)
    if not config.walk_all:
        yield {"walk_limit": config.walk_limit * 3 // 4}
        yield {"walk_limit": config.walk_limit * 4 // 3}


def backward_candidates(target: Target, config: BackwardConfig, block_size: int) -> Iterator[Changes]:
    """Changes to try for the backward."""
    return candidates(Problem(num_kv_heads=1, dtype=torch.bfloat16, block_size=block_size), target, config)


def loss_candidates(target: Target, config: LossConfig, block_size: int) -> Iterator[Changes]:
    """Changes to try for the index loss."""
    yield from near("num_warps", config.num_warps, 4, 8)
    yield from stages(target, "num_stages", config.num_stages)
    yield from near("rows", config.rows, 16, 128)
    yield from near("columns", config.columns, 16, padded(block_size))
    yield from near("length", config.length, 16, 16384)
