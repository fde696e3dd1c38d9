"""Index keys in int8: what is stored, and the selection, against `int8_oracle`, bit for bit."""

from dataclasses import replace

import int8_oracle
import pytest
import torch
import triton
import triton.language as tl
from helpers import ragged

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.int8 import quantize_int8
from flexmsa.kernels.triton.selection.launch import choose_config, scored_blocks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BATCH, GROUPS, SEQLEN = 2, 3, 96


@triton.jit
def quantize_kernel(x_ptr, numbers_ptr, scale_ptr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    row = tl.arange(0, ROWS)
    place = row[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    numbers, scale = quantize_int8(tl.load(x_ptr + place))
    tl.store(numbers_ptr + place, numbers)
    tl.store(scale_ptr + row, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_stored_bits(dtype):
    x = int8_oracle.wild(64, 16).to(dtype)
    numbers, scale = torch.empty(64, 16, dtype=torch.int8), torch.empty(64)
    quantize_kernel[(1,)](x, numbers, scale, ROWS=64, DEPTH=16)
    wanted = int8_oracle.quantised(x)
    assert torch.equal(numbers, wanted[0])
    torch.testing.assert_close(scale, wanted[1], rtol=0, atol=0, equal_nan=True)


def stored(depth=16):
    """(numbers, scale) of keys of which some repeat, and some are not finite, large or zero."""
    x = torch.randn(BATCH, 1, SEQLEN, depth)
    x[0, 0, 20:40] = x[0, 0, :20]
    x[1, 0, :12] = int8_oracle.wild(12, depth)
    x[0, 0, 48:64] = torch.nan
    return int8_oracle.quantised(x)


def paged(block_size, *caches):
    """(page_table, caches cut into shuffled pages)."""
    blocks = SEQLEN // block_size
    table = torch.randperm(BATCH * blocks).view(BATCH, blocks).int()
    pages = []
    for x in caches:
        page = torch.empty(BATCH * blocks, 1, block_size, *x.shape[3:], dtype=x.dtype)
        page[table.flatten().long()] = x.unflatten(2, (blocks, block_size)).movedim(2, 1).flatten(0, 1)
        pages.append(page)
    return table, *pages


def sequences_of(seqlen_q):
    return ragged([seqlen_q, max(1, seqlen_q - 3)], [96, 71], seqlen_q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seqlen_q", [1, 7, 40])
@pytest.mark.parametrize("block_size", [16, 12])
def test_selection(seqlen_q, block_size, dtype):
    numbers, scale = stored()
    index_q = torch.randn(BATCH, GROUPS, seqlen_q, 16).to(dtype)
    index_q[0, 1, 0], index_q[1, 0, 0, 2] = 0, torch.nan
    rules = sequences_of(seqlen_q), SelectionRule(block_size, 3)
    wanted = int8_oracle.selection(index_q, numbers, scale, *rules)
    config = choose_config(index_q, numbers, *rules, None, scale)
    assert config.int8
    for changes in ({"num_splits": 1}, {"num_splits": 3}, {"swap": True}, {"clear": True, "period": 1}):
        variant = replace(config, **changes)
        assert torch.equal(kernels.select_blocks(index_q, numbers, *rules, None, scale, config=variant), wanted)
    table, pages, page_scale = paged(block_size, numbers, scale)
    assert torch.equal(kernels.select_blocks(index_q, pages, *rules, table, page_scale), wanted)


@pytest.mark.parametrize("depth", [16, 40, 64])
def test_halves_of_a_tile(depth):
    """As Hopper takes chunks of prompts."""
    (numbers, scale), index_q = stored(depth), torch.randn(BATCH, 2, 40, depth)
    rules = sequences_of(40), SelectionRule(16, 3)
    config = choose_config(index_q, numbers, *rules, None, scale)
    config = replace(config, rows=64, halves=True, clear=True, period=1)
    ids = kernels.select_blocks(index_q, numbers, *rules, None, scale, config=config)
    assert torch.equal(ids, int8_oracle.selection(index_q, numbers, scale, *rules))


def test_scored_blocks():
    """Scores are without the query's scale."""
    (numbers, scale), index_q = stored(), torch.randn(BATCH, GROUPS, 2, 16)
    table, pages, page_scale = paged(16, numbers, scale)
    sequences = torch.tensor([[0, 0, 2, 0, 90], [1, 0, 2, 0, 20]], dtype=torch.int32)
    ids, scores = scored_blocks(index_q, pages, sequences, SelectionRule(16, 4, 0), table, page_scale)
    queries, _ = int8_oracle.quantised(index_q)
    for group in range(GROUPS):
        wanted = int8_oracle.block_scores(queries[0, group, 1], numbers[0, 0, :90], scale[0, 0, :90], 16)
        best = wanted.sort(descending=True, stable=True)
        assert torch.equal(ids[0, group, 1].long(), best.indices[:4])
        assert torch.equal(scores[0, group, 1], best.values[:4])
