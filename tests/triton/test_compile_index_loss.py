"""The kernels of the index loss, built for GPUs that need not be present (see test_compile)."""

import os

import pytest

triton = pytest.importorskip("triton")

from flexmsa.kernels.triton.loss import config as loss_config  # noqa: E402
from flexmsa.kernels.triton.loss.gradient import index_loss_kernel, loss_constants  # noqa: E402
from flexmsa.kernels.triton.loss.reduce import sum_pieces_kernel, sum_slots_kernel  # noqa: E402
from flexmsa.kernels.triton.loss.student import block_lse_kernel, index_lse_kernel, lse_constants  # noqa: E402

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

BLOCK = 128
FP32 = ["lse", "index_lse", "unit", "loss", "partial_q", "partial_k", "partial_lse", "grad_k", "grad_q"]
UNITS = {"stride_xd": 1, "stride_yd": 1}


def types(element):
    inputs = {f"{name}_ptr": f"*{element}" for name in ("q", "k", "index_q", "index_k")}
    floats = {f"{name}_ptr": "*fp32" for name in FP32}
    return {
        "entries_ptr": "*i64",
        "offsets_ptr": "*i64",
        "numbers_ptr": "*i16",
        "index_scale": "fp32",
        **inputs,
        **floats,
    }


def chosen(target, head_dim, element_size):
    return loss_config.loss_config(
        target, head_dim=head_dim, index_head_dim=head_dim, block_size=BLOCK, element_size=element_size
    )


# The kernel is the same for any group size: 64/4/128 and 32/8/128 heads, and 16/2/64.
@pytest.mark.parametrize("head_dim", [128, 64])
@pytest.mark.parametrize("with_grad", [True, False])
def test_index_loss(build, target, head_dim, with_grad):
    config = chosen(target, head_dim, 2)
    constants = loss_constants(config, head_dim, head_dim, with_grad) | UNITS
    compiled = build(index_loss_kernel, target, constants, config.num_warps, config.num_stages, **types("bf16"))
    if target.arch == 90:
        assert "wgmma.mma_async" in compiled.asm["ptx"] and "mma.sync" not in compiled.asm["ptx"]


@pytest.mark.parametrize(("head_dim", "element"), [(256, "bf16"), (128, "fp32"), (256, "fp32")])
def test_wide_vectors(build, target, head_dim, element):
    config = chosen(target, head_dim, 4 if element == "fp32" else 2)
    constants = loss_constants(config, head_dim, head_dim, True) | UNITS
    build(index_loss_kernel, target, constants, config.num_warps, config.num_stages, **types(element))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_block_lse(build, target, head_dim):
    config = chosen(target, head_dim, 2)
    constants = lse_constants(config, head_dim) | UNITS
    compiled = build(block_lse_kernel, target, constants, 4, config.num_stages, **types("bf16"))
    if target.arch == 90:
        assert "wgmma.mma_async" in compiled.asm["ptx"]


def test_sums(build, target):
    build(index_lse_kernel, target, {"PARTS": 1, "ROWS": 64, "SHARES": 16}, 4, **types("bf16"))
    dims = {"INDEX_DIM": 128, "INDEX_DEPTH": 128, "ROWS": 16}
    build(sum_pieces_kernel, target, dims | {"SIZE": BLOCK}, 4, **types("bf16"))
    build(sum_slots_kernel, target, dims | {"PARTS": 1}, 4, **types("bf16"))
