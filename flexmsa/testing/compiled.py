"""What the compiler says of a kernel: registers, shared memory, spills, products.

Needs Triton, so `flexmsa.testing` does not import it by itself.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Report:
    """What one compiled kernel takes.

    registers: of a thread, AMD's accumulation registers among them; shared: bytes of a program; spilled: bytes of a
    thread, of AMD code vector registers; wgmma: whether products are Hopper's asynchronous ones.
    """

    registers: int
    shared: int
    spilled: int
    wgmma: bool


def report(compiled: Any) -> Report:
    """Registers and spills of the machine code: of AMD's, from its metadata (scalar spills stay in registers)."""
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        registers = sum(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", code)))
        spilled = sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", code)))
        return Report(registers, compiled.metadata.shared, spilled, False)
    usage = resource_usage(compiled.asm["cubin"])
    registers = sum(map(int, re.findall(r"REG:(\d+)", usage)))
    spilled = sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))
    return Report(registers, compiled.metadata.shared, spilled, "wgmma.mma_async" in compiled.asm["ptx"])


def resource_usage(cubin: bytes) -> str:
    """What NVIDIA's tool prints of machine code; spilled registers are stack and local memory."""
    return _dump(cubin, "--dump-resource-usage")


def lone_products(cubin: bytes) -> tuple[int, int]:
    """How many of Hopper's asynchronous products there are in machine code, and how many end a group.

    If all of them do, ptxas has serialised the products because registers ran out.
    """
    products = [line for line in _dump(cubin, "--dump-sass").splitlines() if "GMMA." in line]
    return len(products), sum("gsb0" in line for line in products)


def _dump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([str(tool), option, str(path)], capture_output=True, text=True, check=True).stdout
