"""Every kernel, as the launcher would launch it at M3's shape in bf16, built for GPUs that need not be present.

Asserted of the machine code: nothing is spilled, shared memory fits the target, and Hopper's scorer uses wgmma.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from flexmsa.kernels.triton import configs, primitives, selection  # noqa: E402
from flexmsa.kernels.triton.decode import attend_constants, attend_kernel, combine_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

TARGETS = {
    "sm_80": configs.Target("cuda", 80, 108),
    "sm_86": configs.Target("cuda", 86, 84),
    "sm_90": configs.Target("cuda", 90, 132),
    "sm_100": configs.Target("cuda", 100, 148),
    "gfx942": configs.Target("hip", "gfx942", 304),
}
GROUPS, GROUP_SIZE, DEPTH, BLOCK, TOPK = 4, 16, 128, 128, 16
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
    """compile(kernel, target, constants, warps, stages) -> the compiled kernel, cached nowhere."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))

    def build(kernel, target, constants, num_warps, num_stages=2, **overrides):
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
            options={"num_warps": num_warps, "num_stages": num_stages},
        )
        assert compiled.metadata.shared <= target.shared_memory
        assert spilled_bytes(compiled, tmp_path) == 0
        return compiled

    return build


def spilled_bytes(compiled, folder):
    """Stack and local memory of NVIDIA code, spilled registers of AMD code."""
    if "amdgcn" in compiled.asm:
        return sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])))
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def target(request):
    return request.param


@pytest.mark.parametrize(
    ("seqlen_q", "seqlen_k", "table"), [(131072, 131072, True), (1, 1 << 20, False)], ids=["prefill", "decode"]
)
def test_selection(build, target, seqlen_q, seqlen_k, table):
    config = configs.selection_config(
        target,
        num_sequences=1,
        num_kv_heads=GROUPS,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        index_head_dim=DEPTH,
        block_size=BLOCK,
        topk=TOPK,
        element_size=2,
        tma_ready=True,
    )
    constants = selection.selection_constants(config, GROUPS, DEPTH, BLOCK, TOPK, table)
    overrides = {"workspace_ptr": "*i64"} if config.num_splits > 1 else {}
    if config.use_tma:
        overrides["index_k"] = f"tensordesc<bf16[1,{BLOCK},{DEPTH}]>"
    compiled = build(selection.selection_kernel, target, constants, config.num_warps, config.num_stages, **overrides)
    if target.arch == 90 and seqlen_q > 1:
        assert "wgmma.mma_async" in compiled.asm["ptx"]
    assert (config.num_splits > 1) == (seqlen_q == 1)


@pytest.mark.parametrize(("num_rows", "splits"), [(4, 256), (1352, 16)])
def test_merge(build, target, num_rows, splits):
    lanes, rows, num_warps = configs.merge_config(target, num_rows, splits)
    constants = {"TOPK": TOPK, "KEPT": 16, "LANES": lanes, "ROWS": rows}
    build(selection.merge_kernel, target, constants, num_warps, workspace_ptr="*i64")


@pytest.mark.parametrize("batch", [1, 128])
def test_attend_and_combine(build, target, batch):
    config = configs.attend_config(
        target, num_rows=batch * GROUPS, head_dim=DEPTH, block_size=BLOCK, topk=TOPK, element_size=2
    )
    constants = attend_constants(config, GROUPS, GROUP_SIZE, DEPTH, BLOCK, TOPK, False)
    split = {"out_ptr": "*fp32"} if config.num_splits > 1 else {}
    build(attend_kernel, target, constants, config.num_warps, config.num_stages, **split)
    splits = triton.next_power_of_2(config.num_splits)
    if splits > 1:
        build(combine_kernel, target, {"HEAD_DIM": DEPTH, "SPLITS": splits, "DEPTH": DEPTH}, 4)


def test_tile_ends(build, target):
    build(primitives.tile_ends_kernel, target, {"TOKENS": 64, "CHUNK": 1024}, 4)
