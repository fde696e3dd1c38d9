"""The lengths that a first call compiles for, between them, take every variant of the kernels."""

import os
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from flexmsa.kernels.triton.common import launch
from flexmsa.kernels.triton.common.launch import compile_key, record
from flexmsa.kernels.triton.selection.launch import VARIANTS, select_blocks, select_on_meta
from flexmsa.kernels.triton.serving.launch import attend_on_meta
from flexmsa.testing.launches import TARGETS, CacheFormat, Layer, decode_launches, meta

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")


def keys_of(launches):
    return {compile_key(one) for one in launches if one.kernel.__name__ != "append_kernel"}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "pages"])
def test_a_growing_cache(paged, name):
    layer = Layer()
    queries = layer.main(1)[0], layer.index(1)[0]
    k, index_k = (meta(4, heads, 128, 128, dtype=layer.dtype) for heads in (4, 1))
    stored, table = (k, k, index_k, None, None, None), meta(1, 4) if paged else None
    with record(TARGETS[name]) as launches:
        for number in VARIANTS:
            attend_on_meta(queries, stored, table, meta(1, 5), layer.rule, 0.1, number)
    ahead = keys_of(launches)
    for tokens in (128, 1024, 4096, 40000 // 128 * 128, 131072, 1 << 20):
        found = keys_of(decode_launches(Layer(tokens=tokens), TARGETS[name], CacheFormat(paged)))
        assert found <= ahead, tokens


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("scaled", [False, True], ids=["bf16", "e4m3 keys"])
def test_a_selection_of_other_lengths(scaled, name):
    """With the scales of its keys, without which e4m3 keys are another kernel's."""
    layer = Layer()

    def vectors(tokens):
        keys = meta(1, 1, tokens, 128, dtype=torch.float8_e4m3fn if scaled else layer.dtype)
        return layer.vectors(4, 128, tokens), keys, meta(1, 1, tokens, dtype=torch.uint8) if scaled else None

    with record(TARGETS[name]) as ahead:
        for number in VARIANTS:
            select_on_meta(vectors(512), meta(1, 5), layer.rule, number)
    for tokens in (8192, 131072):
        index_q, index_k, scale = vectors(tokens)
        with record(TARGETS[name]) as found:
            select_blocks(index_q, index_k, meta(1, 5), layer.rule, None, scale)
        assert keys_of(found) <= keys_of(ahead)


def test_it_compiles_what_is_missing_and_launches_nothing(monkeypatch):
    compiled = []
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "Compiled", compiled.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "target_of", lambda device: TARGETS["sm_90"])
    monkeypatch.setattr(launch.Launch, "compile", lambda self, target: self.kernel.__name__)
    layer = Layer(tokens=4096)
    queries = layer.main(1)[0], layer.index(1)[0]
    k, index_k = layer.vectors(4, 128), layer.vectors(1, 128)
    call = partial(attend_on_meta, queries, (k, k, index_k, None, None, None), None, meta(1, 5), layer.rule, 0.1)
    launch.compile_ahead([partial(call, number) for number in VARIANTS])
    assert sorted(set(compiled)) == ["attend_kernel", "combine_kernel", "selection_sm90_kernel"]
    first = len(compiled)
    launch.compile_ahead([partial(call, number) for number in VARIANTS])
    assert len(compiled) == first
