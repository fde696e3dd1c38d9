"""Build kernels for GPUs that need not be present, and read what the compiler says of them."""

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flexmsa.kernels.triton import configs  # noqa: E402

TARGETS = {
    "sm_80": configs.Target("cuda", 80, 108),
    "sm_86": configs.Target("cuda", 86, 84),
    "sm_90": configs.Target("cuda", 90, 132),
    "sm_100": configs.Target("cuda", 100, 148),
    "gfx942": configs.Target("hip", "gfx942", 304),
}
BF16 = {"index_q_ptr", "index_k", "q_ptr", "k_ptr", "v_ptr", "out_ptr"}
FP32 = {"lse_ptr", "partial_out_ptr", "partial_lse_ptr"}
# Strides of dense rows are 1 and the others multiples of 16, which the launcher finds by itself.
UNIT_STRIDES = {"stride_qd", "stride_kd", "stride_vd", "stride_ik"}


def argument_type(name, overrides):
    if name in overrides:
        return overrides[name]
    if name in BF16:
        return "*bf16"
    if name in FP32:
        return "*fp32"
    return "fp32" if name == "scale" else "*i32" if name.endswith("_ptr") else "i32"


@pytest.fixture
def build(tmp_path, monkeypatch):
    """compile(kernel, target, constants, warps, stages) -> the compiled kernel, cached nowhere.

    It may spill `spills` bytes a thread, none by default.
    """
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))

    def build(kernel, target, constants, num_warps, num_stages=2, maxnreg=None, spills=0, **overrides):
        units = UNIT_STRIDES & set(kernel.arg_names)
        constants = {**constants, **dict.fromkeys(units, 1)}
        signature = {
            name: "constexpr" if name in constants else argument_type(name, overrides) for name in kernel.arg_names
        }
        aligned = [
            (place,)
            for place, (name, kind) in enumerate(signature.items())
            if kind.startswith("*") or (kind == "i32" and name.startswith("stride"))
        ]
        source = ASTSource(kernel, signature, constants, {place: [["tt.divisibility", 16]] for place in aligned})
        lanes = 64 if target.backend == "hip" else 32
        compiled = triton.compile(
            source,
            target=GPUTarget(target.backend, target.arch, lanes),
            options=configs.launch_options(num_warps, num_stages, maxnreg),
        )
        assert compiled.metadata.shared <= target.shared_memory
        assert spilled_bytes(compiled, tmp_path) <= spills
        return compiled

    return build


def spilled_bytes(compiled, folder):
    """Stack and local memory of NVIDIA code, spilled vector registers of AMD code (scalar ones stay in registers)."""
    if "amdgcn" in compiled.asm:
        return sum(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def target(request):
    return request.param
