"""Nothing compiles for a length: after the first use of a problem, its launches have the keys that they had."""

import os
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from flexmsa.kernels.problem import Problem
from flexmsa.kernels.triton.common.launch import choose, compile_key
from flexmsa.kernels.triton.forward import launch as forward
from flexmsa.kernels.triton.forward.config import default_config
from flexmsa.testing.launches import (
    TARGETS,
    TRAINING,
    CacheFormat,
    Layer,
    decode_launches,
    scored_launches,
    selection_launches,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

LAYERS = {
    "M3": {},
    "packed": {"packed": True},
    "fragments": {"packed": True, "fragments": 2},
    "head dim 80": {"num_heads": 16, "head_dim": 80, "index_head_dim": 80},
    "wide, fp32": {"num_heads": 8, "head_dim": 256, "index_head_dim": 256, "dtype": torch.float32},
}
FORMATS = {
    "bf16": CacheFormat(),
    "pages": CacheFormat(paged=True),
    "pages, e4m3": CacheFormat(True, True, torch.float8_e4m3fn),
    "pages, int8": CacheFormat(True, index_dtype=torch.int8),
}
# Powers of two, the first few numbers of blocks, and numbers between.
CAPACITIES = [*(128 << step for step in range(14)), *range(128, 128 * 40, 128), *(3 << step for step in range(13, 21))]


def keys_by_kernel(launches):
    """{kernel: what its launches are compiled for}."""
    keys = defaultdict(set)
    for launch in launches:
        keys[launch.kernel.__name__].add(compile_key(launch))
    return keys


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("task", TRAINING)
@pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)
def test_training(sizes, task, name):
    """The selection has a variant without splits, and one with them, whose lists a kernel merges token by token."""
    lengths = (4096, 32768, 131072, 40000)
    keys = [keys_by_kernel(TRAINING[task](Layer(tokens, **sizes), TARGETS[name])) for tokens in lengths]
    if task == "selection":
        variants = {kernel: set().union(*(found[kernel] for found in keys)) for kernel in set().union(*keys)}
        limits = dict.fromkeys(("selection_kernel", "selection_sm90_kernel", "tile_ends_kernel", "marked_kernel"), 2)
        assert {kernel: len(found) for kernel, found in variants.items() if len(found) > limits.get(kernel, 1)} == {}
    else:
        # The index of many blocks is sorted by torch; whatever the length, both ways are compiled at first use.
        for found in keys:
            missing = set(keys[0]) - set(found)
            assert missing in (set(), {"count_entries_kernel", "offsets_kernel", "place_entries_kernel"})
            assert found == {kernel: keys[0][kernel] for kernel in keys[0] if kernel not in missing}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cache", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_a_cache_that_grows(batch, cache, name):
    """Decoding compiles the selection with and without splits, and the attention for each kind of list."""
    steps = (decode_launches(Layer(tokens=tokens), TARGETS[name], cache, batch=batch) for tokens in CAPACITIES)
    keys = keys_by_kernel(launch for step in steps for launch in step)
    limits = {"append_kernel": 1, "combine_kernel": 1, "attend_kernel": 3, "merge_kernel": 1}
    assert {kernel: len(found) for kernel, found in keys.items() if len(found) > limits.get(kernel, 2)} == {}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cache", FORMATS.values(), ids=FORMATS)
def test_scored_blocks_of_a_cache_that_grows(cache, name):
    """Lists are merged in any case, few or many of them."""
    steps = (scored_launches(Layer(tokens=tokens), TARGETS[name], cache) for tokens in CAPACITIES)
    keys = keys_by_kernel(launch for step in steps for launch in step)
    assert set(keys) <= {"selection_kernel", "selection_sm90_kernel", "merge_kernel"}
    assert {kernel: len(found) for kernel, found in keys.items() if len(found) > 2} == {}


@pytest.mark.parametrize("name", TARGETS)
def test_numbers_of_queries(name):
    """Row tiles have few sizes, each with and without splits."""
    lengths = [*range(1, 80), 100, 1000, 131072]
    keys = keys_by_kernel(x for tokens in lengths for x in selection_launches(Layer(tokens), TARGETS[name]))
    assert sum(len(found) for kernel, found in keys.items() if kernel.startswith("selection")) <= 8


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_step_is_four_launches(tokens, name):
    launches = decode_launches(Layer(), TARGETS[name], CacheFormat(), tokens)
    names = [launch.kernel.__name__.replace("_sm90", "") for launch in launches]
    assert names == ["append_kernel", "selection_kernel", "attend_kernel", "combine_kernel"]


M3 = Problem(num_kv_heads=4, dtype=torch.bfloat16, group_size=16, head_dim=128, topk=16)
TRITON, GLUON = ["query_major", "key_major"], ["query_major_sm90", "key_major_sm90"]


def chosen(problem, name, **changes):
    target = TARGETS[name]
    config = replace(default_config(problem, target), **changes)
    orders = forward.QUERY_MAJOR, forward.KEY_MAJOR
    return [choose(order, problem, target, config).__name__.rpartition(".")[2] for order in orders]


@pytest.mark.parametrize("name", TARGETS)
def test_hopper_runs_the_kernels_in_gluon(name):
    for paged in (False, True):
        assert chosen(replace(M3, paged=paged), name) == (GLUON if name == "sm_90" else TRITON)
    assert chosen(replace(M3, topk=None), name)[0] == "query_major"


@pytest.mark.parametrize(
    "change",
    [
        *({"head_dim": 96}, {"block_size": 32}, {"dtype": torch.float32}),
        *({"key_dtype": torch.float8_e4m3fn}, {"bulk_copies": False}, {"positive_scale": False}),
    ],
    ids=str,
)
def test_other_problems_run_the_kernels_in_triton(change):
    assert chosen(replace(M3, **change), "sm_90") == TRITON


@pytest.mark.parametrize("group_size", [1, 3, 5, 7, 10, 128])
def test_hopper_takes_groups_of_any_size(group_size):
    assert chosen(replace(M3, group_size=group_size), "sm_90") == ["query_major", "key_major_sm90"]


def test_tuning_chooses_too():
    assert chosen(M3, "sm_90", query_major_sm90=False, key_major_sm90=False) == TRITON
    assert chosen(M3, "sm_90", query_major_rows=64) == ["query_major", "key_major_sm90"]
