"""GPUs as far as the kernels need to know them, and what a launch is told of them and of a cache."""

import functools
from dataclasses import dataclass

import torch
import triton


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

    def overlap(self) -> dict[str, bool]:
        """How the kernels of a decoding step are launched: each while the one before it ends, where the GPU can.

        A constant for `primitives.await_previous`, and Triton's option.
        """
        if self.backend == "cuda" and int(self.arch) >= 90:
            return {"OVERLAP": True, "launch_pdl": True}
        return {"OVERLAP": False}


@functools.lru_cache
def target_of(device: torch.device) -> Target:
    """The target of a device; a CPU (the interpreter) stands in as a small sm_80."""
    if device.type != "cuda":
        return Target("cuda", 80, 2)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.split(":")[0], properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def padded(size: int, least: int = 16) -> int:
    """The tile size that holds `size`: a power of two, at least what tl.dot takes."""
    return max(least, triton.next_power_of_2(size))


def storage_constants(target: Target, paged: bool, scaled: bool) -> dict[str, int | bool]:
    """The compile-time arguments that say how a kernel's keys are kept: in pages, in e4m3 with scales."""
    return {"PAGED": paged, "SCALED": scaled, "NATIVE": scaled and target.has_e4m3}


def launch_options(num_warps: int, num_stages: int, max_registers: int | None) -> dict[str, int]:
    """What Triton takes at a launch; max_registers is a limit a thread, for NVIDIA GPUs only."""
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return options if max_registers is None else {**options, "maxnreg": max_registers}
