"""What is worth trying beside the configurations that ship: for each kernel, fields and values near the shipped ones.

Every list holds changes that leave results right. Whether they fit into a GPU's registers and shared memory is for
the trial to find out.
"""

from collections.abc import Iterator

from ...tuning import Changes
from ..backward.config import BackwardConfig
from ..common.candidates import near, stages
from ..common.target import Target, padded
from ..forward.config import TUNABLE as FORWARD_TUNABLE
from ..loss.config import LossConfig
from ..selection.config import SelectionConfig

# The fields that hold for every length: what a file of changes may name.
TUNABLE = {
    "selection": ("rows", "num_warps", "num_stages", "period"),
    "forward": FORWARD_TUNABLE,
    "backward": ("rows", "columns", "num_warps", "num_stages", "length", "swap", "hopper"),
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


def backward_candidates(target: Target, config: BackwardConfig, block_size: int) -> Iterator[Changes]:
    """Changes to try for the backward."""
    if config.hopper:
        yield from stages(target, "num_stages", config.num_stages)
        yield from near("length", config.length, 16, 16384)
        yield {"hopper": False}
        return
    yield from loss_candidates(target, config, block_size)
    yield {"swap": not config.swap}


def loss_candidates(target: Target, config: LossConfig | BackwardConfig, block_size: int) -> Iterator[Changes]:
    """Changes to try for the index loss, and for what else takes the rows of a piece past a part of its block."""
    yield from near("num_warps", config.num_warps, 4, 8)
    yield from stages(target, "num_stages", config.num_stages)
    yield from near("rows", config.rows, 16, 128)
    yield from near("columns", config.columns, 16, padded(block_size))
    yield from near("length", config.length, 16, 16384)
