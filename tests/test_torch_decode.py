"""The plain PyTorch kernels that read caches, compared with the definition and with dense attention."""

import itertools

import pytest
import torch
from helpers import dense_attention, dense_selection, plain, ragged, randn

from flexmsa import ops
from flexmsa.kernels import torch as torch_kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.torch import fp8
from flexmsa.testing import assert_close

HEADS, GROUP, DEPTH, BLOCK, TOPK = 2, 3, 16, 8, 3
SCALE = DEPTH**-0.5
FP8 = torch.float8_e4m3fn
CAPACITY = 104


class Layer:
    """Queries, and a cache filled with NaN behind its keys, contiguous and paged."""

    def __init__(self, kv_lens, seqlen_q, dtype=torch.float32, cache_dtype=None, seed=0):
        batch, rounded = len(kv_lens), dtype if cache_dtype in (None, FP8) else cache_dtype
        self.q = randn(batch, HEADS * GROUP, seqlen_q, DEPTH, dtype=dtype, seed=seed)
        self.index_q = randn(batch, HEADS, seqlen_q, DEPTH, dtype=dtype, seed=seed + 1)
        caches = [randn(batch, h, CAPACITY, DEPTH, dtype=rounded, seed=seed + 2 + h) for h in (HEADS, HEADS, 1)]
        for x in caches:
            for row, length in enumerate(kv_lens):
                x[row, :, length:] = torch.nan
        if cache_dtype == FP8:
            stored, scales = zip(*(fp8.quantize(x) for x in caches), strict=True)
        else:
            stored, scales = caches, [None] * 3
        self.contiguous = [*stored, None, *scales]
        max_pages = CAPACITY // BLOCK
        self.table = torch.randperm(2 * batch * max_pages, generator=torch.Generator().manual_seed(seed)).int()
        self.table = self.table[: batch * max_pages].view(batch, max_pages)
        pools = [None if x is None else self._pool(x) for x in (*stored, *scales)]
        garbage = torch.tensor([-1, 2**31 - 1, -(2**31), 10**6], dtype=torch.int32)
        for row, length in enumerate(kv_lens):
            unused = self.table[row, -(-length // BLOCK) :]
            unused.copy_(garbage.repeat(max_pages)[: len(unused)])
        self.paged = [*pools[:3], self.table, *pools[3:]]

    def _pool(self, x):
        pool = torch.full((2 * self.table.numel(), x.shape[1], BLOCK, *x.shape[3:]), torch.nan).to(x.dtype)
        for (row, block), page in zip(
            itertools.product(range(len(x)), range(CAPACITY // BLOCK)), self.table.flatten().tolist(), strict=True
        ):
            pool[page] = x[row, :, block * BLOCK : (block + 1) * BLOCK]
        return pool

    def select(self, sequences, cache, local=1, init=0):
        _, _, index_k, table, _, _, scale = cache
        return ops.select_blocks(self.index_q, index_k, sequences, BLOCK, TOPK, local, init, "torch", table, scale)

    def attend(self, ids, sequences, cache):
        k, v, _, table, k_scale, v_scale, _ = cache
        out = torch.empty_like(self.q)
        stored = table, k_scale, v_scale
        return out, ops.attend_blocks(self.q, k, v, ids, sequences, BLOCK, SCALE, "torch", *stored, out)


def wanted_ids(layer, index_k, sequences, *forced):
    return dense_selection(layer.index_q.double(), index_k, sequences, SelectionRule(BLOCK, TOPK, *forced))


def dequantized(cache):
    k, v, index_k, _, *scales = cache
    return [
        x if s is None else x.float() * fp8.as_scales(s).float()[..., None]
        for x, s in zip((k, v, index_k), scales, strict=True)
    ]


def check_attention(layer, cache, ids, sequences):
    k, v, _ = (x.nan_to_num() for x in dequantized(cache))
    actual = layer.attend(ids, sequences, cache)
    exact, baseline = (
        dense_attention(layer.q, k, v, ids, sequences, BLOCK, SCALE, dtype) for dtype in (torch.float64, layer.q.dtype)
    )
    for name, *results in zip(("out", "lse"), actual, exact, baseline, strict=True):
        assert_close(name, *results)
    return actual


BATCHES = {
    "one token": ([1, 1, 1], [97, 8, 33], 1),
    "ragged": ([5, 0, 2], [104, 40, 2], 5),
    "empty rows": ([0, 3, 1], [0, 3, 1], 3),
    "nothing": ([0, 0], [0, 5], 1),
    "no tokens": ([0], [9], 0),
    "the most queries that gather": ([16, 9, 16], [90, 80, 16], 16),
    "a chunk of a prompt": ([40, 7, 0], [100, 97, 50], 40),
    **{f"{n} tokens": ([n, n], [70, n], n) for n in (2, 4, 7, 8, 12, 15)},
}


@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16, FP8], ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_results_equal_dense_attention(name, cache_dtype):
    lens, kv_lens, seqlen_q = BATCHES[name]
    layer = Layer(kv_lens, seqlen_q, torch.bfloat16 if cache_dtype == FP8 else cache_dtype, cache_dtype)
    sequences = ragged(lens, kv_lens, seqlen_q)
    ids = layer.select(sequences, layer.contiguous)
    assert torch.equal(ids, wanted_ids(layer, dequantized(layer.contiguous)[2], sequences))
    assert torch.equal(layer.select(sequences, layer.paged), ids)
    for chosen in (ids, None):
        out, lse = check_attention(layer, layer.contiguous, chosen, sequences)
        paged_out, paged_lse = layer.attend(chosen, sequences, layer.paged)
        assert torch.equal(paged_out, out)
        assert torch.equal(paged_lse, lse)
        for row, count in enumerate(lens):
            assert (out[row, :, count:] == 0).all()
            assert (lse[row, :, count:] == -torch.inf).all()


@pytest.mark.parametrize(("local", "init"), [(0, 0), (0, 1), (2, 1)])
@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8], ids=str)
def test_forced_blocks(local, init, cache_dtype):
    layer = Layer([97, 30], 20, cache_dtype=cache_dtype)
    sequences = ragged([20, 6], [97, 30], 20)
    wanted = wanted_ids(layer, dequantized(layer.contiguous)[2], sequences, local, init)
    for cache in (layer.contiguous, layer.paged):
        assert torch.equal(layer.select(sequences, cache, local, init), wanted)


def test_left_padding():
    layer = Layer([97, 60], 2)
    sequences = ragged([2, 1], [97, 60], 2, kv_starts=[13, 60])
    for cache in layer.contiguous[:3]:
        cache[0, :, :13] = torch.nan
    ids = layer.select(sequences, layer.contiguous)
    assert torch.equal(ids, wanted_ids(layer, layer.contiguous[2], sequences))
    check_attention(layer, layer.contiguous, ids, sequences)


@pytest.mark.parametrize("seqlen_q", [4, 20])
def test_ids_of_invisible_blocks_are_ignored(seqlen_q):
    layer = Layer([97, 30], seqlen_q)
    sequences = ragged([seqlen_q, 2], [97, 30], seqlen_q)
    ids = layer.select(sequences, layer.paged)
    wanted = layer.attend(ids, sequences, layer.paged)
    for dtype in (torch.int32, torch.int64):
        worst = torch.iinfo(dtype)
        for bad in (-7, 13, 10**6, worst.max, worst.min):
            tail = torch.full((*ids.shape[:3], 2), bad, dtype=dtype)
            more = torch.cat([tail, ids.to(dtype), ids.to(dtype)], -1)
            for result, expected in zip(layer.attend(more, sequences, layer.paged), wanted, strict=True):
                assert torch.equal(result, expected)
    out, lse = layer.attend(torch.full_like(ids, -1), sequences, layer.paged)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_blocks_that_are_not_chosen_are_not_read():
    layer = Layer([97, 97], 1)
    sequences = ragged([1, 1], [97, 97], 1)
    ids = torch.tensor([[2, -1, -1], [4, 5, -1], [-1, -1, -1], [3, 4, 5]], dtype=torch.int32).view(2, 2, 1, 3)
    wanted = check_attention(layer, layer.contiguous, ids, sequences)
    k, v = layer.contiguous[:2]
    for row, head in itertools.product(range(2), range(2)):
        unchosen = ~torch.isin(torch.arange(CAPACITY) // BLOCK, ids[row, head])
        k[row, head, unchosen], v[row, head, unchosen] = torch.nan, torch.nan
    for result, expected in zip(layer.attend(ids, sequences, layer.contiguous), wanted, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("cache_dtype", [torch.float32, FP8], ids=str)
def test_caches_may_be_strided(cache_dtype):
    layer = Layer([97, 30], 3, cache_dtype=cache_dtype)
    sequences = ragged([3, 2], [97, 30], 3)
    for cache in (layer.contiguous, layer.paged):
        ids = layer.select(sequences, cache)
        wanted = layer.attend(ids, sequences, cache)
        strided = [torch.stack([x, x], 2)[:, :, 0] if x is not cache[3] and x is not None else x for x in cache]
        assert torch.equal(layer.select(sequences, strided), ids)
        for result, expected in zip(layer.attend(ids, sequences, strided), wanted, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_a_visible_block_without_a_page_is_an_error(bad):
    layer = Layer([97, 30], 1)
    sequences = ragged([1, 1], [97, 30], 1)
    ids = layer.select(sequences, layer.paged)
    layer.table[1, 2] = bad
    message = f"page_table: expected a page from 0 to 51 for block 2 of row 1, got {bad}"
    with pytest.raises(ValueError, match=message):
        layer.select(sequences, layer.paged)
    with pytest.raises(ValueError, match=message):
        layer.attend(ids, sequences, layer.paged)
    idle = ragged([1, 0], [97, 30], 1)
    layer.attend(layer.select(idle, layer.paged), idle, layer.paged)


def test_a_selection_from_many_block_ranges():
    keys = randn(1, 1, 20_011, DEPTH)
    index_q = randn(1, HEADS, 1, DEPTH, seed=1)
    scores = (keys[0, 0, :20_008].double() @ index_q[0, :, 0].double().T).view(-1, BLOCK, HEADS).amax(1)
    wanted = scores.topk(TOPK - 1, 0).indices.sort(0).values.T
    sequences = torch.tensor([[0, 0, 1, 0, 20_011]], dtype=torch.int32)
    ids = torch_kernels.select_blocks(index_q, keys, sequences, SelectionRule(BLOCK, TOPK))
    assert torch.equal(ids[0, :, 0, :-1].long(), wanted)
    assert (ids[0, :, 0, -1] == 2501).all()


def test_e4m3_codes_are_read_exactly():
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    values = fp8.as_float16(codes).float() * fp8.SHIFT
    torch.testing.assert_close(values, codes.float(), rtol=0, atol=0, equal_nan=True)
    shifted = fp8.as_bfloat16(codes, torch.empty(256, dtype=torch.int16)).double() * fp8.BFLOAT16_SHIFT
    torch.testing.assert_close(shifted, codes.double(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_e4m3_key_that_is_not_finite_has_the_lowest_score(bad):
    layer = Layer([97], 1, cache_dtype=FP8)
    _, _, index_k, _, _, _, scale = layer.contiguous
    keys = index_k.float() * fp8.as_scales(scale).float()[..., None]
    keys[0, 0, 40:48], keys[0, 0, 50] = bad, bad
    index_k[:], scale[:] = fp8.quantize(keys)
    sequences = ragged([1], [97], 1)
    keys[0, 0, 40:48], keys[0, 0, 50] = torch.nan, torch.nan
    ids = layer.select(sequences, layer.contiguous)
    assert torch.equal(ids, wanted_ids(layer, keys, sequences))
    assert not (ids == 5).any()


@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_queries_may_have_any_strides(num_kv_heads, seqlen_q):
    q = randn(2, 4, seqlen_q, 16, dtype=torch.bfloat16)
    k, v = (randn(2, num_kv_heads, 32, 16, dtype=torch.bfloat16, seed=seed) for seed in (1, 2))
    ids = torch.tensor([0, 3], dtype=torch.int32).expand(2, num_kv_heads, seqlen_q, 2)
    strided = q.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)
    wanted, found = (torch_kernels.attend_blocks(x, k, v, ids, plain(2, seqlen_q, 32), 8, SCALE) for x in (q, strided))
    for result, expected in zip(found, wanted, strict=True):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_an_infinite_score_gives_nan(padded, dtype):
    q, k, v = (randn(2, 1, count, DEPTH, dtype=dtype, seed=seed) for seed, count in enumerate((1, 16, 16)))
    q.abs_()
    k[:, 0, 10] = torch.inf
    ids = torch.tensor([[0, 1], [0, -1]] if padded else [[1], [0]], dtype=torch.int32)[:, None, None]
    out, _ = torch_kernels.attend_blocks(q, k, v, ids, plain(2, 1, 16), BLOCK, SCALE)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()
