"""The main branch's forward kernels, built for GPUs that need not be present (see test_compile)."""

import os

import pytest

triton = pytest.importorskip("triton")

from flexmsa.kernels.triton.common import target as targets  # noqa: E402
from flexmsa.kernels.triton.forward import combine as combine_slots  # noqa: E402
from flexmsa.kernels.triton.forward import config as forward_config  # noqa: E402
from flexmsa.kernels.triton.forward import key_major as by_block  # noqa: E402
from flexmsa.kernels.triton.forward import key_major_sm90 as by_block_hopper  # noqa: E402
from flexmsa.kernels.triton.forward import query_major as walk  # noqa: E402
from flexmsa.kernels.triton.forward import tile_unions as union  # noqa: E402
from flexmsa.testing.compiled import TARGETS, box_types, lone_products  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

BLOCK, TOPK = 128, 16
# (query heads, KV heads, head dim), and how keys and values are kept: in pages, in e4m3.
CONTIGUOUS = (False, False)
CASES = {
    "64/4/128": ((64, 4, 128), CONTIGUOUS),
    "32/8/128": ((32, 8, 128), CONTIGUOUS),
    "16/2/64": ((16, 2, 64), CONTIGUOUS),
    "pages": ((64, 4, 128), (True, False)),
    "pages, e4m3": ((64, 4, 128), (True, True)),
}

# For kernels that do not read the keys.
SHAPES = {name: case for name, case in CASES.items() if case[1] == CONTIGUOUS}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def chosen(target, case):
    (num_heads, num_kv_heads, head_dim), (_, scaled) = case
    group_size = num_heads // num_kv_heads
    config = forward_config.forward_config(
        target,
        group_size=group_size,
        head_dim=head_dim,
        block_size=BLOCK,
        topk=TOPK,
        element_size=2,
        decoded=scaled,
    )
    return config, group_size, head_dim


def test_by_block(build, target, case):
    config, group_size, head_dim = chosen(target, case)
    paged, scaled = case[1]
    constants = by_block.partial_constants(config, group_size, head_dim, BLOCK, TOPK, 0.1)
    constants |= targets.storage_constants(target, paged, scaled)
    types = {"entries_ptr": "*i64", "offsets_ptr": "*i64", "partial_ptr": "*bf16", "partial_lse_ptr": "*fp32"}
    if scaled:
        types |= {"k_ptr": "*u8", "v_ptr": "*u8"}
    compiled = build(by_block.partial_attention_kernel, target, constants, **config.launch_options(), **types)
    if target.arch == 90:
        assert "wgmma.mma_async" in compiled.asm["ptx"]
        # A product that is still running at the end of a step is one that ptxas may not follow, and then waits for all.
        products, ends = lone_products(compiled.asm["cubin"])
        assert 0 < ends < products


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_combine_slots(build, target, case):
    _, group_size, head_dim = chosen(target, case)
    constants = combine_slots.combine_constants(group_size, head_dim, TOPK)
    types = {"partial_ptr": "*bf16", "skip_ptr": "*i8", "numbers_ptr": "*i16"}
    build(combine_slots.combine_slots_kernel, target, constants, 4, **types)


@pytest.mark.parametrize("dense", [False, True], ids=["union", "dense"])
def test_walk(build, target, case, dense):
    config, group_size, head_dim = chosen(target, case)
    paged, scaled = case[1]
    tokens = config.walk_tokens(group_size, TOPK)
    constants = walk.walk_constants(config, group_size, head_dim, BLOCK, 0.1, tokens, False, dense, config.walk_tma)
    constants |= targets.storage_constants(target, paged, scaled)
    element = "u8" if scaled else "bf16"
    tile = f"tensordesc<{element}[1,1,{constants['COLUMNS']},{head_dim}]>" if config.walk_tma else f"*{element}"
    pointers = {"k_ptr": f"*{element}", "v_ptr": f"*{element}"}
    types = {"members_ptr": "*i64", "k_tiles": tile, "v_tiles": tile, **pointers}
    # A limit of 128 registers costs other cases than M3's a few numbers, spilled once, outside the loops. Scales of a
    # byte, which no asynchronous copy takes, cost two more, in the loop, with Triton 3.7.
    limits = {CASES["64/4/128"]: 8 if dense else 0, CASES["pages"]: 32, CASES["pages, e4m3"]: 40}
    spills = 0 if config.walk_registers is None else limits.get(case, 8)
    compiled = build(walk.walk_kernel, target, constants, **config.walk_options(), spills=spills, **types)
    if target.arch == 90:
        assert "wgmma.mma_async" in compiled.asm["ptx"]


HOPPER = {"64/4/128": (16, 128, 128), "32/8/128": (4, 128, 128), "16/2/64": (8, 64, 128), "blocks of 64": (64, 64, 64)}


BY_BLOCK = {name: shape for name, shape in HOPPER.items() if shape[0] >= 8 and shape[2] == 128} | {"64": (64, 128, 128)}


@pytest.mark.parametrize("shape", BY_BLOCK.values(), ids=BY_BLOCK)
def test_by_block_hopper(build, shape):
    group_size, head_dim, block_size = shape
    target = TARGETS["sm_90"]
    config = forward_config.forward_config(
        target, group_size=group_size, head_dim=head_dim, block_size=block_size, topk=TOPK, element_size=2
    )
    assert config.hopper
    types = {"entries_ptr": "*i64", "offsets_ptr": "*i64"} | box_types(
        by_block_hopper.hopper_boxes(group_size, head_dim, block_size)
    )
    constants = by_block_hopper.hopper_constants(TOPK, group_size, head_dim, block_size)
    compiled = build(
        by_block_hopper.partial_hopper_kernel, target, constants, 4, maxnreg=by_block_hopper.REGISTERS, **types
    )
    products, ends = lone_products(compiled.asm["cubin"])
    assert ends == 2 and products == (head_dim + block_size) // 16
    # Two programs share a multiprocessor's 228 KiB, of which each takes 1 KiB for itself.
    assert 2 * (compiled.metadata.shared + 1024) <= 228 << 10


@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_union(build, target, case):
    config, group_size, _ = chosen(target, case)
    constants = union.union_constants(config, group_size, TOPK, BLOCK, False)
    warps = union.union_warps(constants)
    build(union.union_kernel, target, constants, warps, members_ptr="*i64", skip_ptr="*i8")
