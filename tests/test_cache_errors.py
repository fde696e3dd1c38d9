"""What is wrong about a cache raises and leaves it as it was; what is unusual is still right."""

import pytest
import torch
from helpers import assert_refused

import flexmsa

FP8 = torch.float8_e4m3fn


def tokens(count, batch=2):
    return [torch.randn(batch, 1, count, 16) for _ in range(3)]


def paged(num_pages, max_pages=4):
    return flexmsa.PagedMSACache(2, 1, 16, 16, num_pages=num_pages, max_pages=max_pages, page_size=4)


def decode(cache, q):
    return flexmsa.decode(q, cache, None, block_size=4, topk=None)


def test_a_trim_that_needs_a_page_where_none_is_free():
    cache = paged(2)
    cache.append(*tokens(8), lens=torch.tensor([8, 0]))
    cache.share(0, [1], 8)
    assert_refused(cache, lambda: cache.trim(torch.tensor([0, 2])), "pages that are free")
    assert_refused(cache, lambda: cache.append(*tokens(1), lens=torch.tensor([0, 1])), "pages that are free")


def test_a_reservation_that_fails_reserves_nothing():
    cache = paged(4, 10)
    cache.append(*tokens(8), lens=torch.tensor([8, 0]))
    assert_refused(cache, lambda: cache.reserve([8, 40]), "pages that are free")
    assert_refused(cache, lambda: cache.reserve([8]), "each of 2 rows")
    cache.trim(torch.tensor([8, 0]))
    cache.append(*tokens(16), lens=torch.tensor([0, 16]))


def test_pages_of_trimmed_tokens_can_be_reserved():
    cache = paged(4)
    cache.append(*tokens(16), lens=torch.tensor([16, 0]))
    cache.trim(12)
    cache.reserve([4, 8])
    assert cache.num_free_pages == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.share(0, [1], 1),
        lambda cache: cache.reserve(4),
        lambda cache: cache.reorder(torch.tensor([0, 0])),
    ],
    ids=["share", "reserve", "reorder"],
)
def test_pages_of_tokens_that_a_tensor_trims_are_free(call):
    cache = paged(4)
    cache.append(*tokens(16), lens=torch.tensor([16, 0]))
    cache.trim(torch.tensor([15, 0]))
    call(cache)
    assert cache.num_free_pages == 2


def test_a_trim_makes_room_for_its_own_copies():
    cache = flexmsa.PagedMSACache(3, 1, 16, 16, num_pages=3, max_pages=4, page_size=4)
    cache.append(*tokens(8, batch=3), lens=torch.tensor([4, 0, 8]))
    cache.share(0, [1], 4)
    cache.trim(torch.tensor([0, 2, 8]))
    assert cache.page_table[0, 0] != cache.page_table[1, 0]
    held = cache.contiguous()[0]
    assert torch.equal(held[0, :, :2], held[1, :, :2])


@pytest.mark.parametrize("count", [2**31, 2**32, 2**40])
def test_a_trim_of_more_tokens_than_int32_holds(count):
    for counts in (count, torch.tensor([count, 3])):
        for cache in (flexmsa.MSACache(2, 1, 16, 16, 32), paged(8)):
            cache.append(*tokens(8))
            cache.trim(counts)
            assert cache.kv_lens.tolist() == ([0, 0] if counts is count else [0, 5])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_each_backend_refuses_rows_without_room_or_pages(backend):
    table, lens = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cache = flexmsa.PagedMSACache.wrap(*pools(), table, lens)
    message = "page_table: expected a page from 0 to 7 for block 1 of row 1, got -1"
    assert_refused(cache, lambda: cache.append(*tokens(6), backend=backend), message)
    lens.add_(6)
    assert_refused(cache, lambda: cache.append(*tokens(3), backend=backend), "at most 2 more tokens in row 0, got 3")
    cache.trim(0)
    q = torch.randn(2, 2, 1, 16)
    for index_q in (None, q[:, :1]):
        choice = {"block_size": 4, "topk": None if index_q is None else 1}
        with pytest.raises(ValueError, match=message):
            flexmsa.decode(q, cache, index_q, **choice, backend=backend)


def test_reserved_pages_survive_sharing_and_beams():
    cache = paged(12, 6)
    cache.append(*tokens(10), lens=torch.tensor([10, 0]))
    cache.reserve(24)
    for change in (lambda: cache.share(0, [1], 8), lambda: cache.reorder(torch.tensor([0, 0])), lambda: cache.trim(9)):
        change()
        assert (cache.page_table >= 0).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda cache: cache.reorder(torch.tensor([-1, 1])),
        lambda cache: cache.reset([0, 5]),
        lambda cache: cache.share(-1, [1], 2),
        lambda cache: cache.share(0, [2], 2),
        lambda cache: cache.share(0, 1, 2),
    ],
    ids=["reorder", "reset", "source", "rows", "one row"],
)
def test_rows_that_are_none(call):
    cache = paged(8)
    cache.append(*tokens(6))
    assert_refused(cache, lambda: call(cache), "from 0 to 1")


@pytest.mark.parametrize("start", [-3, 33])
def test_starts_that_are_no_token(start):
    with pytest.raises(ValueError, match=f"kv_starts: expected 0 to 32.*got {start}"):
        flexmsa.MSACache(2, 1, 16, 16, 32, kv_starts=torch.tensor([0, start]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float8_e5m2, torch.complex64], ids=str)
def test_dtypes_that_are_not_kept(dtype):
    for name in ("dtype", "index_dtype"):
        with pytest.raises(TypeError, match=f"^{name}: expected one of"):
            flexmsa.MSACache(2, 1, 16, 16, 32, **{name: dtype})


def test_a_row_within_its_padding():
    cache = flexmsa.MSACache(2, 1, 16, 16, 32, kv_starts=torch.tensor([5, 0]))
    cache.append(*tokens(4))
    for count in (4, 1):
        q, index_q = torch.randn(2, 2, count, 16), torch.randn(2, 1, count, 16)
        out = flexmsa.decode(q, cache, index_q, block_size=4, topk=2)
        assert (out[0] == 0).all() and (out[1] != 0).all()


def test_keys_of_fewer_dimensions():
    cache = flexmsa.MSACache(2, 1, 16, 16, 32)
    with pytest.raises(ValueError, match=r"^k: expected"):
        cache.append(torch.randn(2, 16), *tokens(1)[1:])


@pytest.mark.parametrize("topk", [None, 4])
def test_float64_queries_of_an_e4m3_cache(topk):
    cache = flexmsa.MSACache(1, 1, 16, 16, 64, dtype=FP8)
    cache.append(*(x.double() for x in tokens(40, batch=1)))
    q, index_q = torch.randn(1, 2, 20, 16).double(), torch.randn(1, 1, 20, 16).double()
    aux = flexmsa.AuxRequest(lse=True)
    out, found = flexmsa.decode(q, cache, index_q, block_size=4, topk=topk, return_aux=aux)
    exact, wanted = flexmsa.decode(q, cache, index_q, block_size=4, topk=topk, return_aux=aux, backend="reference")
    assert out.dtype == found.lse.dtype == torch.float64
    torch.testing.assert_close(out, exact.double(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.lse, wanted.lse.double(), rtol=1e-6, atol=1e-6)


def pools(dtype=torch.float32):
    return [torch.zeros(8, 1, 4, 16, dtype=dtype) for _ in range(3)]


def test_a_server_gives_its_scales():
    table, lens, stored = torch.arange(8, dtype=torch.int32).view(2, 4), torch.zeros(2, dtype=torch.int32), pools(FP8)
    scales = {name: torch.zeros(8, 1, 4, dtype=torch.uint8) for name in ("k_scale", "v_scale", "index_k_scale")}
    first = flexmsa.PagedMSACache.wrap(*stored, table, lens, **scales)
    first.append(*tokens(6))
    second = flexmsa.PagedMSACache.wrap(*stored, table, lens, **scales)
    q = torch.randn(2, 2, 1, 16)
    assert torch.equal(decode(second, q), decode(first, q))
    lens.sub_(2)
    first.trim(0)
    assert torch.equal(decode(first, q), decode(flexmsa.PagedMSACache.wrap(*stored, table, lens, **scales), q))
    with pytest.raises(TypeError, match=r"^v_scale: expected uint8"):
        flexmsa.PagedMSACache.wrap(*pools(), table, lens, v_scale=scales["v_scale"])


def test_garbage_behind_the_last_page():
    table, lens = torch.tensor([[0, 10**9], [1, -5]], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    cache = flexmsa.PagedMSACache.wrap(*pools(), table, lens)
    cache.append(*tokens(4))
    assert cache.contiguous()[0].shape == (2, 1, 8, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(8, 1, 4, 16, dtype=torch.float64)}, "v: expected the dtype of k"),
        ({"index_k": torch.zeros(8, 16)}, "index_k: expected"),
        ({"k": torch.zeros(8, 1, 4, 16, dtype=torch.int32)}, "k: expected"),
        ({"kv_lens": torch.zeros(4, dtype=torch.int32)[::2]}, "kv_lens: expected contiguous"),
    ],
    ids=["dtypes differ", "two dimensions", "integers", "strided lengths"],
)
def test_buffers_that_a_server_may_not_give(change, message):
    arguments = dict(zip(("k", "v", "index_k"), pools(), strict=True))
    arguments |= {"page_table": torch.arange(8, dtype=torch.int32).view(2, 4)}
    arguments |= {"kv_lens": torch.zeros(2, dtype=torch.int32)}
    with pytest.raises((ValueError, TypeError), match=message):
        flexmsa.PagedMSACache.wrap(**(arguments | change))


def layer():
    return flexmsa.MSAttention(flexmsa.MSAConfig(32, 2, 1, head_dim=16, index_head_dim=16, block_size=4, topk=2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_indices": torch.zeros(2, 1, 9, 2, dtype=torch.int32)}, "block_indices: expected"),
        ({"lens": torch.tensor([1, 1, 1])}, "lens: expected"),
        ({"cache": flexmsa.MSACache(3, 1, 16, 16, 32)}, "cache: expected"),
        ({"cache": "a cache"}, "cache: expected"),
    ],
    ids=["block_indices", "lens", "batch", "none"],
)
def test_what_a_layer_refuses_is_not_appended(change, message):
    attention = layer()
    cache = attention.new_cache(2, 32)
    assert_refused(cache, lambda: attention.generate(torch.randn(2, 3, 32), **({"cache": cache} | change)), message)


def test_a_layer_under_autocast():
    attention = layer()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        with pytest.raises(TypeError, match="expected the dtype of the cache"):
            attention(torch.randn(2, 3, 32), cache=attention.new_cache(2, 32))
        out, _ = attention(torch.randn(2, 3, 32), cache=attention.new_cache(2, 32, dtype=torch.bfloat16))
    assert out.isfinite().all()


def test_what_is_asked_for_by_something_else():
    cache = flexmsa.MSACache(2, 1, 16, 16, 32)
    with pytest.raises(TypeError, match="return_aux: expected an AuxRequest"):
        flexmsa.decode(torch.randn(2, 2, 1, 16), cache, None, topk=None, return_aux=True)
