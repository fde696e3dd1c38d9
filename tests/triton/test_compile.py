"""Every kernel, as the launcher would launch it at M3's shape in bf16, built for GPUs that need not be present.

Asserted of the machine code: nothing is spilled, shared memory fits the target, and Hopper's scorer uses wgmma.
"""

import os

import pytest

triton = pytest.importorskip("triton")

from flexmsa.kernels.triton import configs, primitives, selection  # noqa: E402
from flexmsa.kernels.triton.decode import attend_constants, attend_kernel, combine_kernel  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

GROUPS, GROUP_SIZE, DEPTH, BLOCK, TOPK = 4, 16, 128, 128, 16


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
