"""A Launch compiles for dtypes, alignment and constants alone, and is the one description of its kernel's arguments."""

import os
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from flexmsa.kernels import triton as kernels  # noqa: E402
from flexmsa.kernels.rules import SelectionRule  # noqa: E402
from flexmsa.kernels.triton.common.launch import Launch, Options, View, compile_key, record, signature_of, view  # noqa: E402
from flexmsa.kernels.triton.common.passes import of_passes, run_pass  # noqa: E402
from flexmsa.kernels.triton.common.tiles import tma_ready  # noqa: E402
from flexmsa.kernels.triton.forward.query_major import boxes_of  # noqa: E402
from flexmsa.kernels.triton.selection.kernel import key_arguments  # noqa: E402
from flexmsa.kernels.triton.selection.launch import choose_config  # noqa: E402
from flexmsa.testing.launches import (  # noqa: E402
    TARGETS,
    Layer,
    decode_launches,
    forward_launches,
    joint_backward_launches,
    meta,
    selection_launches,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")


class Scaled(NamedTuple):
    x: Any
    scale: Any


@triton.jit
def add_kernel(out, scaled, count, factor, size: tl.constexpr):
    place = tl.program_id(0) * size + tl.arange(0, size)
    x = tl.load(scaled.x.ptr + place * scaled.x.stride_d, mask=place < count)
    if scaled.scale is not None:
        x *= tl.load(scaled.scale)
    tl.store(out + place, x * factor, mask=place < count)


def launch(x, scale=None, count=100, size=64, out=None):
    out = meta(4096, dtype=torch.float32) if out is None else out
    arguments = {"out": out, "scaled": Scaled(view(x), scale), "count": count, "factor": 0.5}
    return Launch(add_kernel, (triton.cdiv(count, size), 1, 1), arguments, {"size": size}, Options(4))


def vectors(*shape, dtype=torch.float32):
    return meta(*shape, dtype=dtype)


def test_lengths_are_not_part_of_the_key():
    keys = {compile_key(launch(vectors(1, 2, length, 64), count=length)) for length in (1, 7, 16, 1000, 1 << 20)}
    assert len(keys) == 1


@pytest.mark.parametrize(
    "other",
    [
        launch(vectors(1, 2, 8, 64, dtype=torch.bfloat16)),
        launch(vectors(1, 2, 8, 40)),
        launch(vectors(1, 2, 8, 128)[..., ::2]),
        launch(vectors(1, 2, 8, 64), scale=vectors(1)),
        launch(vectors(1, 2, 8, 64), size=128),
        launch(vectors(1, 2, 8, 64), out=vectors(4096, dtype=torch.bfloat16)),
    ],
    ids=["dtype", "strides", "not dense", "a scale", "a constant", "dtype of a pointer"],
)
def test_what_the_key_tells_apart(other):
    assert compile_key(other) != compile_key(launch(vectors(1, 2, 8, 64)))


def test_an_address_that_is_not_aligned_has_a_key_of_its_own():
    x = torch.zeros(1, 1, 9, 16)
    shifted = x.flatten()[1:129].view(1, 1, 8, 16)
    out = torch.zeros(128)
    assert compile_key(launch(x, out=out)) != compile_key(launch(shifted, out=out))


def test_the_signature():
    constants, attributes = {}, {}
    x = vectors(2, 3, 40, 64, dtype=torch.float8_e4m3fn)
    found = signature_of(Scaled(view(x), None), (1,), constants, attributes)
    assert found == Scaled(View("*u8", "i64", "i64", "i32", "constexpr"), "constexpr")
    assert constants == {(1, 0, 4): 1, (1, 1): None}
    assert set(attributes) == {(1, 0, field) for field in range(4)}


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_it_compiles_for_a_gpu_that_is_not_there(target):
    compiled = launch(vectors(1, 2, 8, 64), scale=vectors(1)).compile(target)
    assert compiled.metadata.num_warps == 4


def test_arguments_in_another_order_are_refused():
    right = launch(vectors(1, 2, 8, 64))
    wrong = right._replace(arguments=dict(reversed(right.arguments.items())))
    with pytest.raises(AssertionError, match="add_kernel"):
        wrong.compile(TARGETS["sm_90"])


def test_launches_are_recorded_for_the_target_that_is_named():
    for target in TARGETS.values():
        with record(target) as launches:
            launch(vectors(1, 2, 8, 64)).run()
        assert len(launches) == 1


def test_recording_ends_with_an_error():
    with pytest.raises(ZeroDivisionError), record(TARGETS["sm_90"]) as launches:
        _ = 1 / 0
    with record(TARGETS["sm_80"]) as others:
        launch(vectors(1, 2, 8, 64)).run()
    assert (len(launches), len(others)) == (0, 1)


class Work(NamedTuple):
    x: Any
    first_range: Any


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("inside", [False, True])
def test_later_passes_launch_what_a_launch_of_their_own_would(monkeypatch, axis, inside):
    launched = []

    class Kernel:
        def launch(self, grid, values, constants):
            launched.append((grid, list(values), list(constants)))

    def run(self):
        values = self.key_and_values()[1]
        Kernel().launch(self.grid, values, self.constants.values())
        return Kernel(), values

    def with_first_range(number):
        out, work = meta(8), Work(view(vectors(1, 2, 8, 64)), number)
        return {"out": out} | ({"work": work} if inside else {"x": work.x, "first_range": number}) | {"scale": 0.5}

    monkeypatch.setattr(Launch, "run", run)
    alone = Launch(add_kernel, (5, 6, 7), with_first_range(0), {"size": 64})
    passes = of_passes([alone], axis)
    for first, count in ((0, 3), (3, 3), (6, 1)):
        run_pass(passes, first, count)
        grid = (5, count, 1) if axis == 1 else (5, 6, count)
        expected = alone._replace(grid=grid, arguments=with_first_range(first))
        assert launched.pop() == (grid, expected.key_and_values()[1], [64])


LARGE = {
    "many keys": Layer(tokens=1 << 20, num_heads=64, num_kv_heads=16),
    "many ids": Layer(tokens=1 << 20, num_heads=64, num_kv_heads=64, topk=32),
}


@pytest.mark.parametrize("layer", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("of", [selection_launches, forward_launches, joint_backward_launches])
def test_numbers_and_grids_of_large_problems_fit(layer, of):
    """Ints have 32 bits, and a grid's second and third dimension 16: no launch says so by itself."""
    check_fit(of(layer, TARGETS["sm_90"]))


def test_a_prompt_of_a_million_tokens_fits():
    check_fit(decode_launches(Layer(tokens=1 << 20, num_heads=64, num_kv_heads=8), TARGETS["sm_90"], tokens=1 << 20))


def test_many_short_rows_fit():
    q, k = meta(8192, 16, 128, 64, dtype=torch.bfloat16), meta(8192, 8, 128, 64, dtype=torch.bfloat16)
    lse, ids = meta(8192, 16, 128, dtype=torch.float32), meta(8192, 8, 128, 2)
    with record(TARGETS["sm_90"]) as launches:
        kernels.block_sparse_attention_backward(q, None, q, k, k, q, lse, ids, meta(8192, 5), 64, 0.1)
    check_fit(launches)


def check_fit(launches):
    assert launches
    for each in launches:
        compile_key(each)
        assert each.grid[0] < 1 << 31 and max(each.grid[1:]) < 1 << 16, (each.kernel.__name__, each.grid)


def test_a_number_of_more_than_32_bits_raises():
    with pytest.raises(AssertionError, match="expected 32 bits, got 2147483648"):
        compile_key(launch(vectors(1, 2, 8, 64), count=1 << 31))


def test_the_bulk_copy_engine_takes_strides_that_nothing_steps_over():
    """A row that was sliced from a batch keeps the batch's stride, which need not be a multiple of 16 bytes."""
    x = torch.empty_strided((1, 1, 256, 128), (33, 33, 128, 1), dtype=torch.bfloat16, device="meta")
    with record(TARGETS["sm_90"]):
        config = choose_config(x, x, meta(1, 5), SelectionRule(128, 2))
    assert tma_ready(x) and config.use_tma
    for descriptor in (boxes_of(x, 64), key_arguments(x, None, config, 128, 1)["index_k"]):
        assert all(stride % 8 == 0 for stride in descriptor.strides[:-1])
