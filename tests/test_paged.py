"""The functions for engines: ragged steps over pages, writing by slots, and what they refuse."""

from dataclasses import replace

import pytest
import torch
from helpers import lengths
from hypothesis import given, settings
from paged_cases import CASES

import flexmsa
from flexmsa import PagedBatch, PagePools, ops
from flexmsa.kernels import torch as torch_kernels
from flexmsa.testing import PagedStep, check_paged_step, strategies


@pytest.mark.parametrize("own_out", [False, True])
@pytest.mark.parametrize("step", CASES.values(), ids=CASES)
def test_a_step_is_each_sequence_on_its_own(step, own_out):
    check_paged_step(replace(step, own_out=own_out), backend="torch")


@given(strategies.paged_steps(dtypes=("float32", "bfloat16")))
@settings(max_examples=25, deadline=None)
def test_any_step(step):
    check_paged_step(step, backend="torch")


BROKEN = {
    "write_pages": lambda k, v, index_k, slots, *rest: (k, v, index_k, slots.where(slots != 20, 21), *rest),
    "select_blocks": lambda index_q, index_k, *rest: (-index_q, index_k, *rest),
    "select_and_attend": lambda q, *rest: (q * 1.001, *rest),
    "attend_blocks": lambda q, *rest: (q * 1.001, *rest),
}


@pytest.mark.parametrize(("kernel", "change"), BROKEN.items(), ids=BROKEN)
def test_a_broken_kernel_is_found(kernel, change, monkeypatch):
    works = getattr(torch_kernels, kernel)
    monkeypatch.setattr(torch_kernels, kernel, lambda *arguments: works(*change(*arguments)))
    with pytest.raises(AssertionError, match=r"expected|got|differ"):
        for step in CASES.values():
            check_paged_step(step, backend="torch")


def test_a_table_is_written_in_place():
    page_table = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    lens, offsets = torch.tensor([20, 7], dtype=torch.int32), torch.tensor([0, 1, 4], dtype=torch.int32)
    sizes = {"num_tokens": 6, "num_decodes": 1, "page_size": 16}
    first = PagedBatch(page_table, lens, offsets, **sizes)
    later = torch.tensor([21, 9], dtype=torch.int32)
    again = PagedBatch(page_table, later, torch.tensor([0, 1, 5], dtype=torch.int32), **sizes, table=first.table)
    assert again.table is first.table
    # The table of what does not decode begins at a multiple of 16 bytes.
    assert first.table[:1].tolist() == [[0, 0, 1, 0, 21]]
    assert first.table[4:].tolist() == [[0, 0, 4, 32, 41], [0, 4, 5, 0, 0]]


def test_values_out_of_range_raise():
    table, lens = torch.zeros(2, 3, dtype=torch.int32), torch.tensor([20, 7], dtype=torch.int32)
    sizes = {"num_tokens": 4, "page_size": 16}
    offsets = torch.tensor([0, 1, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="kv_lens: expected 0 to 48, got 49"):
        PagedBatch(table, torch.tensor([49, 7], dtype=torch.int32), offsets, **sizes)
    with pytest.raises(ValueError, match="cu_seqlens_q: expected rising offsets"):
        PagedBatch(table, lens, torch.tensor([0, 3, 2], dtype=torch.int32), **sizes)
    with pytest.raises(ValueError, match="num_decodes: expected one token in each of the first 2 sequences"):
        PagedBatch(table, lens, offsets, num_decodes=2, **sizes)
    pools, batch = PagedStep().new_pools(2), PagedBatch(table + 5, lens, offsets, **sizes)
    with pytest.raises(ValueError, match="page_table: expected a page from 0 to 1"):
        flexmsa.attend_pages(torch.zeros(4, 6, 16), torch.zeros(4, 2, 16), pools, batch)


@pytest.mark.parametrize("row", [2, 5])
@pytest.mark.parametrize("call", ["select", "attend", "attend alone"])
def test_a_missing_page_is_named_by_the_row_of_the_batch(call, row):
    """Also in the second part of a mixed batch, which has a page table of its own."""
    table, lens = torch.zeros(6, 3, dtype=torch.int32), torch.full((6,), 40, dtype=torch.int32)
    table[row, 1] = 9
    offsets = torch.tensor([0, 1, 2, 3, 4, 5, 8], dtype=torch.int32)
    batch = PagedBatch(table, lens, offsets, num_tokens=8, num_decodes=5, page_size=16)
    q, index_q, pools = torch.zeros(8, 6, 16), torch.zeros(8, 2, 16), PagedStep().new_pools(2)
    with pytest.raises(ValueError, match=f"expected a page from 0 to 1 for block 1 of row {row}, got 9"):
        if call == "select":
            flexmsa.select_pages(index_q, pools, batch, topk=2)
        else:
            flexmsa.attend_pages(q, index_q, pools, batch, topk=2 if call == "attend" else None)


BATCH = {
    "page_table": torch.zeros(2, 3, dtype=torch.int32),
    "kv_lens": torch.ones(2, dtype=torch.int32),
    "cu_seqlens_q": torch.tensor([0, 1, 4], dtype=torch.int32),
    "num_tokens": 4,
}
WRONG_BATCHES = [
    ({"page_table": torch.zeros(2, 3)}, "page_table: expected int32"),
    ({"page_table": torch.zeros(2, 3, dtype=torch.int64)}, r"page_table: expected int32 \[R, max_pages\]"),
    ({"page_table": torch.zeros(3, 2, dtype=torch.int32).T}, "page_table: expected dense rows"),
    ({"page_table": torch.zeros(1, 3, dtype=torch.int32).expand(2, 3)}, "page_table: expected dense rows"),
    ({"kv_lens": torch.ones(3, dtype=torch.int32)}, "kv_lens: expected"),
    ({"cu_seqlens_q": torch.zeros(2, dtype=torch.int32)}, "cu_seqlens_q: expected"),
    ({"cu_seqlens_q": None, "num_tokens": 3}, "num_tokens: expected a multiple of 2 sequences"),
    ({"num_tokens": 0}, "num_tokens: expected an int >= 1"),
    ({"num_decodes": 3}, "num_decodes: expected cu_seqlens_q, and at most its 2 sequences"),
    ({"page_table": torch.empty(2, 2**23, dtype=torch.int32)}, "pass a narrower table"),
    ({"table": torch.zeros(2, 5, dtype=torch.int32)}, r"table: expected contiguous int32 \[6, 5\] on cpu"),
    ({"table": [0]}, "table: expected that of an earlier batch, got list"),
    ({"kv_lens": [1, 1]}, "kv_lens: expected a tensor, got list"),
    ({"cu_seqlens_q": torch.tensor([0, 1, 5], dtype=torch.int32)}, "expected offsets from 0 to at most 4, got 0 to 5"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_BATCHES, ids=[message for _, message in WRONG_BATCHES])
def test_wrong_batches_raise(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PagedBatch(**{**BATCH, **change})


def fitting(**change):
    """Arguments of a call of four tokens, with changes."""
    pools = PagedStep(block_size=128).new_pools(4)
    given = {"q": torch.zeros(4, 6, 16), "index_q": torch.zeros(4, 2, 16), "pools": pools, "batch": PagedBatch(**BATCH)}
    return given | change


WRONG_CALLS = [
    ({"q": torch.zeros(3, 6, 16)}, r"q: expected \[T=4, H=a multiple of 2, D=16\]"),
    ({"q": torch.zeros(4, 5, 16)}, "q: expected"),
    ({"q": torch.zeros(4, 6, 16).half()}, "q: expected torch.float32"),
    ({"index_q": torch.zeros(4, 3, 16)}, r"index_q: expected \[T=4, H=2, D=16\]"),
    ({"index_q": None}, "index_q: expected a tensor to select with"),
    ({"topk": 0}, "topk: expected"),
    ({"out": torch.zeros(4, 6, 16).half()}, "out: expected torch.float32"),
    ({"out": torch.zeros(4, 16, 6).transpose(1, 2)}, "with a dense last dimension"),
    ({"out": torch.zeros(4, 1, 16).expand(4, 6, 16)}, "out: expected memory of its own for each number"),
    ({"out": torch.zeros(4, 6, 16, requires_grad=True)}, "out: expected no gradient"),
    ({"block_indices_out": torch.zeros(1, 2, 16).int().expand(4, 2, 16)}, "block_indices_out: expected memory"),
    ({"block_indices": torch.zeros(4, 1, 3, dtype=torch.int32)}, "block_indices: expected"),
    ({"batch": PagedBatch(**BATCH, page_size=64)}, "batch: expected page_size=128"),
    ({"pools": None}, "pools: expected a PagePools, got NoneType"),
    ({"scale": "x"}, "scale: expected"),
    ({"block_indices": [1]}, "block_indices: expected a tensor"),
    ({"block_indices_out": torch.zeros(4, 2, 9, dtype=torch.int32)}, r"block_indices_out: expected .*\[4, 2, 16\]"),
    ({"block_indices_out": torch.zeros(4, 2, 16)}, "block_indices_out: expected torch.int32"),
    ({"block_indices_out": 1, "topk": None}, "block_indices_out: expected None where nothing is selected"),
    ({"backend": "reference"}, "has no kernel for paged"),
    ({"return_aux": flexmsa.AuxRequest(index_loss=True)}, "return_aux: expected lse or block_indices"),
    ({"q": torch.zeros(4, 6, 16, requires_grad=True)}, "q: expected no gradient"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_CALLS, ids=[message for _, message in WRONG_CALLS])
def test_wrong_calls_raise(change, message):
    with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError), match=message):
        flexmsa.attend_pages(**fitting(**change))


def test_wrong_pools_raise():
    k, index_k = torch.zeros(3, 2, 16, 8), torch.zeros(3, 1, 16, 8)
    with pytest.raises(ValueError, match="expected a dense last dimension"):
        PagePools(k.transpose(2, 3).contiguous().transpose(2, 3), k, index_k)
    with pytest.raises(ValueError, match="k_scale: expected a positive float, for an e4m3 pool"):
        PagePools(k, k, index_k, k_scale=2.0)
    stored = k.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="in both or in neither"):
        PagePools(stored, stored, index_k, k_scale=torch.zeros(3, 2, 16, dtype=torch.uint8))


def test_operators_are_sound():
    step = PagedStep((1, 3), (20, 33))
    pools = step.new_pools(8)
    for x in (pools.k, pools.v, pools.index_k):
        x.normal_()
    batch = PagedBatch(
        torch.arange(8, dtype=torch.int32).view(2, 4),
        torch.tensor(step.kv_lens, dtype=torch.int32),
        torch.tensor([0, 1, 4], dtype=torch.int32),
        num_tokens=4,
        page_size=16,
    )
    new = [torch.randn(1, heads, 4, 16) for heads in (2, 2, 1)]
    stored = pools.k.clone(), pools.v.clone(), pools.index_k.clone()
    tests = ("test_schema", "test_faketensor")
    slots, factors = torch.tensor([3, -1, 20, 200]), (1.0, 1.0, 1.0)
    torch.library.opcheck(
        ops.write_pages, (*new, slots, *stored, None, None, None, *factors, "torch"), test_utils=tests
    )
    table = batch.table[:3], torch.arange(8, dtype=torch.int32).view(2, 4)
    q, index_q, ids = torch.randn(1, 6, 4, 16), torch.randn(1, 2, 4, 16), torch.zeros(1, 2, 4, 2, dtype=torch.int32)
    selected = index_q, stored[2], *table, None, ids, 1, 0, "torch"
    torch.library.opcheck(ops.select_pages, selected, test_utils=tests)
    written, pages = (torch.empty_like(q), ids), (table[1], None, None)
    attended = q, *stored[:2], ids, table[0], 16, 0.25, "torch", *pages, written[0]
    torch.library.opcheck(ops.attend_blocks, attended, test_utils=tests)
    attended = q, index_q, *stored, table[0], 16, 1, 0, 0.25, "torch", *pages, None, *written
    torch.library.opcheck(ops.select_and_attend, attended, test_utils=tests)


def test_compiles():
    step = PagedStep((1, 1), (20, 33), uniform=True)
    pools = step.new_pools(8)
    for x in (pools.k, pools.v, pools.index_k):
        x.normal_()
    sizes = {"num_tokens": 2, "page_size": 16}
    batch = PagedBatch(torch.arange(8).int().view(2, 4), torch.tensor([20, 33]).int(), **sizes)
    q, index_q = torch.randn(2, 6, 16), torch.randn(2, 2, 16)

    def attend(q, index_q):
        return flexmsa.attend_pages(q * 2, index_q, pools, batch, topk=2)

    with torch.no_grad():
        assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(q, index_q), attend(q, index_q))


@pytest.mark.parametrize("bad", [torch.nan, -torch.nan])
@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("seqlen_q", [1, 20])
def test_nan_in_e4m3_pages_without_scales_of_tokens(seqlen_q, scale, bad):
    """An index key that is NaN has the lowest score; a key or a value that is NaN gives NaN."""
    stored = [torch.zeros(8, 1, 4, depth, dtype=torch.float8_e4m3fn) for depth in (16, 16, 8)]
    pools, q = PagePools(*stored, k_scale=scale, v_scale=scale, index_k_scale=scale), torch.randn(seqlen_q, 2, 16)
    index_k, table = torch.ones(24, 1, 8), torch.arange(6, dtype=torch.int32)[None]
    index_k[2], index_k[5], index_k[9] = 2.0, bad, 3.0
    batch = PagedBatch(table, lengths(24), num_tokens=seqlen_q, page_size=4)
    k, v = torch.randn(2, 24, 1, 16)
    for spoiled in (None, k, v):
        if spoiled is not None:
            spoiled[17, 0, 3] = bad
        flexmsa.write_pages(k, v, index_k, pools, torch.arange(24))
        ids = flexmsa.select_pages(torch.ones(seqlen_q, 1, 8), pools, batch, topk=3)
        assert ids[-1].tolist() == [[0, 2, 5]]
        chosen = flexmsa.attend_pages(q, None, pools, batch, block_indices=lengths(0, 4, 5).expand(seqlen_q, 1, 3))
        for out in (chosen, flexmsa.attend_pages(q, None, pools, batch, topk=None)):
            assert out[-1].isnan().any() == (spoiled is not None)
