"""The launches of a decoding step: what they are compiled for, whatever the lengths."""

from collections import defaultdict
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from flexmsa.kernels.triton.common.launch import compile_key
from flexmsa.testing.launches import TARGETS, CacheFormat, Layer, decode_launches

CAPACITIES = [128 << step for step in range(14)]
BATCHES = [1, 2, 3, 4, 6, 8, 16, 32, 64, 65, 128, 256]
FORMATS = {"bf16": CacheFormat(), "pages": CacheFormat(paged=True), "pages, e4m3": CacheFormat(True, True, True)}
LAYERS = {
    "M3": Layer(),
    "small, fp32": Layer(num_heads=8, num_kv_heads=2, head_dim=64, index_head_dim=64, topk=8, dtype=torch.float32),
}


def keys_by_kernel(layer, target, cache, capacities, batches):
    """{kernel: what it is compiled for in a step, over all capacities and batch sizes}."""
    keys = defaultdict(set)
    for capacity in capacities:
        for batch in batches:
            for launch in decode_launches(replace(layer, tokens=capacity), target, cache, batch=batch):
                keys[launch.kernel.__name__].add(compile_key(launch))
    return keys


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cache", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_growing_cache_compiles_little(layer, cache, name):
    """The attention once for ids that are given, once for few lists to merge, and once for many."""
    for batch in (1, 3, 64):
        keys = keys_by_kernel(layer, TARGETS[name], cache, CAPACITIES, [batch])
        assert len(keys["append_kernel"]) == 1
        assert 1 <= len(keys["attend_kernel"]) <= 3
        assert len(keys["combine_kernel"]) <= 1


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cache", FORMATS.values(), ids=FORMATS)
def test_batches_compile_little(cache, name):
    """Three kinds of the attention: one step per program, several steps, and several without partial results.

    Each is compiled for ids that are given and for few lists to merge, the first kind also for many lists.
    """
    keys = keys_by_kernel(Layer(), TARGETS[name], cache, CAPACITIES, BATCHES)
    assert len(keys["append_kernel"]) == 1
    assert len(keys["attend_kernel"]) <= 7
    assert len(keys["combine_kernel"]) <= 2


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("cache", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("tokens", [1, 4])
def test_a_step_is_four_launches(tokens, cache, name):
    launches = decode_launches(Layer(), TARGETS[name], cache, tokens)
    assert [launch.kernel.__name__ for launch in launches][::2] == ["append_kernel", "attend_kernel"]
    assert len(launches) == 4
