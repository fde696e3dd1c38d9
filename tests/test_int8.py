"""Index keys in int8 by the plain PyTorch kernels and the reference, against `int8_oracle`, bit for bit."""

import int8_oracle
import pytest
import torch
from helpers import plain, ragged, randn
from hypothesis import given
from hypothesis import strategies as st

import flexmsa
from flexmsa import ops
from flexmsa.kernels import torch as kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.torch import int8
from flexmsa.testing.check import kernels_for_many_queries

GROUPS, DEPTH = 2, 24
IDS = flexmsa.AuxRequest(block_indices=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_stored_bits(dtype):
    torch.manual_seed(0)
    x = int8_oracle.wild(64, 17).to(dtype)
    for found, wanted in zip(int8.quantize(x), int8_oracle.quantised(x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_every_number_is_within_half_a_step():
    x = randn(50, DEPTH) * torch.logspace(-20, 20, 50)[:, None]
    numbers, scale = int8.quantize(x)
    assert torch.equal(numbers.abs().amax(-1), torch.full((50,), 127))
    error = (numbers.double() * scale.double()[:, None] - x.double()).abs()
    assert (error <= scale.double()[:, None] * 0.500001).all()


def fill(cache, k, index_k, lens):
    cache.append(k, k, index_k, lens=lens)
    return cache


def both_caches(k, index_k, lens, block_size):
    """A contiguous and a paged cache of the same tokens."""
    batch, heads, count, size = k.shape
    pages = -(-count // block_size)
    sizes, dtypes = (batch, heads, size, index_k.shape[3]), {"dtype": k.dtype, "index_dtype": torch.int8}
    contiguous = flexmsa.MSACache(*sizes, capacity=count, **dtypes)
    paged = flexmsa.PagedMSACache(*sizes, num_pages=batch * pages, max_pages=pages, page_size=block_size, **dtypes)
    return fill(contiguous, k, index_k, lens), fill(paged, k, index_k, lens)


@st.composite
def selections(draw):
    """(rule, lengths, queries, dtype, wild vectors or not, seed)."""
    topk = draw(st.integers(1, 6))
    local = draw(st.integers(1, min(2, topk)))
    rule = SelectionRule(draw(st.sampled_from([4, 12, 16])), topk, local, draw(st.integers(0, min(2, topk - local))))
    lens = tuple(draw(st.lists(st.integers(0, 90), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return rule, lens, draw(st.sampled_from([1, 3, 17, 40])), dtype, draw(st.booleans()), draw(st.integers(0, 99))


@given(selections())
def test_ids_are_those_of_the_oracle(case):
    rule, lens, count, dtype, wild, seed = case
    torch.manual_seed(seed)
    length = max(*lens, 1, count)
    index_k, index_q = torch.randn(len(lens), 1, length, DEPTH), torch.randn(len(lens), GROUPS, count, DEPTH)
    if wild:
        index_k[-1, 0] = int8_oracle.wild(max(12, length), DEPTH)[:length]
        index_q[-1, 0] = int8_oracle.wild(max(12, count), DEPTH)[-count:]
        index_k[0, 0, length // 2 :] = index_k[0, 0, : length - length // 2].clone()
    index_k, index_q = index_k.to(dtype), index_q.to(dtype)
    k, q = torch.randn(len(lens), GROUPS, length, 16).to(dtype), torch.randn(len(lens), GROUPS, count, 16).to(dtype)
    contiguous, paged = both_caches(k, index_k, torch.tensor(lens), rule.block_size)
    stored = int8_oracle.quantised(index_k)
    filled = torch.arange(length) < torch.tensor(lens)[:, None, None]
    assert torch.equal(contiguous.index_k[filled], stored[0][filled])
    wanted = int8_oracle.selection(index_q, *stored, contiguous.newest(count), rule)
    how = {"block_size": rule.block_size, "topk": rule.topk, "num_init_blocks": rule.num_init_blocks}
    for cache in (contiguous, paged):
        with kernels_for_many_queries(q, None):
            _, aux = flexmsa.decode(q, cache, index_q, **how, num_local_blocks=rule.num_local_blocks, return_aux=IDS)
        assert torch.equal(aux.block_indices, wanted)


@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("fast", [False, True])
def test_products_of_int8_instructions(fast, count, monkeypatch):
    """Ids are the same with products in int8, which few queries of one sequence take, and in float32."""
    monkeypatch.setattr(int8, "multiplies_int8", lambda: fast)
    index_k, index_q = randn(1, 1, 3000, 64), randn(1, GROUPS, count, 64, seed=1)
    k, rule = randn(1, GROUPS, 3000, 16), SelectionRule(8, 5)
    index_k[0, 0, 700] = torch.nan
    for cache in both_caches(k, index_k, None, 8):
        _, aux = flexmsa.decode(k[:, :, :count], cache, index_q, block_size=8, topk=5, return_aux=IDS)
        wanted = int8_oracle.selection(index_q, *int8_oracle.quantised(index_k), plain(1, count, 3000), rule)
        assert torch.equal(aux.block_indices, wanted)


def test_a_chunk_selects_what_its_tokens_select_one_by_one():
    index_k, index_q, k = randn(1, 1, 150, DEPTH), randn(1, GROUPS, 150, DEPTH, seed=1), randn(1, GROUPS, 150, 16)
    how = {"block_size": 8, "topk": 4, "return_aux": IDS}
    caches = [flexmsa.MSACache(1, GROUPS, 16, DEPTH, 150, index_dtype=torch.int8) for _ in range(2)]
    caches[0].append(k, k, index_k)
    ids = flexmsa.decode(k, caches[0], index_q, **how)[1].block_indices
    for i in range(150):
        one = slice(i, i + 1)
        caches[1].append(k[:, :, one], k[:, :, one], index_k[:, :, one])
        _, aux = flexmsa.decode(k[:, :, one], caches[1], index_q[:, :, one], **how)
        assert torch.equal(aux.block_indices, ids[:, :, one])
    assert torch.equal(caches[0].index_k, caches[1].index_k)


@pytest.mark.parametrize("is_paged", [False, True])
def test_compiled_steps(is_paged):
    x = randn(2, 1, 40, 16)
    caches = [both_caches(x, x, torch.tensor([30, 7]), 8)[is_paged] for _ in range(2)]
    for cache in caches:
        if is_paged:
            cache.reserve(40)

    def step(cache, new):
        cache.append(new, new, new)
        return flexmsa.decode(new, cache, new, block_size=8, topk=2)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for seed in range(3):
        new = randn(2, 1, 1, 16, seed=seed)
        assert torch.equal(compiled(caches[0], new), step(caches[1], new))


def test_rows_of_a_cache():
    """Trimmed, reordered and shared rows keep each token's numbers and scale."""
    x = randn(2, 1, 20, 16)
    contiguous, paged = both_caches(x, x, None, 4)
    for cache in (contiguous, paged):
        cache.trim(torch.tensor([3, 0]))
        cache.reorder(torch.tensor([1, 0]))
    paged.reset([1])
    paged.share(0, [1], 18)
    paged.trim(torch.tensor([0, 1]))
    rows = [(contiguous, 0, x[1, 0]), (contiguous, 1, x[0, 0, :17]), (paged, 0, x[1, 0]), (paged, 1, x[1, 0, :17])]
    for cache, row, wanted in rows:
        assert cache.kv_lens[row] == len(wanted)
        numbers, scale = int8_oracle.quantised(wanted)
        found = cache.contiguous()[2][row, 0, : len(wanted)]
        assert torch.equal(found, numbers.float() * scale[:, None])


def test_the_reference_rounds_queries_too():
    """Where rounding a query changes what it selects, the reference sees the change."""
    rule, sequences = SelectionRule(8, 3), plain(1, 40, 200)
    index_k, index_q, k = randn(1, 1, 200, DEPTH), randn(1, GROUPS, 40, DEPTH, seed=1), randn(1, GROUPS, 200, 16)
    cache = flexmsa.MSACache(1, GROUPS, 16, DEPTH, 200, index_dtype=torch.int8)
    cache.append(k, k, index_k)
    how = {"block_size": 8, "topk": 3, "backend": "reference", "return_aux": IDS}
    ids = flexmsa.decode(k[:, :, :40], cache, index_q, **how)[1].block_indices
    assert torch.equal(ids, int8_oracle.selection(index_q, cache.index_k, cache.index_k_scale, sequences, rule))
    unrounded = kernels.select_blocks(index_q, cache.contiguous()[2], sequences, rule)
    assert 0 < (ids != unrounded).sum() < 0.2 * ids.numel()


def test_what_is_not_finite_scores_as_nothing():
    index_k, index_q = randn(1, 1, 96, DEPTH), randn(1, GROUPS, 1, DEPTH, seed=1)
    index_k[0, 0, 32:48] = torch.nan
    index_k[0, 0, 50, 3] = torch.inf
    index_q[0, 1, 0, 0] = torch.nan
    numbers, scale = int8.quantize(index_k)
    assert scale[0, 0, 32:48].isnan().all() and scale[0, 0, 50].isnan()
    ids = kernels.select_blocks(index_q, numbers, plain(1, 1, 96), SelectionRule(16, 3), None, scale)
    assert 2 not in ids[0, 0] and ids[0, 1, 0].tolist() == [0, 1, 5]


def test_scored_blocks():
    """Scores are without the query's scale."""
    index_q, (numbers, scale) = randn(2, 3, 5, DEPTH), int8.quantize(randn(2, 1, 104, DEPTH, seed=1))
    sequences = ragged([5, 2], [90, 13], 5)
    ids, scores = ops.scored_blocks(index_q, numbers, sequences, 8, 4, "torch", None, scale)
    queries, _ = int8_oracle.quantised(index_q)
    for token, group in ((0, 0), (4, 2)):
        seen = 90 - 4 + token
        wanted = int8_oracle.block_scores(queries[0, group, token], numbers[0, 0, :seen], scale[0, 0, :seen], 8)
        best = wanted.sort(descending=True, stable=True)
        assert torch.equal(ids[0, group, token].long(), best.indices[:4])
        assert torch.equal(scores[0, group, token], best.values[:4])


def test_float64_queries():
    cache = flexmsa.MSACache(1, 1, 16, 16, 64, dtype=torch.float64, index_dtype=torch.int8)
    x = randn(1, 1, 40, 16, dtype=torch.float64)
    cache.append(x, x, x)
    out, aux = flexmsa.decode(x[:, :, :5], cache, x[:, :, :5], block_size=4, topk=3, return_aux=IDS)
    stored = cache.index_k, cache.index_k_scale
    wanted = int8_oracle.selection(x[:, :, :5], *stored, plain(1, 5, 40), SelectionRule(4, 3))
    assert out.dtype == torch.float64 and torch.equal(aux.block_indices, wanted)


def test_contiguous_gives_the_keys_back():
    x = randn(2, 1, 20, 16)
    for cache in both_caches(x, x, None, 4):
        found = cache.contiguous()[2]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found[:, :, :20], x, rtol=0, atol=float(x.abs().max()) / 250)


def test_half_the_memory_of_16_bits():
    bf16, int8_keys = (
        flexmsa.MSACache(1, 1, 16, 128, 64, dtype=torch.bfloat16, index_dtype=kind) for kind in (None, torch.int8)
    )
    saved = sum(x.nbytes for x in bf16.buffers) - sum(x.nbytes for x in int8_keys.buffers)
    assert saved == 64 * (256 - 132)


def pools(index_dtype=torch.int8):
    return torch.zeros(6, 1, 4, 16), torch.zeros(6, 1, 4, 16), torch.zeros(6, 1, 4, 16, dtype=index_dtype)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: flexmsa.MSACache(1, 1, 16, 16, 8, dtype=torch.int8), TypeError, "^dtype: .*index_dtype takes int8"),
        (
            lambda: flexmsa.MSACache(1, 1, 16, 1025, 8, index_dtype=torch.int8),
            ValueError,
            "^index_head_dim: expected at most 1024 .*got 1025; keep",
        ),
        (lambda: flexmsa.PagePools(*pools()), TypeError, r"^index_k_scale: expected a tensor of float32.*got None"),
        (lambda: flexmsa.PagePools(*pools(), index_k_scale=0.5), TypeError, r"^index_k_scale: expected a tensor.*0.5"),
        (
            lambda: flexmsa.PagePools(*pools(), index_k_scale=torch.zeros(6, 1, 4, dtype=torch.uint8)),
            TypeError,
            "^index_k_scale: expected float32 .* for an int8 pool, got torch.uint8",
        ),
        (
            lambda: flexmsa.PagePools(*pools(), index_k_scale=torch.zeros(6, 1, 5)),
            ValueError,
            r"^index_k_scale: expected \[num_pages, heads, page_size\]",
        ),
        (
            lambda: flexmsa.PagePools(pools()[2], pools()[2], pools()[0]),
            TypeError,
            "^k: expected a floating dtype, got torch.int8",
        ),
        (
            lambda: flexmsa.select_blocks(randn(1, 1, 4, 16), pools()[2][:1]),
            TypeError,
            "^index_k: expected a floating dtype, got torch.int8",
        ),
    ],
    ids=["dtype", "dims", "no scale", "one scale", "codes", "shape", "keys", "select_blocks"],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_server_gives_its_scales():
    table, lens, stored = torch.arange(6).view(2, 3).int(), torch.zeros(2, dtype=torch.int32), pools()
    scale, x = torch.zeros(6, 1, 4), randn(2, 1, 6, 16)
    cache = flexmsa.PagedMSACache.wrap(*stored, table, lens, index_k_scale=scale)
    cache.append(x, x, x)
    wanted = int8_oracle.quantised(x)
    assert torch.equal(stored[2][:2, 0].flatten(0, 1)[:6], wanted[0][0, 0])
    assert torch.equal(scale[3:5, 0].flatten()[:6], wanted[1][1, 0])
    assert flexmsa.PagedMSACache.wrap(*pools(), table, lens).index_k_scale.dtype == torch.float32
