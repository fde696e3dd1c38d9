"""Selection and attention from pages against the same from a contiguous cache, bit for bit, and the definition."""

from dataclasses import replace

import pytest
import torch
from helpers import dense_attention, dense_selection, ragged

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.launch import Launch
from flexmsa.kernels.triton.selection.launch import choose_config
from flexmsa.kernels.triton.serving.config import default_config
from flexmsa.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GROUPS, GROUP_SIZE, DEPTH = 2, 3, 16
NAN = float("nan")


def caches(kv_lens, block_size, dtype=torch.float32, spare=3):
    """The same keys contiguous and in shuffled pages: NaN in what no row owns, garbage in the table's tail."""
    batch, blocks = len(kv_lens), -(-max(kv_lens) // block_size) + 2
    shapes = [(GROUPS, DEPTH), (GROUPS, DEPTH), (1, DEPTH)]
    flat = [torch.full((batch, heads, blocks * block_size, depth), NAN).to(dtype) for heads, depth in shapes]
    pages = [torch.full((batch * blocks + spare, heads, block_size, depth), NAN).to(dtype) for heads, depth in shapes]
    table = torch.randint(-(2**31), 2**31 - 1, (batch, blocks), dtype=torch.int64).int()
    free = iter(torch.randperm(batch * blocks + spare).tolist())
    for b, length in enumerate(kv_lens):
        for x in flat:
            x[b, :, :length] = torch.randn(x.shape[1], length, x.shape[3])
        for block in range(-(-length // block_size)):
            table[b, block] = next(free)
            for x, y in zip(flat, pages, strict=True):
                y[table[b, block]] = x[b, :, block * block_size : (block + 1) * block_size]
    return flat, pages, table


def queries(batch, seqlen_q, dtype=torch.float32):
    return (torch.randn(batch, heads, seqlen_q, DEPTH).to(dtype) for heads in (GROUPS * GROUP_SIZE, GROUPS))


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


CASES = {
    # name: (Sq, kv_lens, block_size, topk, dtype)
    "one token": (1, [1, 100, 0, 64], 16, 3, torch.float32),
    "drafts, odd block": (5, [40, 3], 5, 4, torch.float32),
    "drafts, padded block": (16, [100, 150], 48, 2, torch.float16),
    "chunk": (20, [45, 100, 7], 16, 2, torch.float32),
    "chunk, padded block": (17, [60, 17], 12, 3, torch.float32),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_like_contiguous_and_the_definition(case):
    seqlen_q, kv_lens, block_size, topk, dtype = case
    flat, pages, table = caches(kv_lens, block_size, dtype)
    q, index_q = queries(len(kv_lens), seqlen_q, dtype)
    sequences = ragged([seqlen_q] * len(kv_lens), kv_lens, seqlen_q)
    rules = sequences, SelectionRule(block_size, topk)
    config = choose_config(index_q, pages[2], sequences, SelectionRule(block_size, topk), table)
    expected = kernels.select_blocks(index_q, flat[2], *rules)
    assert torch.equal(expected, dense_selection(index_q, flat[2], *rules))
    for splits in (1, 3):
        variant = replace(config, num_splits=splits)
        assert torch.equal(kernels.select_blocks(index_q, pages[2], *rules, table, config=variant), expected)
    for ids in (expected, None):
        out, lse = kernels.attend_blocks(q, *flat[:2], ids, sequences, block_size, 0.3)
        assert_same(kernels.attend_blocks(q, *pages[:2], ids, sequences, block_size, 0.3, table), (out, lse))
        exact = dense_attention(q, *(x.nan_to_num() for x in flat[:2]), ids, sequences, block_size, 0.3)
        assert_close("out", out, exact[0], exact[0].to(dtype))
        assert_close("lse", lse, exact[1], exact[1].float())


@pytest.mark.parametrize("seqlen_q", [4, 20])
def test_rows_with_different_numbers_of_queries(seqlen_q):
    """Row b has its first lens[b] queries; the others, and those of empty rows, see nothing."""
    kv_lens, lens = [50, 21, 0, 9], [seqlen_q, 2, 0, 0]
    flat, pages, table = caches(kv_lens, 8)
    q, index_q = queries(4, seqlen_q)
    sequences = ragged(lens, kv_lens, seqlen_q)
    ids = kernels.select_blocks(index_q, pages[2], sequences, SelectionRule(8, 3), table)
    assert torch.equal(ids, dense_selection(index_q, flat[2], sequences, SelectionRule(8, 3)))
    for choice in (ids, None):
        out, lse = kernels.attend_blocks(q, *pages[:2], choice, sequences, 8, 0.3, table)
        for b, count in enumerate(lens):
            assert (ids[b, :, count:] == -1).all()
            assert (out[b, :, count:] == 0).all() and (lse[b, :, count:] == -torch.inf).all()
        exact = dense_attention(q, *(x.nan_to_num() for x in flat[:2]), choice, sequences, 8, 0.3)
        assert_close("out", out, exact[0], exact[0].float())
        assert_close("lse", lse, exact[1], exact[1].float())


@pytest.mark.parametrize("seqlen_q", [3, 20])
def test_ids_that_are_no_visible_block(seqlen_q):
    _, pages, table = caches([70, 44], 16)
    q, index_q = queries(2, seqlen_q)
    sequences = torch.tensor([[0, 0, seqlen_q, 0, 70], [1, 0, seqlen_q, 0, 44]], dtype=torch.int32)
    ids = kernels.select_blocks(index_q, pages[2], sequences, SelectionRule(16, 2), table)
    garbage = torch.tensor([-1, 99, 2**31 - 1, -(2**31)], dtype=torch.int32).expand(*ids.shape[:3], 4)
    expected = kernels.attend_blocks(q, *pages[:2], ids, sequences, 16, 0.3, table)
    for kind in (torch.int32, torch.int64):
        padded = torch.cat([ids, garbage, ids[..., :1]], 3).to(kind)
        found = kernels.attend_blocks(q, *pages[:2], padded, sequences, 16, 0.3, table)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y)


def test_page_ids_out_of_range_are_pulled_into_it():
    _, pages, table = caches([70, 44], 16)
    pages = [x.nan_to_num() for x in pages]
    q, index_q = queries(2, 3)
    sequences = torch.tensor([[0, 0, 3, 0, 70], [1, 0, 3, 0, 44]], dtype=torch.int32)
    table[0, 1], table[1, 0] = -5, 2**31 - 1
    pulled = table.clamp(0, pages[0].shape[0] - 1)
    ids = [kernels.select_blocks(index_q, pages[2], sequences, SelectionRule(16, 2), x) for x in (table, pulled)]
    assert torch.equal(*ids)
    found = [kernels.attend_blocks(q, *pages[:2], ids[0], sequences, 16, 0.3, x) for x in (table, pulled)]
    assert_same(*found)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
def test_few_blocks_are_not_scored(paged):
    """A row with at most topk visible blocks takes them all: nothing of its index keys is read."""
    flat, pages, table = caches([33, 64, 1], 16)
    _, index_q = queries(3, 2)
    sequences = torch.tensor([[b, 0, 2, 0, n] for b, n in enumerate([33, 64, 1])], dtype=torch.int32)
    keys = torch.full_like(pages[2] if paged else flat[2], NAN)
    ids = kernels.select_blocks(index_q, keys, sequences, SelectionRule(16, 4), table if paged else None)
    assert ids[0].tolist() == [[[0, 1, -1, -1], [0, 1, 2, -1]]] * 2
    assert ids[1].tolist() == [[[0, 1, 2, 3]] * 2] * 2
    assert ids[2].tolist() == [[[-1] * 4, [0, -1, -1, -1]]] * 2


@pytest.mark.parametrize("splits", [1, 2])
def test_launches_of_a_step(monkeypatch, splits):
    """Append, select and attend are a launch each, and combine where the chosen blocks are split between programs."""
    launched, run = [], Launch.run

    def noting(launch):
        launched.append(launch.kernel.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", noting)
    _, pages, table = caches([40, 40], 8)
    q, index_q = queries(2, 2)
    new = [torch.randn(2, heads, 2, DEPTH) for heads in (GROUPS, GROUPS, 1)]
    kv_lens = torch.tensor([38, 38], dtype=torch.int32)
    sequences = torch.empty(4, 5, dtype=torch.int32)
    lens, status = torch.tensor([2, 1], dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    kernels.append(*new, lens, *pages, None, None, None, table, 0 * kv_lens, kv_lens, sequences, status)
    choices = {"selection.launch.choose_config": choose_config, "serving.launch.default_config": default_config}
    for place, choose in choices.items():
        monkeypatch.setattr(
            f"flexmsa.kernels.triton.{place}", lambda *a, c=choose, **k: replace(c(*a, **k), num_splits=splits)
        )
    kernels.select_and_attend(q, index_q, *pages, sequences, SelectionRule(8, 2), 0.3, table)
    assert len(launched) == (3 if splits == 1 else 4), launched
