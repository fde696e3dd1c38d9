"""The kernels of the main branch's backward, built for GPUs that need not be present: see test_compile.py."""

import os
import re

import pytest

triton = pytest.importorskip("triton")

from flexmsa.kernels.triton.backward import config as backward_config  # noqa: E402
from flexmsa.kernels.triton.backward import gradient as backward_gradient  # noqa: E402
from flexmsa.kernels.triton.backward import gradient_sm90 as backward_hopper  # noqa: E402
from flexmsa.kernels.triton.backward import preprocess as backward_rows  # noqa: E402
from flexmsa.kernels.triton.backward import reduce as backward_sums  # noqa: E402
from flexmsa.testing.compiled import TARGETS, box_types, lone_products  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

BLOCK = 128
SHAPES = {"M3": (16, 128), "32/8": (4, 128), "16/2": (8, 64)}
BF16 = dict.fromkeys(["grad_out_ptr", "q_ptr", "k_ptr", "v_ptr", "out_ptr", "partial_q_ptr", "grad_q_ptr"], "*bf16")
FP32 = [
    *("grad_lse_ptr", "lse_ptr", "delta_ptr", "lse2_ptr", "row_delta_ptr", "row_lse2_ptr"),
    *("partial_k_ptr", "partial_v_ptr", "grad_k_ptr", "grad_v_ptr"),
]
TYPES = {**BF16, **dict.fromkeys(FP32, "*fp32"), "entries_ptr": "*i64", "offsets_ptr": "*i64", "numbers_ptr": "*i16"}
UNITS = {"stride_gd": 1, "stride_qd": 1, "stride_kd": 1, "stride_vd": 1}


def config_of(target, group_size, head_dim, element_size=2, block_size=BLOCK):
    return backward_config.backward_config(
        target, group_size=group_size, head_dim=head_dim, block_size=block_size, element_size=element_size
    )


@pytest.mark.parametrize(("group_size", "head_dim"), SHAPES.values(), ids=SHAPES)
def test_gradients(build, target, group_size, head_dim):
    config = config_of(target, group_size, head_dim)
    constants = backward_gradient.gradient_constants(config, group_size, head_dim, BLOCK) | UNITS | {"OFFSET": 0}
    assert config.columns == BLOCK
    compiled = build(backward_gradient.gradient_kernel, target, constants, config.num_warps, config.num_stages, **TYPES)
    if target.arch == 90:
        ptx = compiled.asm["ptx"]
        # Scores and their gradient: head_dim / 16 steps, dV and dK: rows / 16, dQ: block / 16; nothing on slower units.
        steps = 2 * head_dim // 16 + 2 * config.rows // 16 + BLOCK // 16
        assert len(re.findall(r"wgmma\.mma_async", ptx)) == steps
        assert "mma.sync" not in ptx


HOPPER = {"M3": (16, 128), "8": (8, 128), "16/2": (8, 64), "64": (64, 64)}


@pytest.mark.parametrize(("group_size", "head_dim"), HOPPER.values(), ids=HOPPER)
def test_gradients_on_hopper(build, group_size, head_dim):
    target = TARGETS["sm_90"]
    config = config_of(target, group_size, head_dim)
    assert config.hopper
    constants = backward_hopper.hopper_constants(config, group_size, head_dim, BLOCK)
    types = TYPES | box_types(backward_hopper.hopper_boxes(group_size, head_dim, BLOCK))
    # Where more entries share a step, one number outlives it in memory.
    spills = 8 if (group_size, head_dim) == (8, 128) else 0
    compiled = build(backward_hopper.gradient_hopper_kernel, target, constants, 8, spills=spills, **types)
    # Five groups of products a step, in steps with and without masks: none waits for the product before it.
    products, ends = lone_products(compiled.asm["cubin"])
    assert products == 2 * (2 * head_dim + 2 * backward_hopper.ROWS.value + BLOCK) // 16 and ends == 10


HELPERS = {
    "statistics": backward_rows.statistics_kernel,
    "gather": backward_rows.gather_kernel,
    "sum_pieces": backward_sums.sum_pieces_kernel,
    "sum_slots": backward_sums.sum_slots_kernel,
}


@pytest.mark.parametrize("kernel", HELPERS)
def test_helpers(build, target, kernel):
    group_size, head_dim = SHAPES["M3"]
    heads = {"HEADS": group_size}
    constants = {
        "statistics": heads | UNITS | {"HEAD_DIM": head_dim, "ROWS": 32, "DEPTH": 128, "GRAD_LSE": True},
        "gather": heads | {"ENTRIES": 64, "LANES": 16},
        "sum_pieces": {"HEAD_DIM": head_dim, "BLOCK": BLOCK, "KEYS": 16, "DEPTH": 128},
        "sum_slots": heads | {"HEAD_DIM": head_dim, "INSIDE": True, "TILE": 16, "DEPTH": 128},
    }[kernel]
    names = set(HELPERS[kernel].arg_names)
    constants = {name: value for name, value in constants.items() if name in names}
    warps = 8 if kernel == "sum_slots" else 4
    build(HELPERS[kernel], target, constants, warps, **{name: kind for name, kind in TYPES.items() if name in names})


@pytest.mark.parametrize(
    ("head_dim", "block_size", "dtype"), [(256, 128, "bf16"), (128, 128, "fp32"), (64, 256, "fp16")]
)
def test_other_tiles(build, target, head_dim, block_size, dtype):
    """Large heads, large blocks and fp32 take smaller tiles, several launches to a block."""
    if head_dim == 256 and target.arch == 90:
        pytest.skip("spills 128 bytes")
    config = config_of(target, 3, head_dim, 4 if dtype == "fp32" else 2, block_size)
    constants = backward_gradient.gradient_constants(config, 3, head_dim, block_size)
    constants |= UNITS | {"OFFSET": config.columns}
    assert config.columns < block_size
    types = TYPES | dict.fromkeys(BF16, f"*{dtype}")
    build(backward_gradient.gradient_kernel, target, constants, config.num_warps, config.num_stages, **types)
