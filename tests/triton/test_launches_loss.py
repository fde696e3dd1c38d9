"""The launches of the index loss: what they are compiled for does not depend on lengths."""

import os

import pytest
import torch

pytest.importorskip("triton")

from flexmsa.kernels.triton.common.launch import describe
from flexmsa.testing.launches import TARGETS, Layer, loss_launches

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

LENGTHS = 32768, 131072, 40000
LAYERS = {
    "M3": {},
    "packed": {"packed": True},
    "wide": {"num_heads": 8, "head_dim": 256, "index_head_dim": 256},
    "fp32": {"num_heads": 8, "dtype": torch.float32},
}


def compile_keys(launches):
    """What each launch is compiled for: the same key, the same compiled kernel."""
    keys = set()
    for launch in launches:
        kinds = [launch.kernel.fn, launch.options, *launch.constants.values()]
        describe(launch.arguments.values(), kinds, [])
        keys.add(tuple(kinds))
    return keys


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("with_grad", [True, False], ids=["gradient", "loss only"])
def test_lengths_compile_nothing_new(name, sizes, dense, with_grad):
    found = [compile_keys(loss_launches(Layer(tokens, **sizes), TARGETS[name], with_grad, dense)) for tokens in LENGTHS]
    assert found[0] == found[1] == found[2]
    # Three kernels of the schedule, and five or three of the loss.
    assert len(found[0]) == (8 if with_grad else 6)


@pytest.mark.parametrize("name", TARGETS)
def test_wide_numbers_compile_small_kernels_only(name):
    """More than 65,534 lists have numbers of 32 bits: one more variant of each kernel that reads or writes them."""
    short, long = (compile_keys(loss_launches(Layer(tokens), TARGETS[name])) for tokens in (32768, 1 << 20))
    assert {key[0].__name__ for key in long - short} == {"list_numbers_kernel", "index_lse_kernel", "sum_slots_kernel"}
    assert len(long - short) == 3
