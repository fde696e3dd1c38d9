"""The launches of the main branch's backward: what they are compiled for does not depend on lengths."""

import os

import pytest
import torch

pytest.importorskip("triton")

from flexmsa.kernels.triton.common.launch import describe
from flexmsa.testing.launches import TARGETS, Layer, backward_launches

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

LAYERS = {
    "M3": {},
    "packed": {"packed": True},
    "gqa 4, odd head dim": {"num_heads": 16, "head_dim": 80},
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
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)
def test_lengths_compile_nothing_new(sizes, dense, name):
    lengths = 4096, 32768, 131072, 40000
    keys = [compile_keys(backward_launches(Layer(tokens, **sizes), TARGETS[name], dense)) for tokens in lengths]
    assert all(other == keys[0] for other in keys)
    # Three kernels of the schedule, five of the backward, and a gradient kernel for each further part of a block.
    assert len(keys[0]) >= 8
