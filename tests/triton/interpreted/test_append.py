"""Appending to a cache against a loop over rows and tokens, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from append_loop import BATCH, E4M3, E8M0, PAGE, PAGES, append_loop, assert_same, make_cache, new_tokens
from helpers import least_scale, lengths

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.triton.common.fp8 import decode_e4m3, encode_e4m3, quantize

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(cache, lens, *new):
    """Append and compare with the loop; returns the cache."""
    expected = cache.copy()
    append_loop(new, lens, expected)
    kernels.append(*new, lens, *cache)
    assert_same(cache, expected)
    return cache


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("dtype", [torch.float32, E4M3, torch.int8], ids=str)
def test_like_the_loop(paged, dtype):
    cache = make_cache(paged, dtype)
    for count in (1, 4, 20, 0):
        cache = check(cache, None, *new_tokens(count))
    cache = check(cache, lengths(3, -1, 9), *new_tokens(4))
    cache = check(cache, lengths(0, 0, 0), *new_tokens(1))


def test_other_types():
    """fp16 vectors into an e4m3 cache, fp32 vectors into an fp16 one."""
    check(make_cache(True, E4M3), None, *(x.half() for x in new_tokens(5)))
    check(make_cache(False, torch.float16), None, *new_tokens(5))


@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "ragged"])
def test_rows_that_do_not_fit(ragged):
    """Row 2 is refused as too long; a row that needs a page it has not got, likewise; other rows are served."""
    for paged in (False, True):
        cache = make_cache(paged)
        lens = lengths(PAGE * PAGES, 5, 30) if ragged else None
        cache = check(cache, lens, *new_tokens(30))
        assert cache.status.tolist() == [0, 1]
    cache = make_cache(True)
    for entry, page in enumerate((-1, BATCH * PAGES + 2)):
        cache.page_table[entry, 3] = page
    lens = lengths(25, 17, 3) if ragged else None
    cache = check(cache, lens, *new_tokens(25))
    assert cache.status.tolist() == [0, 1 if ragged else 2]


@triton.jit
def codec_kernel(x_ptr, codes_ptr, back_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    codes = encode_e4m3(tl.load(x_ptr + place))
    tl.store(codes_ptr + place, codes)
    tl.store(back_ptr + place, decode_e4m3(codes, tl.float32, False))


def test_codes_are_those_of_torch():
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    around = [torch.nextafter(x, torch.tensor(to)) for x in (numbers, middles) for to in (-1.0, 1e9)]
    x = torch.cat([numbers, middles, *around, torch.rand(1000) * 2**-6, torch.randn(400) * 100])
    x = torch.cat([x, -x])
    x = torch.nn.functional.pad(x[x.abs() <= 448], (0, 4096))[:4096]
    codes, back = torch.empty(4096, dtype=torch.uint8), torch.empty(4096)
    codec_kernel[(1,)](x, codes, back, SIZE=4096)
    assert torch.equal(codes, x.to(E4M3).view(torch.uint8))
    assert torch.equal(back, x.to(E4M3).float())


@triton.jit
def quantize_kernel(x_ptr, codes_ptr, scale_ptr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.arange(0, ROWS)
    place = row[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    codes, scale = quantize(tl.load(x_ptr + place))
    tl.store(codes_ptr + place, codes)
    tl.store(scale_ptr + row, scale)


def test_vectors_that_are_not_finite_say_so_in_their_scale():
    """As do those beyond 448 * 2^119."""
    x = torch.randn(16, 16)
    x[0, 3], x[1, 5], x[2, 2], x[3, 2], x[4] = torch.nan, torch.inf, -torch.inf, -torch.nan, 3e38
    x[5], x[6], x[7, 4], x[8, 9] = 0.0, 1e-45, 448 * 2.0**119, -448 * 2.0**5
    x[9, 9] = torch.nextafter(torch.tensor(448 * 2.0**5), torch.tensor(1e9))
    codes, scale = torch.empty(16, 16, dtype=torch.uint8), torch.empty(16, dtype=torch.uint8)
    quantize_kernel[(1,)](x, codes, scale, ROWS=16, DEPTH=16)
    assert (scale[:5] == 255).all()
    finite, factor = x[5:], scale[5:].view(E8M0).float()
    assert torch.equal(factor, least_scale(finite))
    assert factor[2:5].tolist() == [2.0**119, 2.0**5, 2.0**6]
    assert torch.equal(codes[5:], (finite / factor[:, None]).to(E4M3).view(torch.uint8))
