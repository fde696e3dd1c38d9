"""The plain PyTorch append, compared with loops over tokens and with torch's own e4m3."""

import pytest
import torch
from append_loop import E4M3, append_loop, assert_same, make_cache, new_tokens
from helpers import least_scale, lengths, randn

from flexmsa import ops
from flexmsa.kernels import torch as kernels
from flexmsa.kernels.torch import fp8

DEPTH = 16


# The kernel itself: its operator refuses the last ones on a CPU.
@pytest.mark.parametrize("lens", [None, (9, 0, 3), (-2, 50, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, E4M3, torch.int8], ids=str)
@pytest.mark.parametrize("is_paged", [False, True])
def test_append_equals_a_loop_over_tokens(is_paged, dtype, lens):
    cache, new, lens = make_cache(is_paged, dtype, (0, 15, 23)), new_tokens(9), None if lens is None else lengths(*lens)
    expected = cache.copy()
    append_loop(new, lens, expected)
    kernels.append(*new, lens, *cache)
    assert_same(cache, expected)
    assert cache.status.tolist() == [0, 0]


@pytest.mark.parametrize("is_paged", [False, True])
def test_an_append_without_room_changes_nothing(is_paged):
    cache = make_cache(is_paged, kv_lens=(3, 44, 0))
    before = cache.copy()
    message = "cache: expected at most 4 more tokens in row 1, got 5: it holds 44 of 48"
    for lens in (None, lengths(5, 5, 5), lengths(0, 5, 0)):
        with pytest.raises(ValueError, match=message):
            ops.append(*new_tokens(5), lens, *cache, "torch")
    assert_same(cache, before)
    ops.append(*new_tokens(5), lengths(5, 4, 0), *cache, "torch")
    assert cache.kv_lens.tolist() == [8, 48, 0]


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_append_without_a_page_changes_nothing(bad):
    cache = make_cache(True, kv_lens=(3, 14, 0))
    cache.page_table[1, 2] = bad
    before = cache.copy()
    with pytest.raises(ValueError, match=f"page_table: expected a page from 0 to 19 for block 2 of row 1, got {bad}"):
        ops.append(*new_tokens(5), None, *cache, "torch")
    assert_same(cache, before)
    ops.append(*new_tokens(5), lengths(5, 2, 5), *cache, "torch")
    assert cache.kv_lens.tolist() == [8, 16, 5]


def test_quantization_equals_torch():
    x = randn(3, 5, DEPTH) * torch.logspace(-30, 30, 5)[:, None]
    x[1, 2] = 0.0
    x[0, 0], x[0, 0, 3] = 0.0, 448 * 2.0**5
    x[0, 1], x[0, 1, 3] = 0.0, torch.nextafter(torch.tensor(448 * 2.0**5), torch.tensor(1e9))
    x[2, 4, 2] = 448 * 2.0**119
    stored, scale = fp8.quantize(x)
    scale = fp8.as_scales(scale)
    assert torch.equal(scale.float(), least_scale(x))
    assert scale[0, :2].float().tolist() == [2.0**5, 2.0**6]
    stored, scale = stored.float(), scale.float()
    assert torch.equal(stored, (x / scale[..., None]).to(E4M3).float())
    assert (stored.abs().amax(-1) >= 224).sum() == 14
    assert (stored[1, 2] == 0).all()
    error = (stored * scale[..., None] - x).abs()
    assert (error <= x.abs() * 2.0**-4 + scale[..., None] * 2.0**-10).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, -448.1 * 2.0**119])
def test_the_scale_of_a_vector_that_is_not_finite_is_nan(bad):
    x = randn(2, DEPTH)
    x[0, 3] = bad
    assert fp8.as_scales(fp8.quantize(x)[1]).float().isnan().tolist() == [True, False]
