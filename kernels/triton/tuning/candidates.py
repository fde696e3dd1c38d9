"""What is worth trying beside the configurations that ship: for each kernel, fields and values near the shipped ones.

Every list holds changes that leave results right. Whether they fit into a GPU's registers and shared memory is for
the trial to find out.
"""

from collections.abc import Iterator

from ...tuning import Changes
from ..backward.config import BackwardConfig
from ..common.target import Target, padded
from ..forward.config import ForwardConfig
from ..loss.config import LossConfig

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
    "backward": ("rows", "columns", "num_warps", "num_stages", "length", "swap", "hopper"),
    "loss": ("rows", "columns", "num_warps", "num_stages", "length"),
}


def near(name: str, value: int, least: int, most: int) -> list[Changes]:
    """Half of a field's value and twice it, where that is from `least` to `most`."""
    return [{name: size} for size in (value // 2, value * 2) if least <= size <= most]


def stages(target: Target, name: str, value: int) -> list[Changes]:
    """A stage more, a stage less; AMD GPUs have room for two."""
    most = 2 if target.backend == "hip" else 6
    return [{name: count} for count in (value + 1, value - 1) if 1 <= count <= most]


def registers(target: Target, name: str, value: int | None) -> list[Changes]:
    """Limits of registers with which two or three programs of 4 warps more share a multiprocessor; NVIDIA only."""
    return [{name: limit} for limit in (None, 128, 168) if limit != value and target.backend == "cuda"]


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
