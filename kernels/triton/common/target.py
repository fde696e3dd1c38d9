"""GPUs as far as the kernels need to know them."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton

from ...problem import Problem

# Gluon is an experimental part of Triton, whose names change: what is written in it is compiled and launched by these
# versions. On GPUs it has run with 3.6 and 3.7; compiled by 3.9, it meets before each arrival at a barrier as before.
GLUON_VERSIONS = ("3.6", "3.7", "3.8", "3.9")
GLUON = triton.__version__.startswith(tuple(f"{version}." for version in GLUON_VERSIONS))


@dataclass(frozen=True)
class Target:
    """A GPU as far as the choice of tiles needs it: `arch` is 80, 86, 90, 100 or a gfx name."""

    backend: str
    arch: int | str
    num_sms: int

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one program may take."""
        if self.backend == "hip":
            return 64 << 10
        by_arch: dict[int | str, int] = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227}
        return by_arch.get(self.arch, 99) << 10

    @property
    def has_e4m3(self) -> bool:
        """Whether the GPU converts and multiplies e4m3 numbers by itself."""
        return self.backend == "cuda" and int(self.arch) >= 89

    @property
    def overlaps(self) -> bool:
        """Whether a launch may begin while the kernel before it ends (see `overlap`)."""
        return self.backend == "cuda" and int(self.arch) >= 90


_assumed: ContextVar[Target] = ContextVar("assumed")


@contextlib.contextmanager
def assume_target(target: Target) -> Iterator[None]:
    """Let meta tensors be on `target`."""
    token = _assumed.set(target)
    try:
        yield
    finally:
        _assumed.reset(token)


def target_of(device: torch.device) -> Target:
    """The target of a device: of "meta", the one that `assume_target` says."""
    return _assumed.get() if device.type == "meta" else _device_target(device)


@functools.lru_cache
def _device_target(device: torch.device) -> Target:
    # The interpreter's CPU stands in as a small sm_80.
    if device.type != "cuda":
        return Target("cuda", 80, 2)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    target = Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)
    if target.arch == 90 and not GLUON:
        _warn_without_gluon(triton.__version__)
    return target


@functools.cache
def _warn_without_gluon(version: str) -> None:
    warnings.warn(
        "flexmsa: the kernels in Gluon, which are the faster ones on Hopper, are used with Triton "
        f"{', '.join(GLUON_VERSIONS)}, and not with {version}: the kernels in Triton run instead; install one of these "
        "versions, or a newer flexmsa",
        stacklevel=2,
    )


def padded(size: int, least: int = 16) -> int:
    """The tile size that holds `size`: a power of two, at least what tl.dot takes."""
    return max(least, triton.next_power_of_2(size))


def fits_gather_sm90(problem: Problem, target: Target) -> bool:
    """Whether the Gluon kernel `gradient_sm90`, which gathers queries, has tiles of this shape."""
    sizes = problem.head_dim in (64, 128) and problem.block_size == 128 and problem.element_size == 2
    return GLUON and target.arch == 90 and sizes and problem.group_size <= 64
