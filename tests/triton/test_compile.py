"""Every kernel, as the launcher would launch it at M3's shape in bf16, built for GPUs that need not be present.

Asserted of the machine code: nothing is spilled, shared memory fits the target, and Hopper's scorer uses wgmma.
"""

import os

import pytest
import torch

triton = pytest.importorskip("triton")

from flexmsa.kernels.triton.common import primitives  # noqa: E402
from flexmsa.kernels.triton.common import target as targets  # noqa: E402
from flexmsa.kernels.triton.schedule import inverse_index as reverse_index  # noqa: E402
from flexmsa.kernels.triton.schedule import work_items as pieces  # noqa: E402
from flexmsa.kernels.triton.selection import config as selection_configs  # noqa: E402
from flexmsa.kernels.triton.selection import kernel_sm90 as scoring_hopper  # noqa: E402
from flexmsa.kernels.triton.selection import launch as selection  # noqa: E402
from flexmsa.kernels.triton.selection import merge  # noqa: E402
from flexmsa.kernels.triton.serving import config as serving_config  # noqa: E402
from flexmsa.kernels.triton.serving.attend import attend_constants, attend_kernel  # noqa: E402
from flexmsa.kernels.triton.serving.combine import combine_kernel, combine_warps  # noqa: E402
from flexmsa.testing.compiled import TARGETS, box_types, lone_products  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

GROUPS, GROUP_SIZE, DEPTH, BLOCK, TOPK = 4, 16, 128, 128, 16
SELECTIONS = {
    # name: (Sq, Sk, paged, e4m3 keys, e4m3 queries)
    "prefill": (131072, 131072, False, False, False),
    "prefill, all e4m3": (131072, 131072, False, True, True),
    "prefill, pages, e4m3": (131072, 131072, True, True, False),
    "decode": (1, 1 << 20, False, False, False),
    "decode, pages": (1, 1 << 20, True, False, False),
    "decode, e4m3": (1, 1 << 20, False, True, False),
    "decode, pages, e4m3": (1, 1 << 20, True, True, False),
    "drafts, pages": (16, 131072, True, False, False),
    "drafts, pages, e4m3": (16, 131072, True, True, False),
}


def selection_config(target, **changes):
    """The scorer's configuration for bf16 at M3's shape, or for what is changed of it."""
    shape = {
        "num_sequences": 1,
        "num_kv_heads": GROUPS,
        "index_head_dim": DEPTH,
        "block_size": BLOCK,
        "topk": TOPK,
        "dtype": torch.bfloat16,
        "key_size": 2,
        "tma_ready": True,
    }
    return selection_configs.selection_config(target, **{**shape, **changes})


@pytest.mark.parametrize("case", SELECTIONS.values(), ids=SELECTIONS)
def test_selection(build, target, case):
    """Of a few queries on Hopper, what keys are scored with that `scoring_hopper` does not take."""
    seqlen_q, seqlen_k, paged, e4m3_keys, e4m3_queries = case
    scaled = e4m3_keys and not e4m3_queries
    config = selection_config(
        target,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        dtype=torch.float8_e4m3fn if e4m3_queries else torch.bfloat16,
        key_size=1 if e4m3_keys else 2,
        scales_ready=False,
    )
    constants = selection.selection_constants(config, GROUPS, DEPTH, BLOCK, TOPK, seqlen_q > 16)
    constants |= targets.storage_constants(target, paged, scaled)
    types = {"lists_ptr": "*i64"} if config.num_splits > 1 else {}
    element = "fp8e4nv" if config.fp8_product else "u8" if scaled else "fp16" if e4m3_queries else "bf16"
    if e4m3_queries:
        types["index_q_ptr"] = "*u8" if config.fp8_product else "*fp16"
    types["index_k"] = f"tensordesc<{element}[1,{BLOCK},{DEPTH}]>" if config.use_tma else f"*{element}"
    compiled = build(selection.selection_kernel, target, constants, config.num_warps, config.num_stages, **types)
    if config.halves:
        # A product that still runs at the end of a step is one that ptxas may not follow, and then waits for all.
        products, ends = lone_products(compiled.asm["cubin"])
        assert 0 < ends < products
    if target.arch == 90:
        product = "wgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3" if scaled else "mma.sync"
        wide = "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3" if e4m3_queries else "wgmma.mma_async"
        assert config.use_tma and (product if seqlen_q == 1 else wide) in compiled.asm["ptx"]
    assert (config.num_splits > 1) == (seqlen_q <= 16)


@pytest.mark.parametrize("seqlen_q", [1, 131072])
def test_selection_of_float32(build, target, seqlen_q):
    """Its products are not the tensor cores': a whole block of keys would spill kilobytes."""
    config = selection_config(target, seqlen_q=seqlen_q, seqlen_k=131072, dtype=torch.float32, key_size=4)
    constants = selection.selection_constants(config, GROUPS, DEPTH, BLOCK, TOPK, seqlen_q > 16)
    constants |= targets.storage_constants(target, False, False)
    types = {"index_q_ptr": "*fp32", "index_k": "*fp32"}
    if config.num_splits > 1:
        types["lists_ptr"] = "*i64"
    build(selection.selection_kernel, target, constants, config.num_warps, config.num_stages, spills=32, **types)


@pytest.mark.parametrize(("head_dim", "dtype"), [(256, "fp32"), (512, "bf16")])
def test_attend_to_wide_vectors(build, target, head_dim, dtype):
    size = 4 if dtype == "fp32" else 2
    config = serving_config.attend_config(
        target, num_rows=GROUPS, head_dim=head_dim, block_size=BLOCK, topk=TOPK, element_size=size
    )
    constants = attend_constants(config, GROUPS, GROUP_SIZE, head_dim, BLOCK, TOPK, False)
    constants |= targets.storage_constants(target, False, False)
    types = {"out_ptr": "*fp32", **dict.fromkeys(["q_ptr", "k_ptr", "v_ptr"], f"*{dtype}")}
    build(attend_kernel, target, constants, config.num_warps, config.num_stages, **types)


@pytest.mark.parametrize(
    "shape",
    [
        *((1, 1, 128, 128), (1, 16, 128, 128), (1000, 1, 128, 128)),
        *((1, 1, 64, 64), (1, 16, 64, 64), (1, 1, 128, 64), (1, 4, 64, 128)),
    ],
)
@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "pages, e4m3"])
def test_selection_hopper(build, shape, scaled):
    target = TARGETS["sm_90"]
    batch, seqlen_q, depth, block = shape
    config = selection_config(
        target,
        num_sequences=batch,
        seqlen_q=seqlen_q,
        seqlen_k=1 << 20,
        index_head_dim=depth,
        block_size=block,
        key_size=1 if scaled else 2,
    )
    assert config.hopper and (config.num_splits > 1) == (batch == 1)
    types = box_types(scoring_hopper.scorer_boxes(depth, block), torch.float8_e4m3fn if scaled else torch.bfloat16)
    if batch == 1:
        types["lists_ptr"] = "*i64"
    if not scaled:
        types["scale_tiles"] = "i32"
    constants = scoring_hopper.scorer_constants(config, GROUPS, depth, block, TOPK, False)
    constants |= targets.storage_constants(target, scaled, scaled)
    compiled = build(scoring_hopper.selection_hopper_kernel, target, constants, config.num_warps, **types)
    assert "wgmma.mma_async" in compiled.asm["ptx"]
    # Programs that do not share a sequence's blocks take no tickets, as none of them sets the counter back.
    assert ("atom." in compiled.asm["ptx"]) == (batch == 1)


@pytest.mark.parametrize(("kept", "splits"), [(TOPK, 512), (TOPK, 6), (64, 128), (128, 64)])
def test_merge(build, target, kept, splits):
    constants = merge.merge_constants(kept, splits) | {"TOPK": kept, "GROUPS": GROUPS, "TABLE": False}
    build(merge.merge_kernel, target, constants, 4, lists_ptr="*i64")


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "pages, e4m3"])
@pytest.mark.parametrize("batch", [1, 128])
@pytest.mark.parametrize("lists", [None, (128, 16)], ids=["chosen", "merged"])
def test_attend(build, target, lists, batch, scaled):
    config = serving_config.attend_config(
        target, num_rows=batch * GROUPS, head_dim=DEPTH, block_size=BLOCK, topk=TOPK, element_size=2
    )
    constants = attend_constants(config, GROUPS, GROUP_SIZE, DEPTH, BLOCK, TOPK, False, lists)
    constants |= targets.storage_constants(target, scaled, scaled)
    types = {"out_ptr": "*fp32"} if config.num_splits > 1 else {}
    if lists is not None:
        types |= {"lists_ptr": "*i64"}
    if scaled:
        types |= {"k_ptr": "*u8", "v_ptr": "*u8"}
    build(attend_kernel, target, constants, config.num_warps, config.num_stages, **types)


@pytest.mark.parametrize("splits", [2, 32])
def test_combine(build, target, splits):
    constants = {"HEAD_DIM": DEPTH, "SPLITS": splits, "DEPTH": DEPTH}
    build(combine_kernel, target, constants, combine_warps(splits, DEPTH))


def test_tile_ends(build, target):
    build(primitives.tile_ends_kernel, target, {"TOKENS": 64, "CHUNK": 1024}, 4)


@pytest.mark.parametrize("numbers", ["i16", "i32"])
def test_reverse_index(build, target, numbers):
    build(reverse_index.block_table_kernel, target, {"BLOCK": BLOCK, "ROWS": 64, "SEQUENCES": 64}, 4)
    constants = {"BLOCK": BLOCK, "DENSE": False, "SKIP": True, "ROWS": 128, "SLOTS": 16}
    types = {"skip_ptr": "*i8", "numbers_ptr": f"*{numbers}"}
    build(reverse_index.list_numbers_kernel, target, constants, 4, **types)
    build(pieces.plan_kernel, target, {"LENGTH": 128, "BLOCKS": 1024}, 4, offsets_ptr="*i64")
