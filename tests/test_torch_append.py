"""The plain PyTorch append, compared with loops over tokens and with torch's own e4m3."""

import pytest
import torch
from helpers import least_scale, lengths, ragged, randn

from flexmsa import ops
from flexmsa.kernels.torch import fp8

HEADS, DEPTH, BLOCK = 2, 16, 8
FP8, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


class Buffers:
    """The arguments of `append`: a cache, contiguous or paged, with garbage in it, and its lengths."""

    def __init__(self, kv_lens, is_paged, dtype=torch.float32):
        batch, self.capacity = len(kv_lens), 4 * BLOCK
        max_pages, num_pages = 4, 4 * batch + 3
        first = (num_pages, BLOCK) if is_paged else (batch, self.capacity)
        shapes = [(first[0], h, first[1], DEPTH) for h in (HEADS, HEADS, 1)]
        self.caches = [randn(*shape, seed=h).to(dtype) for h, shape in enumerate(shapes)]
        self.scales = [
            torch.rand(x.shape[:3]).to(E8M0).view(torch.uint8) if dtype == FP8 else None for x in self.caches
        ]
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0)).int()
        self.table = order[: batch * max_pages].view(batch, max_pages) if is_paged else None
        self.kv_lens, self.kv_starts = lengths(*kv_lens), lengths(*([0] * batch))
        self.sequences = torch.full((2 * batch + 1, 5), 99, dtype=torch.int32)
        self.status = torch.zeros(2, dtype=torch.int32)

    def tensors(self):
        return [x for x in (*self.caches, *self.scales, self.kv_lens, self.sequences, self.status) if x is not None]

    def append(self, new, lens):
        ops.append(
            *new,
            lens,
            *self.caches,
            *self.scales,
            self.table,
            self.kv_starts,
            self.kv_lens,
            self.sequences,
            self.status,
            "torch",
        )

    def place(self, row, key):
        return (row, key) if self.table is None else (int(self.table[row, key // BLOCK]), key % BLOCK)


def new_tokens(batch, count, strided):
    tokens = [randn(batch, h, count, DEPTH, seed=9 + h) for h in (HEADS, HEADS, 1)]
    if strided:
        tokens = [x.transpose(1, 2).contiguous().transpose(1, 2).repeat_interleave(2, -1)[..., ::2] for x in tokens]
    return tokens


@pytest.mark.parametrize("lens", [None, (9, 0, 3), (-2, 50, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8], ids=str)
@pytest.mark.parametrize("is_paged", [False, True])
def test_append_equals_a_loop_over_tokens(is_paged, dtype, lens):
    kv_lens = [0, 15, 23]
    cache = Buffers(kv_lens, is_paged, dtype)
    cache.kv_starts += lengths(0, 4, 0)
    new = new_tokens(3, 9, strided=True)
    caches, scales = ([None if x is None else x.clone() for x in part] for part in (cache.caches, cache.scales))
    counts = [9] * 3 if lens is None else [min(max(n, 0), 9) for n in lens]
    for x, into, scale in zip(new, caches, scales, strict=True):
        for row, count in enumerate(counts):
            for token in range(count):
                place, key = cache.place(row, kv_lens[row] + token)
                if scale is None:
                    into[place, :, key] = x[row, :, token].to(dtype)
                else:
                    factor = least_scale(x[row, :, token])
                    into[place, :, key] = (x[row, :, token] / factor[:, None]).to(FP8)
                    scale[place, :, key] = factor.to(E8M0).view(torch.uint8)
    cache.append(new, None if lens is None else lengths(*lens))
    for actual, wanted in zip((*cache.caches, *cache.scales), (*caches, *scales), strict=True):
        if wanted is not None:
            assert torch.equal(actual.float(), wanted.float())
    ends = [length + count for length, count in zip(kv_lens, counts, strict=True)]
    assert cache.kv_lens.tolist() == ends
    table = ragged(counts, ends, 9, cache.kv_starts.tolist())
    table = table[::2] if lens is None else table
    assert torch.equal(cache.sequences[: len(table)], table)
    assert (cache.sequences[len(table) :] == 99).all()
    assert cache.status.tolist() == [0, 0]


@pytest.mark.parametrize("is_paged", [False, True])
def test_an_append_without_room_changes_nothing(is_paged):
    cache = Buffers([3, 28, 0], is_paged)
    before = [x.clone() for x in cache.tensors()]
    for lens in (None, lengths(5, 5, 5), lengths(0, 5, 0)):
        with pytest.raises(
            ValueError, match="cache: expected at most 4 more tokens in row 1, got 5: it holds 28 of 32"
        ):
            cache.append(new_tokens(3, 5, strided=False), lens)
    assert all(torch.equal(x, y) for x, y in zip(cache.tensors(), before, strict=True))
    cache.append(new_tokens(3, 5, strided=False), lengths(5, 4, 0))
    assert cache.kv_lens.tolist() == [8, 32, 0]


@pytest.mark.parametrize("bad", [-1, 15])
def test_an_append_without_a_page_changes_nothing(bad):
    cache = Buffers([3, 14, 0], is_paged=True)
    cache.table[1, 2] = bad
    before = [x.clone() for x in cache.tensors()]
    with pytest.raises(ValueError, match=f"page_table: expected a page from 0 to 14 for block 2 of row 1, got {bad}"):
        cache.append(new_tokens(3, 5, strided=False), None)
    assert all(torch.equal(x, y) for x, y in zip(cache.tensors(), before, strict=True))
    cache.append(new_tokens(3, 5, strided=False), lengths(5, 2, 5))
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
    assert torch.equal(stored, (x / scale[..., None]).to(FP8).float())
    assert (stored.abs().amax(-1) >= 224).sum() == 14
    assert (stored[1, 2] == 0).all()
    error = (stored * scale[..., None] - x).abs()
    assert (error <= x.abs() * 2.0**-4 + scale[..., None] * 2.0**-10).all()


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf, -448.1 * 2.0**119])
def test_the_scale_of_a_vector_that_is_not_finite_is_nan(bad):
    x = randn(2, DEPTH)
    x[0, 3] = bad
    assert fp8.as_scales(fp8.quantize(x)[1]).float().isnan().tolist() == [True, False]
