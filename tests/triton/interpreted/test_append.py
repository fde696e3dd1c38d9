"""Appending to a cache against a loop over rows and tokens, bit for bit."""

import pytest
import torch
import triton
import triton.language as tl
from helpers import least_scale

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.triton.common.fp8 import decode_e4m3, encode_e4m3, quantize

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
BATCH, HEADS, HEAD_DIM, INDEX_DIM, PAGE, PAGES = 3, 3, 16, 24, 8, 6


def make_cache(paged, scaled, dtype=torch.float32):
    """The arguments of `append` from cache_k to status; pages are handed out in a shuffled order."""
    rows, keys = (BATCH * PAGES + 2, PAGE) if paged else (BATCH, PAGE * PAGES)
    shapes = [(rows, HEADS, keys, HEAD_DIM), (rows, HEADS, keys, HEAD_DIM), (rows, 1, keys, INDEX_DIM)]
    caches = [torch.zeros(shape).to(E4M3 if scaled else dtype) for shape in shapes]
    scales = [torch.zeros(shape[:3], dtype=torch.uint8) if scaled else None for shape in shapes]
    table = torch.randperm(BATCH * PAGES + 2)[: BATCH * PAGES].view(BATCH, PAGES).int() if paged else None
    kv_lens = torch.tensor([0, 7, 19], dtype=torch.int32)
    kv_starts = torch.zeros_like(kv_lens) if paged else torch.tensor([0, 3, 5], dtype=torch.int32)
    sequences = torch.full((2 * BATCH, 5), -7, dtype=torch.int32)
    return [*caches, *scales, table, kv_starts, kv_lens, sequences, torch.zeros(2, dtype=torch.int32)]


def append_loop(new, lens, cache):
    """What `append` is to do, one token after the other."""
    *caches, table, kv_starts, kv_lens, sequences, status = cache
    tokens = new[0].shape[2]
    counts = [tokens] * BATCH if lens is None else lens.clamp(0, tokens).tolist()
    rows = []
    for b, count in enumerate(counts):
        filled = int(kv_lens[b])
        places = [divmod(filled + i, PAGE) for i in range(count)]
        fits = filled + count <= PAGE * PAGES
        if table is not None and fits:
            fits = all(0 <= table[b, block] < caches[0].shape[0] for block, _ in places)
        status[1] += not fits
        count = count if fits else 0
        for i, (block, key) in enumerate(places[:count]):
            row, key = (b, filled + i) if table is None else (int(table[b, block]), key)
            for x, stored, scale in zip(new, caches[:3], caches[3:6], strict=True):
                vectors = x[b, :, i].float()
                if scale is not None:
                    factor = least_scale(vectors)
                    scale[row, :, key] = factor.to(E8M0).view(torch.uint8)
                    vectors = vectors / factor[:, None]
                stored[row, :, key] = vectors.to(stored.dtype)
        kv_lens[b] = filled + count
        start, end = int(kv_starts[b]), int(kv_lens[b])
        if lens is not None:
            rows += [[b, 0, count, start, end], [b, count, tokens, 0, 0]]
        else:
            rows += [[b, 0, tokens, start, end] if fits else [b, 0, tokens, 0, 0]]
    sequences[: len(rows)] = torch.tensor(rows, dtype=torch.int32)


def copies(cache):
    return [None if x is None else x.clone() for x in cache]


def same(x, y):
    return (x is None and y is None) or torch.equal(x.view(torch.uint8), y.view(torch.uint8))


def check(cache, lens, *new):
    """Append and compare with the loop; returns the cache."""
    expected = copies(cache)
    append_loop(new, lens, expected)
    kernels.append(*new, lens, *cache)
    names = ["k", "v", "index_k", "k_scale", "v_scale", "index_k_scale", *("page_table", "kv_starts", "kv_lens")]
    for name, x, y in zip([*names, "sequences", "status"], cache, expected, strict=True):
        assert same(x, y), name
    return cache


def tokens(count):
    """New vectors, their strides in no order."""
    shapes = [(HEADS, HEAD_DIM), (HEADS, HEAD_DIM), (1, INDEX_DIM)]
    return [torch.randn(count, depth, BATCH, heads).permute(2, 3, 0, 1) for heads, depth in shapes]


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "e4m3"])
def test_like_the_loop(paged, scaled):
    cache = make_cache(paged, scaled)
    for count in (1, 4, 20, 0):
        cache = check(cache, None, *tokens(count))
    cache = check(cache, torch.tensor([3, -1, 9], dtype=torch.int32), *tokens(4))
    cache = check(cache, torch.tensor([0, 0, 0], dtype=torch.int32), *tokens(1))


def test_other_types():
    """fp16 vectors into an e4m3 cache, fp32 vectors into an fp16 one."""
    check(make_cache(True, True), None, *(x.half() for x in tokens(5)))
    check(make_cache(False, False, torch.float16), None, *tokens(5))


@pytest.mark.parametrize("ragged", [False, True], ids=["plain", "ragged"])
def test_rows_that_do_not_fit(ragged):
    """Row 2 is refused as too long; a row that needs a page it has not got, likewise; other rows are served."""
    for paged in (False, True):
        cache = make_cache(paged, False)
        lens = torch.tensor([PAGE * PAGES, 5, 30], dtype=torch.int32) if ragged else None
        cache = check(cache, lens, *tokens(30))
        assert cache[-1].tolist() == [0, 1]
    cache = make_cache(True, False)
    for entry, page in enumerate((-1, BATCH * PAGES + 2)):
        cache[6][entry, 3] = page
    lens = torch.tensor([25, 17, 3], dtype=torch.int32) if ragged else None
    cache = check(cache, lens, *tokens(25))
    assert cache[-1].tolist() == [0, 1 if ragged else 2]


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
