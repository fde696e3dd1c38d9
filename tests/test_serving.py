"""Caches and decoding: random schedules against one dense pass, and what caches refuse."""

import pytest
import torch
from helpers import assert_refused, lengths, make_inputs
from hypothesis import given, settings

import flexmsa
from flexmsa import AuxRequest, MSACache, MSAConfig, MSAttention, PagedMSACache
from flexmsa.pages import Pages
from flexmsa.testing import Schedule, check_schedule, strategies

SIZES = (2, 2, 16, 16)
FP8 = torch.float8_e4m3fn


def paged(num_pages=8, max_pages=4, **settings):
    return PagedMSACache(*SIZES, num_pages=num_pages, max_pages=max_pages, page_size=8, **settings)


def append(cache, count, lens=None, seed=0):
    new = make_inputs(count, batch=2, seed=seed)
    cache.append(new.k, new.v, new.index_k, lens=lens)
    return new


@settings(max_examples=150)
@given(strategies.schedules(dtypes=("float32", "bfloat16")))
def test_any_schedule_equals_one_dense_pass(schedule):
    check_schedule(schedule)


def test_the_reference_serves_too():
    check_schedule(Schedule(steps=(("append", (40, 3)), ("append", (1, 1))), paged=True), backend="reference")


def test_blocks_of_another_layer_are_attended_to():
    cache = MSACache(*SIZES, capacity=64)
    new = append(cache, 60)
    settings = {"block_size": 8, "topk": 3}
    out, aux = flexmsa.decode(new.q, cache, new.index_q, **settings, return_aux=AuxRequest(block_indices=True))
    reused = flexmsa.decode(new.q, cache, None, **settings, block_indices=aux.block_indices)
    assert torch.equal(reused, out)
    for garbage in (2**31 - 1, -7):
        ids = aux.block_indices.where(aux.block_indices >= 0, garbage)
        assert torch.equal(flexmsa.decode(new.q, cache, None, **settings, block_indices=ids), out)


def test_a_layer_reads_ragged_prompts_and_goes_on():
    config = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=16, block_size=8, topk=2)
    layer = MSAttention(config).eval()
    x = torch.randn(2, 50, 32)
    for cache in (layer.new_cache(2, 64), paged(num_pages=16, max_pages=8)):
        with torch.no_grad():
            first, _ = layer(x[:, :40], cache=cache, lens=lengths(40, 13))
            second, _ = layer(torch.stack([x[0, 40:], x[1, 13:23]]), cache=cache)
        for row, begin in ((0, 40), (1, 13)):
            alone, _ = layer(x[row : row + 1, : begin + 10])
            torch.testing.assert_close(first[row, :begin], alone[0, :begin])
            torch.testing.assert_close(second[row], alone[0, begin:])


@pytest.mark.parametrize("make", [lambda: MSACache(*SIZES, capacity=32), paged], ids=["contiguous", "paged"])
def test_an_append_past_the_end_changes_nothing(make):
    cache = make()
    append(cache, 25, lengths(25, 20))
    assert_refused(cache, lambda: append(cache, 8), "cache: expected at most 7 more tokens in row 0, got 8")
    message = "cache: expected at most 12 more tokens in row 1, got 13"
    assert_refused(cache, lambda: append(cache, 13, lengths(1, 13)), message)
    address = cache.k.data_ptr()
    append(cache, 12, lengths(7, 12))
    assert cache.kv_lens.tolist() == [32, 32] and cache.k.data_ptr() == address


def test_a_pool_without_pages_changes_nothing():
    cache = paged(num_pages=6)
    append(cache, 17)
    message = "cache: expected to need at most the 0 pages that are free, got "
    assert_refused(cache, lambda: append(cache, 8), message + "2")
    assert_refused(cache, lambda: cache.reserve(30), message + "1")
    cache.reset([1])
    append(cache, 8, lengths(8, 1))
    assert cache.kv_lens.tolist() == [25, 1]


def test_trimmed_pages_serve_other_rows():
    cache = paged(num_pages=5)
    append(cache, 17, lengths(17, 9))
    cache.trim(lengths(16, 0))
    append(cache, 20, lengths(0, 15))
    assert cache.kv_lens.tolist() == [1, 24]


def test_shared_pages_are_never_written():
    cache = paged(num_pages=8)
    append(cache, 20, lengths(20, 0))
    cache.share(0, [1], 20)
    held = cache.contiguous()[0]
    assert torch.equal(held[0, :, :20], held[1, :, :20])
    assert cache.page_table[0, :2].tolist() == cache.page_table[1, :2].tolist()
    assert cache.page_table[0, 2] != cache.page_table[1, 2]
    cache.trim(lengths(0, 9))
    append(cache, 6, lengths(0, 6), seed=1)
    after = cache.contiguous()[0]
    assert torch.equal(after[0, :, :20], held[0, :, :20])
    assert torch.equal(after[1, :, :11], held[0, :, :11])
    assert not torch.equal(after[1, :, 11:17], held[0, :, 11:17])


def test_pages_are_neither_lost_nor_given_twice():
    generator = torch.Generator().manual_seed(0)

    def random(stop):
        return int(torch.randint(stop, (), generator=generator))

    pages, lens = Pages(num_pages=12, num_rows=3), [0, 0, 0]
    for _ in range(300):
        tried, row = pages.copy(), random(3)
        try:
            match random(4):
                case 0:
                    lens_after = [*lens[:row], lens[row] + random(9), *lens[row + 1 :]]
                    tried.extend(row, -(-lens_after[row] // 4))
                case 1:
                    lens_after = [*lens[:row], 0, *lens[row + 1 :]]
                    tried.truncate(row, 0)
                case _:
                    parents = [random(3) for _ in range(3)]
                    lens_after = [lens[parent] for parent in parents]
                    tried.reorder(parents, lens, 4)
        except ValueError:
            continue
        pages, lens = tried, lens_after
        used = {page for held in pages.rows for page in held}
        assert pages.num_free == 12 - len(used)
        for row, length in enumerate(lens):
            assert len(pages.rows[row]) >= -(-length // 4)
            assert not pages.is_shared(row, length // 4)


def test_a_server_keeps_its_own_page_table():
    inputs = make_inputs(20, batch=2)
    own, pools = paged(), paged()
    table = torch.tensor([[6, 1, 3, -1], [0, 7, 2, 5]], dtype=torch.int32)
    cache = PagedMSACache.wrap(pools.k, pools.v, pools.index_k, table, lengths(0, 0))
    results = []
    for each in (own, cache):
        each.append(inputs.k, inputs.v, inputs.index_k)
        results.append(flexmsa.decode(inputs.q, each, inputs.index_q, block_size=8, topk=2))
    assert torch.equal(*results)
    assert_refused(cache, lambda: append(cache, 5), "page_table")
    with pytest.raises(ValueError, match="assigns its own pages"):
        cache.reserve(8)


def test_a_misused_cache_says_so():
    cache = paged()
    new = append(cache, 9)
    decode = {"block_size": 8, "topk": 2}
    for match, call in {
        "block_size: expected the page size of the cache, 8, got 16": lambda: flexmsa.decode(
            new.q, cache, new.index_q, block_size=16, topk=2
        ),
        "index_q: expected a tensor": lambda: flexmsa.decode(new.q, cache, None, **decode),
        "index_q: expected": lambda: flexmsa.decode(new.q, cache, new.index_q[:, :1], **decode),
        "q: expected": lambda: flexmsa.decode(new.q[:1], cache, new.index_q[:1], **decode),
        "the dtype of the cache's keys": lambda: flexmsa.decode(new.q.half(), cache, new.index_q, **decode),
        "block_indices: expected": lambda: flexmsa.decode(
            new.q, cache, None, **decode, block_indices=torch.zeros(2, 2, 4, 1)
        ),
        "lens: expected": lambda: cache.append(new.k, new.v, new.index_k, lens=lengths(1)),
        "counts: expected": lambda: cache.trim(-1),
        "rows: expected": lambda: cache.reorder(lengths(0, 1, 0)),
        "tokens: expected": lambda: cache.share(0, [1], 10),
        "rows: expected distinct": lambda: cache.share(0, [0], 3),
        "cache: expected": lambda: flexmsa.decode(new.q, (new.k, new.v), new.index_q),
        "capacity: expected": lambda: MSACache(*SIZES, capacity=0),
        "max_pages: expected": lambda: paged(max_pages=0),
    }.items():
        with pytest.raises((ValueError, TypeError), match=match):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_e4m3_keeps_what_it_can(dtype):
    """Every stored number is within half a step of e4m3 of the number given, at the scale of its token."""
    cache = MSACache(*SIZES, capacity=20, dtype=FP8)
    new = make_inputs(20, batch=2, dtype=dtype)
    cache.append(new.k, new.v, new.index_k)
    for found, written in zip(cache.contiguous(), (new.k, new.v, new.index_k), strict=True):
        largest = written.float().abs().amax(-1, keepdim=True)
        error = (found - written.float()).abs()
        assert (error <= written.float().abs() * 2**-4 + largest * 2**-17).all()


def test_a_compiled_append_leaves_a_full_cache_alone():
    cache = MSACache(*SIZES, capacity=6)
    new = make_inputs(4, batch=2)
    step = torch.compile(lambda: cache.append(new.k, new.v, new.index_k), fullgraph=True, backend="aot_eager")
    step()
    assert_refused(cache, step, r"(2|4) more tokens")
    cache.check()


def test_no_tensor_of_all_scores():
    """A step over a long cache takes memory for its blocks, not for its keys."""

    def largest_of(keys):
        cache = MSACache(1, 1, 8, 16, capacity=keys)
        cache.append(torch.randn(1, 1, keys, 8), torch.randn(1, 1, keys, 8), torch.randn(1, 1, keys, 16))
        q, index_q = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 1, 16)
        with torch.profiler.profile(profile_memory=True) as profile:
            flexmsa.decode(q, cache, index_q, block_size=128, topk=4)
        return max(event.self_cpu_memory_usage for event in profile.events())

    # A score in float32 for every key would be 4 MiB.
    assert largest_of(1 << 20) - largest_of(1 << 16) < 2 << 20
