"""What is compiled ahead: by a first call, for its step and for other lengths, and by a warm-up."""

import contextlib
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from triton import knobs

import flexmsa
from flexmsa import compiling, ops
from flexmsa.kernels.triton.common import compiled, launch
from flexmsa.kernels.triton.common.launch import compile_key, record
from flexmsa.kernels.triton.common.target import assume_target
from flexmsa.kernels.triton.layer import decode, train
from flexmsa.kernels.triton.selection.launch import TRAINING_VARIANTS, VARIANTS, select_blocks, select_on_meta
from flexmsa.kernels.triton.selection.merge import merge_kernel
from flexmsa.kernels.triton.serving.launch import attend_blocks, attend_on_meta, select_and_attend
from flexmsa.testing import fuzz
from flexmsa.testing.launches import (
    TARGETS,
    CacheFormat,
    Layer,
    decode_launches,
    loss_launches,
    meta,
    selection_launches,
)

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
@pytest.mark.parametrize("documents", [1, 3])
def test_a_selection_of_other_lengths(documents, scaled, name):
    """With the scales of its keys, without which e4m3 keys are another kernel's."""
    layer = Layer()

    def vectors(tokens):
        keys = meta(1, 1, tokens, 128, dtype=torch.float8_e4m3fn if scaled else layer.dtype)
        return layer.vectors(4, 128, tokens), keys, meta(1, 1, tokens, dtype=torch.uint8) if scaled else None

    with record(TARGETS[name]) as ahead:
        for number in TRAINING_VARIANTS:
            select_on_meta(vectors(512), meta(documents, 5), None, layer.rule, number, number)
    for tokens in (128, 1024, 2048, 4096, 8192, 12288, 16384, 24576, 131072):
        index_q, index_k, scale = vectors(tokens)
        with record(TARGETS[name]) as found:
            select_blocks(index_q, index_k, meta(documents, 5), layer.rule, None, scale)
        assert keys_of(found) <= keys_of(ahead)


class Kernel(NamedTuple):
    """In place of Triton's: the fields that a launcher is made from."""

    src: str
    metadata: None = None


class Compiled:
    """In place of a compiled kernel: notes when it is made, and when it is launched."""

    def __init__(self, name, events):
        self.name, self.events = name, events
        events.append(("compiled", name))

    def launch(self, grid, values, constants):
        self.events.append(("launched", self.name))


@pytest.fixture
def events(monkeypatch):
    """What a GPU's process compiles and launches, in order, on meta tensors."""
    found = []
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "_begun", set())
    for module in (launch, compiled):
        monkeypatch.setattr(module, "Compiled", lambda kernel: Compiled(kernel.src, found))
    monkeypatch.setattr(compiled.Source, "compile", lambda self, target: Kernel(self.name))
    monkeypatch.setattr(launch, "target_of", lambda device: TARGETS["sm_90"])
    active = SimpleNamespace(launcher_cls=lambda source, metadata: None)
    monkeypatch.setattr(compiled, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with assume_target(TARGETS["sm_90"]):
        yield found


def names(events, kind):
    return [name for event, name in events if event == kind]


def test_it_compiles_what_is_missing_and_launches_nothing(events):
    layer = Layer(tokens=4096)
    queries = layer.main(1)[0], layer.index(1)[0]
    k, index_k = layer.vectors(4, 128), layer.vectors(1, 128)
    call = partial(attend_on_meta, queries, (k, k, index_k, None, None, None), None, meta(1, 5), layer.rule, 0.1)
    reports = []
    count = launch.compile_ahead([partial(call, number) for number in VARIANTS], lambda *x: reports.append(x))
    assert set(names(events, "compiled")) == {"attend_kernel", "combine_kernel", "selection_sm90_kernel"}
    assert names(events, "launched") == []
    assert [report[:2] for report in reports] == [(done, count) for done in range(1, count + 1)]
    assert len(events) == count and launch.compile_ahead([partial(call, number) for number in VARIANTS]) == 0


@pytest.mark.parametrize("loss_in_backward", [False, True])
@pytest.mark.parametrize(
    "sizes", [{}, {"packed": True}, {"fragments": 2}, {"num_heads": 6, "num_kv_heads": 2, "block_size": 64}], ids=str
)
def test_the_first_launch_compiles_the_whole_step(events, sizes, loss_in_backward):
    """Recorded on its first tokens, the step has the kernels of its full length."""
    layer = Layer(tokens=131072, **sizes)
    inputs = *layer.main(), *layer.index(), layer.sequences(), layer.rule, 0.1, 0.1, True, loss_in_backward
    step = partial(train, layer, loss_in_backward)
    with ops.expected_training_step(*inputs), launch.expected(partial(pytest.fail, "the outer step counts")):
        step()
    kinds = [event for event, _ in events]
    count = kinds.index("launched")
    assert count > 15 and "compiled" not in kinds[count:]
    step()
    assert kinds.count("compiled") == count


@pytest.mark.parametrize("after_selection", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize(
    "sizes", [{}, {"num_heads": 16, "num_kv_heads": 8}, {"num_heads": 6, "block_size": 48}], ids=str
)
def test_decoding_compiles_nothing_after_its_first_token(events, sizes, tokens, batch, after_selection):
    """From keys that are made anew for each token, as transformers' DynamicCache does, or that keep their room.

    after_selection: other calls have compiled the kernels of the first token.
    """
    layer = Layer(**({"num_kv_heads": 2} | sizes))

    def step(keys):
        def vectors(heads, count):
            return meta(batch, heads, count, 128, dtype=layer.dtype)

        queries = vectors(layer.num_heads, tokens), vectors(layer.num_kv_heads, tokens)
        k, index_k = vectors(layer.num_kv_heads, keys), vectors(1, keys)
        call = partial(select_and_attend, *queries, k, k, index_k, meta(batch, 5), layer.rule, 0.1)
        with launch.expected(call):
            call()

    if after_selection:
        k, index_k = (meta(batch, heads, tokens, 128, dtype=layer.dtype) for heads in (layer.num_kv_heads, 1))
        q, index_q = (
            meta(batch, heads, tokens, 128, dtype=layer.dtype) for heads in (layer.num_heads, layer.num_kv_heads)
        )
        ids = select_blocks(index_q, index_k, meta(batch, 5), layer.rule)
        attend_blocks(q, k, k, ids, meta(batch, 5), layer.block_size, 0.1)
    step(tokens)
    count = len(names(events, "compiled"))
    assert count >= 3
    for keys in (*range(tokens, 700), *range(700, 12000, 333), *(1 << n for n in range(12, 21))):
        step(keys)
        assert len(names(events, "compiled")) == count, keys


def test_without_an_expected_step_a_launch_compiles_its_own_kernel(events):
    train(Layer(tokens=4096))
    assert [event for event, _ in events[:4]] == ["compiled", "launched"] * 2


def test_the_cases_of_the_fuzzer_compile_for_no_other_length(events):
    layer = Layer(tokens=4096)
    inputs = *layer.main(), *layer.index(), layer.sequences(), layer.rule, 0.1, 0.1, True, False
    with fuzz.compiled_ahead(True), ops.expected_training_step(*inputs):
        train(layer)
    assert [event for event, _ in events[:4]] == ["compiled", "launched"] * 2


def test_a_step_that_is_captured_is_not_recorded_in_it(events, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with launch.expected(partial(pytest.fail, "recorded in a capture")):
        train(Layer(tokens=4096))
    assert names(events, "launched")


def test_a_kernel_that_does_not_compile_raises_where_it_is_launched(events, monkeypatch):
    def compile_most(self, target):
        if self.name == "index_loss_kernel":
            raise RuntimeError("ptxas")
        return Kernel(self.name)

    monkeypatch.setattr(compiled.Source, "compile", compile_most)
    step = partial(train, Layer(tokens=4096))
    with launch.expected(step), pytest.raises(RuntimeError, match="ptxas"):
        step()
    launched = names(events, "launched")
    assert "block_lse_kernel" in launched and "gradient_sm90_kernel" not in launched


class SharedModule:
    """A launcher of Triton 3.6: it is read from a module that all launchers share, some time after it was put there."""

    newest = None

    def __init__(self, source, metadata):
        SharedModule.newest = source
        time.sleep(0.001)
        self.source = SharedModule.newest


@pytest.mark.parametrize("num_threads", [1, 2])
def test_each_kernel_has_its_own_launcher(events, monkeypatch, num_threads):
    """Kernels of one step, and those that another thread compiles at the same time."""

    def load(kernel):
        return Compiled((kernel.src, SharedModule(kernel.src, None).source), events)

    for module in (launch, compiled):
        monkeypatch.setattr(module, "Compiled", load)
    monkeypatch.setattr(compiled, "max_workers", lambda: 4)
    monkeypatch.setattr(compiled.driver.active, "launcher_cls", SharedModule)
    layers = [Layer(tokens=4096), Layer(tokens=4096, block_size=64)]

    def run(layer):
        with assume_target(TARGETS["sm_90"]), launch.expected(partial(train, layer)):
            train(layer)

    with ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(run, layers))
    made = names(events, "compiled")
    assert len(made) > 30 and all(kernel == launcher for kernel, launcher in made)


def test_threads_compile_the_same_kernels(monkeypatch):
    """What a thread compiles beside others is what it compiles alone."""
    found = selection_launches(Layer(tokens=4096, num_heads=16, head_dim=64, index_head_dim=64), TARGETS["sm_90"])
    found += loss_launches(Layer(tokens=4096, num_heads=16, head_dim=64, index_head_dim=64), TARGETS["sm_90"])
    distinct = list({compile_key(one): one for one in found}.values())[:4]
    monkeypatch.setattr(knobs.compilation, "always_compile", True)

    def cubin(one):
        return one.compile(TARGETS["sm_90"]).asm["cubin"]

    with ThreadPoolExecutor(len(distinct)) as pool:
        together = list(pool.map(cubin, distinct))
    assert together == [cubin(one) for one in distinct]


def test_threads_that_parse_at_once_are_told_apart_from_errors(monkeypatch):
    tried = []

    def compile_source(source, **_):
        tried.append(source)
        if len(tried) < 3:
            try:
                raise SystemError("AST constructor recursion depth mismatch (before=213, after=155)")
            except SystemError as error:
                raise ValueError("at 3:11") from error
        raise ValueError("at 4:1")

    monkeypatch.setattr(compiled.triton, "compile", compile_source)
    with pytest.raises(ValueError, match="at 4:1"):
        compiled.Source("kernel", "source", {}).compile(TARGETS["sm_90"])
    assert tried == ["source"] * 3


@pytest.mark.parametrize("cores", [1, 4])
def test_ranks_share_the_cores(monkeypatch, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert compiled.max_workers() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(16 // cores))
    assert compiled.max_workers() == cores


def test_a_warm_up_has_what_steps_of_any_length_launch(events, monkeypatch):
    monkeypatch.setattr(compiling, "_check_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    for packed in (False, True):
        sizes = {"num_heads": 16, "num_kv_heads": 2, "head_dim": 64, "packed": packed}
        assert flexmsa.warm_up(**sizes, decoding=not packed, device="meta") > 0
        assert flexmsa.warm_up(**sizes, decoding=not packed, device="meta") == 0
        made = len(events)
        for tokens in (8192, 131072):
            layer = Layer(tokens, **sizes, index_head_dim=64)
            train(layer)
            train(layer, loss_in_backward=True)
            if not packed:
                decode(layer, CacheFormat())
        assert names(events[made:], "compiled") == []


def test_ctrl_c_starts_no_further_kernel(events, monkeypatch):
    monkeypatch.setattr(compiled, "max_workers", lambda: 1)
    monkeypatch.setattr(compiled.Source, "compile", lambda self, target: time.sleep(0.02) or self.name)

    def interrupt(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch.compile_ahead([partial(train, Layer(tokens=4096))], interrupt)
    assert len(events) < 15


def test_recording_a_step_keeps_none_of_its_memory(events):
    """At 128K tokens, the partial results of a step's parts would add up to gigabytes."""
    kept = []

    def step():
        x = torch.empty(16, 16)
        kept.append(weakref.ref(x))
        launch.Launch(merge_kernel, (1, 1, 1), dict.fromkeys(merge_kernel.arg_names[:-1], x), {"C": 0}).run()

    assert launch.compile_ahead([step]) == 1
    assert kept[0]() is None
