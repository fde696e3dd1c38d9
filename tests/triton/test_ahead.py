"""What `python -m flexmsa check` compiles ahead for a shape is all that its cases launch."""

import os
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice

import pytest
import torch
from hypothesis import given, settings

pytest.importorskip("triton")

from benchmarks import gpu_sanitize
from flexmsa import paged
from flexmsa.kernels import triton as kernels
from flexmsa.kernels.layout import lay_out
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common import target
from flexmsa.kernels.triton.common.launch import compile_key, record
from flexmsa.testing import Case, PagedStep, Schedule, fuzz, strategies
from flexmsa.testing.ahead import Ahead, launches_of
from flexmsa.testing.check import kernels_for_many_queries
from flexmsa.testing.launches import TARGETS, CacheFormat, Layer, decode_launches, meta
from flexmsa.testing.paged_steps import StepRun
from flexmsa.testing.schedules import dtype_of

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")
SM_90 = TARGETS["sm_90"]
SIZES = {"num_kv_heads": 2, "dtype": "bfloat16"}
SHAPES = {
    "Gluon": Case(group_size=16, head_dim=128, index_head_dim=128, block_size=128, topk=16, **SIZES),
    "strided": Case(group_size=3, head_dim=80, index_head_dim=32, block_size=64, topk=4, strided=True, **SIZES),
    "shifted": Case(group_size=8, head_dim=64, index_head_dim=64, block_size=128, topk=2, offset=1, **SIZES),
    "warm-up": Case(group_size=2, head_dim=64, index_head_dim=24, block_size=32, topk=None, scale=-0.1, **SIZES),
}
CACHES = {
    "contiguous": Schedule(
        (), group_size=4, head_dim=64, index_head_dim=64, block_size=64, topk=4, capacity=384, **SIZES
    ),
    "pages, e4m3": Schedule(
        (), block_size=16, paged=True, fp8_keys=True, index_dtype="float8_e4m3fn", capacity=384, **SIZES
    ),
    "int8": Schedule((), block_size=16, index_dtype="int8", capacity=384, **SIZES),
    "dense": Schedule((), block_size=16, topk=None, paged=True, capacity=384, **SIZES),
}


STEPS = {
    "16 bits": PagedStep(head_dim=64, index_head_dim=64, block_size=64, topk=2, **SIZES),
    "e4m3": PagedStep(
        group_size=16,
        head_dim=128,
        index_head_dim=128,
        block_size=128,
        topk=16,
        fp8_keys=True,
        index_dtype="float8_e4m3fn",
        **SIZES,
    ),
    "one scale": PagedStep(
        group_size=1,
        block_size=8,
        topk=1,
        scales="tensor",
        num_kv_heads=1,
        index_dtype="float8_e4m3fn",
        dtype="float16",
    ),
    "int8": PagedStep(head_dim=64, index_head_dim=64, block_size=64, topk=2, index_dtype="int8", **SIZES),
    "dense": PagedStep(topk=None, fp8_keys=True, scales="none", **SIZES),
}


def launched(case):
    """The launches of a case's training step, on meta tensors of its own sizes and strides."""
    dtype, heads = getattr(torch, case.dtype), case.num_kv_heads * case.group_size

    def vectors(heads, seqlen, size):
        layout = {"strided": case.strided, "offset": case.offset}
        return lay_out((case.batch, heads, seqlen, size), dtype=dtype, device="meta", **layout)

    q = vectors(heads, case.seqlen_q, case.head_dim)
    k, v = (vectors(case.num_kv_heads, case.seqlen_k, case.head_dim) for _ in range(2))
    index_q = vectors(case.num_kv_heads, case.seqlen_q, case.index_head_dim)
    index_k = vectors(1, case.seqlen_k, case.index_head_dim)
    offsets = case.cu_seqlens or case.cu_seqlens_q
    table = meta(len(offsets) - 1 if offsets else case.batch, 5)
    out, lse = meta(*q.shape, dtype=dtype), meta(*q.shape[:3], dtype=torch.float32)
    scale = case.scale or 0.1
    with record(SM_90) as launches:
        ids = None
        if case.topk is not None:
            rule = SelectionRule(case.block_size, case.topk, case.num_local_blocks, case.num_init_blocks)
            ids = kernels.select_blocks(index_q, index_k, table, rule)
        with kernels_for_many_queries(q, "triton") if case.seed % 2 == 1 else nullcontext():
            kernels.attend_blocks(q, k, v, ids, table, case.block_size, scale)
        grad_lse = lse if case.lse_gradient else None
        branches = out, grad_lse, q, k, v, out, lse, ids, table
        kernels.block_sparse_attention_backward(*branches, case.block_size, scale)
        kernels.index_loss(q, k, index_q, index_k, ids, lse, table, case.block_size, scale, 0.1, True)
        if case.topk is not None:
            loss_grad = meta(dtype=torch.float32), None
            branches = out, grad_lse, loss_grad, q, k, v, index_q, index_k, out, lse, ids, table
            kernels.attention_and_index_loss_backward(*branches, case.block_size, scale, 0.1)
    return launches


def missing(launches, shape):
    ahead = {compile_key(launch) for launch in launches_of(shape, SM_90)}
    return {launch.kernel.__name__ for launch in launches if compile_key(launch) not in ahead}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_cases_of_a_shape_compile_nothing(shape):
    @settings(max_examples=60)
    @given(strategies.variations(shape, **fuzz.GPU_LENGTHS))
    def check(case):
        assert case.shape == shape.shape
        assert missing(launched(case), shape) == set()

    check()


@pytest.mark.parametrize("shape", CACHES.values(), ids=CACHES)
def test_the_schedules_of_a_shape_compile_nothing(shape):
    cache = CacheFormat(shape.paged, shape.fp8_keys, dtype_of(shape.index_dtype))
    heads = shape.num_kv_heads * shape.group_size, shape.num_kv_heads
    sizes = {"head_dim": shape.head_dim, "index_head_dim": shape.index_head_dim, "block_size": shape.block_size}
    layer = Layer(shape.capacity, *heads, topk=shape.topk or 1, dtype=getattr(torch, shape.dtype), **sizes)

    @settings(max_examples=40)
    @given(strategies.schedule_variations(shape))
    def check(schedule):
        assert schedule.shape == shape.shape
        for name, *arguments in schedule.steps:
            if name == "append":
                tokens, ragged = max(1, *arguments[0]), len(set(arguments[0])) > 1
                found = decode_launches(layer, SM_90, cache, tokens, schedule.batch, ragged, shape.topk is None)
                assert missing(found, shape) == set(), tokens

    check()


@pytest.mark.parametrize("shape", STEPS.values(), ids=STEPS)
def test_the_steps_of_a_shape_compile_nothing(shape, monkeypatch):
    """Recorded from tensors on the CPU, whose strides and alignments are those of a GPU's."""
    monkeypatch.setattr(paged, "choose_backend", lambda *arguments: "triton")
    monkeypatch.setattr(target, "_device_target", lambda device: SM_90)
    if target.GLUON:
        from flexmsa.kernels.triton.selection import kernel_sm90

        monkeypatch.setattr(kernel_sm90, "work_counters", lambda number, device: meta(number))

    @settings(max_examples=60)
    @given(strategies.paged_variations(shape, **fuzz.GPU_STEPS))
    def check(step):
        assert step.shape == shape.shape
        with record(SM_90) as launches, kernels_for_many_queries(None, "triton") if step.seed % 2 else nullcontext():
            run = StepRun(step, "cpu", "triton")
            run.attend()
            if step.topk is not None:
                run.attend_in_parts()
        assert missing(launches, shape) == set()

    check()


def test_shapes_are_distinct_and_reach_the_kernels_of_hopper():
    shapes = list(islice(fuzz.draw_shapes(("bfloat16", "float16"), 0), 60))
    assert len({shape.shape for shape in shapes}) == 60
    assert all(sum(isinstance(shape, kind) for shape in shapes) > 9 for kind in (Schedule, PagedStep))
    names = {launch.kernel.__name__ for shape in shapes for launch in launches_of(shape, SM_90)}
    assert {name for name in names if "sm90" in name} == {
        "selection_sm90_kernel",
        "query_major_sm90_kernel",
        "key_major_sm90_kernel",
        "gradient_sm90_kernel",
        "given_teacher_sm90_kernel",
    }


def test_the_small_cases_under_sanitizers_reach_every_kernel_of_a_layer():
    shapes = islice(fuzz.draw_shapes(("bfloat16", "float16"), 0), 40)
    small = [*gpu_sanitize.LAYERS.values(), gpu_sanitize.WARM_UP]
    names = [
        {launch.kernel.__name__ for shape in some for launch in launches_of(shape, SM_90)}
        for some in ((shape for shape in shapes if isinstance(shape, Case)), small)
    ]
    assert names[0] <= names[1]


def test_other_processes_compile_into_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shape = replace(CACHES["dense"], head_dim=16)
    ahead = Ahead(iter([shape]), TARGETS["sm_80"], processes=1)
    try:
        while not ahead.ready:
            ahead.wait(600)
    finally:
        ahead.stop()
    assert ahead.ready == [shape]
    kernels = {path.name.removesuffix(".cubin") for path in tmp_path.rglob("*.cubin")}
    assert kernels == {launch.kernel.__name__ for launch in launches_of(shape, TARGETS["sm_80"])}
    assert ahead.keys == {compile_key(launch) for launch in launches_of(shape, TARGETS["sm_80"])}
