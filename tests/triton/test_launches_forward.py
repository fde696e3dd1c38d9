"""What the forward compiles: nothing again for another length, and implementations that suit the problem."""

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch

from flexmsa.kernels.problem import Problem
from flexmsa.kernels.triton.common.launch import describe
from flexmsa.kernels.triton.forward import launch
from flexmsa.kernels.triton.forward.config import default_config
from flexmsa.testing.launches import TARGETS, Layer, forward_launches

LENGTHS = (4096, 32768, 131072, 40000)


def compile_keys(launches):
    """What the compiled kernels depend on, without repeats, in the order of their first launches."""
    keys = []
    for one in launches:
        kinds = [one.kernel.__name__, one.options, *one.constants.values()]
        describe(one.arguments.values(), kinds, [])
        if kinds not in keys:
            keys.append(kinds)
    return keys


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("dense", [False, True], ids=["chosen", "dense"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("head_dim", [128, 80])
def test_nothing_is_compiled_for_a_length(target, dense, packed, head_dim):
    layer = Layer(packed=packed, head_dim=head_dim)
    keys = [compile_keys(forward_launches(replace(layer, tokens=tokens), target, dense)) for tokens in LENGTHS]
    assert all(found == keys[0] for found in keys[1:])
    # Each kernel is compiled once.
    names = [key[0] for key in keys[0]]
    assert sorted(names) == sorted(set(names))


def test_every_length_launches_the_same_kernels():
    names = [one.kernel.__name__ for one in forward_launches(Layer(tokens=4096), TARGETS["sm_80"])]
    assert names == [
        *("tile_union_kernel", "query_major_kernel"),
        *("block_table_kernel", "list_numbers_kernel", "work_items_kernel"),
        *("key_major_kernel", "combine_kernel") * 4,
    ]


M3 = Problem(num_kv_heads=4, dtype=torch.bfloat16, group_size=16, head_dim=128, topk=16)
# What the kernels in Gluon do not take.
OTHERS = {
    "head dim": {"head_dim": 96},
    "group size": {"group_size": 3},
    "fp32": {"dtype": torch.float32},
    "pages": {"paged": True},
    "e4m3": {"key_dtype": torch.float8_e4m3fn},
    "alignment": {"bulk_copies": False},
}


def chosen(problem, target, scale=0.1, **changes):
    config = replace(default_config(problem, target), **changes)
    modules = launch.choose_implementations(problem, target, config, scale > 0)
    return [module.__name__.rpartition(".")[2] for module in modules]


def test_hopper_runs_the_kernels_in_gluon():
    assert chosen(M3, TARGETS["sm_90"]) == ["query_major_sm90", "key_major_sm90"]
    assert chosen(replace(M3, topk=None), TARGETS["sm_90"])[0] == "query_major"


@pytest.mark.parametrize("name", sorted(set(TARGETS) - {"sm_90"}))
def test_other_gpus_run_the_kernels_in_triton(name):
    assert chosen(M3, TARGETS[name]) == ["query_major", "key_major"]


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_other_problems_run_the_kernels_in_triton(change):
    assert chosen(replace(M3, **change), TARGETS["sm_90"]) == ["query_major", "key_major"]


def test_a_scale_that_is_not_positive_and_tuning_choose_too():
    triton_only = ["query_major", "key_major"]
    assert chosen(M3, TARGETS["sm_90"], scale=-0.1) == triton_only
    assert chosen(M3, TARGETS["sm_90"], query_major_sm90=False, key_major_sm90=False) == triton_only
    # Tiles of another size than the kernel's.
    assert chosen(M3, TARGETS["sm_90"], query_major_rows=64) == ["query_major", "key_major_sm90"]
