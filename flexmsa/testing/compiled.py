"""Build kernels for GPUs that need not be present, and read what the compiler says of them.

Needs Triton, so `flexmsa.testing` does not import it by itself.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from flexmsa.kernels.triton.common.gluon_sm90 import box_layout
from flexmsa.kernels.triton.common.target import Target
from flexmsa.testing.launches import TARGETS  # noqa: F401

BF16 = {"index_q_ptr", "index_k", "q_ptr", "k_ptr", "v_ptr", "out_ptr"}
FP32 = {"lse_ptr", "partial_out_ptr", "partial_lse_ptr"}
UINT8 = {"k_scale_ptr", "v_scale_ptr", "index_k_scale_ptr"}
# Where the keys are not split, selection's lists are its ids, and attend's the sequences.
INT32 = {
    *("sequences_ptr", "tile_ends_ptr", "page_table_ptr", "kv_starts_ptr", "kv_lens_ptr", "lens_ptr", "status_ptr"),
    *("ids_ptr", "lists_ptr", "tickets_ptr", "block_indices_ptr", "list_ptr", "walks_ptr"),
    *("numbers_ptr", "blocks_ptr", "before_ptr", "plan_ptr", "shares_ptr"),
    *("queries_ptr", "limits_ptr", "places_ptr"),
}
# Strides of dense rows are 1 and the others multiples of 16, which the launcher finds by itself.
UNIT_STRIDES = {
    "stride_qd",
    "stride_kd",
    "stride_vd",
    "stride_ik",
    "stride_id",
    "stride_ckd",
    "stride_cvd",
    "stride_cid",
}


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


def argument_type(name: str, types: Mapping[str, str]) -> str:
    """Triton's type of a kernel's argument: what `types` says, or what its name tells."""
    if name in types:
        return types[name]
    if name in BF16:
        return "*bf16"
    if name in FP32:
        return "*fp32"
    if name in UINT8:
        return "*u8"
    if name in INT32:
        return "*i32"
    if name.endswith("_ptr"):
        raise ValueError(f"{name}: expected a pointer whose type is known, got a new name; give its type or list it")
    return "fp32" if name == "scale" else "i32"


def box_types(boxes: Mapping[str, list[int]], vectors: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """Triton's types of what a Gluon kernel copies in boxes: bf16 vectors and fp32 numbers, e4m3 vectors and scales."""
    numbers = torch.float32 if vectors == torch.bfloat16 else torch.uint8
    kinds = {torch.float32: "fp32", torch.uint8: "u8", torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}
    types = {}
    for name, box in boxes.items():
        dtype = numbers if len(box) == 1 else vectors
        types[name] = f"tensordesc<{kinds[dtype]}{box},{box_layout(tuple(box), dtype)}>"
    return types


def build(
    kernel: Any, target: Target, constants: Mapping[str, Any], options: Mapping[str, int], types: Mapping[str, str]
) -> Any:
    """The kernel compiled for a target: compile-time arguments, launch options, and the types its names do not tell."""
    units = UNIT_STRIDES & set(kernel.arg_names)
    constants = {**constants, **dict.fromkeys(units, 1)}
    if "OVERLAP" in kernel.arg_names:
        constants["OVERLAP"] = target.overlap()["OVERLAP"]
    signature = {name: "constexpr" if name in constants else argument_type(name, types) for name in kernel.arg_names}
    aligned = [
        (place,)
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.startswith("stride"))
    ]
    source_of = GluonASTSource if kernel.is_gluon() else ASTSource
    source = source_of(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
    lanes = 64 if target.backend == "hip" else 32
    return triton.compile(source, target=GPUTarget(target.backend, target.arch, lanes), options=dict(options))


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

    If all do, each waits for the one before: as ptxas has it where registers do not suffice.
    """
    products = [line for line in _dump(cubin, "--dump-sass").splitlines() if "GMMA." in line]
    return len(products), sum("gsb0" in line for line in products)


def _dump(cubin: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([str(tool), option, str(path)], capture_output=True, text=True, check=True).stdout
