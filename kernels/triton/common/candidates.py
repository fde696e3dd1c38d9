"""Values near those of a configuration, for what tuning tries."""

from ...tuning import Changes
from .target import Target


def near(name: str, value: int, least: int, most: int) -> list[Changes]:
    """Half of a field's value and twice it, where that is from `least` to `most`."""
    return [{name: size} for size in (value // 2, value * 2) if least <= size <= most]


def stages(target: Target, name: str, value: int) -> list[Changes]:
    """A stage more, a stage less; AMD GPUs have room for two."""
    most = 2 if target.backend == "hip" else 6
    return [{name: count} for count in (value + 1, value - 1) if 1 <= count <= most]


def registers(target: Target, name: str, value: int | None) -> list[Changes]:
    """Limits with which two or three programs of 4 warps more share a multiprocessor; for NVIDIA GPUs."""
    return [{name: limit} for limit in (None, 128, 168) if limit != value and target.backend == "cuda"]
