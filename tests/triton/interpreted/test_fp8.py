"""Selection and attention from e4m3 caches against the definition on what the caches stand for."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from helpers import dense_attention, dense_selection, least_scale

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.fp8 import decode_e4m3, split_e4m3
from flexmsa.kernels.triton.selection.launch import choose_config
from flexmsa.testing import assert_close

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
BATCH, GROUPS, GROUP_SIZE, DEPTH, SEQLEN = 2, 2, 3, 16, 96


def quantized(heads, dtype=torch.float32):
    """(stored, scale, the same numbers in dtype) of random vectors, one token's larger, one's zero."""
    x = torch.randn(BATCH, heads, SEQLEN, DEPTH)
    x[:, :, 5] *= 8
    x[:, :, 7] = 0
    scale = least_scale(x)
    stored = (x / scale[..., None]).to(E4M3)
    return stored, scale.to(E8M0).view(torch.uint8), (stored.float() * scale[..., None]).to(dtype)


def paged(block_size, *caches):
    """(page_table, caches cut into shuffled pages)."""
    blocks = SEQLEN // block_size
    table = torch.randperm(BATCH * blocks).view(BATCH, blocks).int()
    pages = []
    for x in caches:
        cut = x.view(torch.uint8).unflatten(2, (blocks, block_size)).movedim(2, 1)
        page = torch.empty_like(cut.flatten(0, 1)).contiguous()
        page[table.flatten().long()] = cut.flatten(0, 1)
        pages.append(page.view(x.dtype))
    return table, pages


def sequences_of(seqlen_q, kv_lens=(96, 71)):
    return torch.tensor([[b, 0, seqlen_q, 0, length] for b, length in enumerate(kv_lens)], dtype=torch.int32)


@pytest.mark.parametrize("seqlen_q", [1, 7, 40])
@pytest.mark.parametrize("block_size", [16, 12])
def test_selection(seqlen_q, block_size):
    stored, scale, _ = quantized(1)
    index_q = torch.randn(BATCH, GROUPS, seqlen_q, DEPTH)
    sequences = sequences_of(seqlen_q)
    rules = sequences, SelectionRule(block_size, 3)
    exact = stored.double() * scale.view(E8M0).float()[..., None]
    wanted = dense_selection(index_q.double(), exact, *rules)
    config = choose_config(index_q, stored, sequences, SelectionRule(block_size, 3))
    for splits, clear in ((1, False), (3, True)):
        variant = replace(config, num_splits=splits, clear=clear)
        assert torch.equal(kernels.select_blocks(index_q, stored, *rules, None, scale, config=variant), wanted)
    table, (pages, page_scale) = paged(block_size, stored, scale)
    assert torch.equal(kernels.select_blocks(index_q, pages, *rules, table, page_scale), wanted)


@pytest.mark.parametrize("is_paged", [False, True])
def test_selection_by_parts_of_blocks(is_paged):
    stored, scale, _ = quantized(1)
    index_q = torch.randn(BATCH, GROUPS, 7, DEPTH)
    rules = sequences_of(7), SelectionRule(24, 2)
    wanted = dense_selection(index_q.double(), stored.double() * scale.view(E8M0).float()[..., None], *rules)
    table = None
    if is_paged:
        table, (stored, scale) = paged(24, stored, scale)
    config = replace(choose_config(index_q, stored, *rules, table, scale), columns=16)
    assert torch.equal(kernels.select_blocks(index_q, stored, *rules, table, scale, config=config), wanted)


@pytest.mark.parametrize("as_they_are", [False, True])
@pytest.mark.parametrize("halves", [False, True])
def test_selection_by_e4m3_queries(as_they_are, halves):
    """Without scales, and with e4m3's own NaN among the keys, which an interpreted product takes for 480."""
    index_q, index_k = torch.randn(BATCH, GROUPS, 40, DEPTH).to(E4M3), torch.randn(BATCH, 1, SEQLEN, DEPTH).to(E4M3)
    if not as_they_are:
        index_k.view(torch.uint8)[:, :, 30] = 0x7F
    rules = sequences_of(40), SelectionRule(16, 3)
    wanted = dense_selection(index_q.double(), index_k.double(), *rules)
    config = replace(
        choose_config(index_q, index_k, *rules), fp8_product=as_they_are, halves=halves, clear=True, period=1
    )
    assert torch.equal(kernels.select_blocks(index_q, index_k, *rules, config=config), wanted)


def test_keys_that_are_not_finite_score_as_nothing():
    """A scale that is NaN makes its key NaN, whatever is stored: of no use to its block."""
    stored, scale, keys = quantized(1)
    for token in ((0, 0, 40), (0, 0, slice(64, 80)), (1, 0, 3)):
        scale[token], keys[token] = 255, torch.nan
    index_q = torch.randn(BATCH, GROUPS, 4, DEPTH)
    rules = sequences_of(4), SelectionRule(16, 3)
    assert torch.equal(
        kernels.select_blocks(index_q, stored, *rules, None, scale), dense_selection(index_q, keys, *rules)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seqlen_q", [1, 7, 40])
def test_attention(seqlen_q, dtype):
    (k, k_scale, k_values), (v, v_scale, v_values) = quantized(GROUPS, dtype), quantized(GROUPS, dtype)
    q = torch.randn(BATCH, GROUPS * GROUP_SIZE, seqlen_q, DEPTH).to(dtype)
    sequences = sequences_of(seqlen_q)
    table, (k_pages, v_pages, *scales) = paged(16, k, v, k_scale, v_scale)
    for topk in (3, None):
        ids = torch.randint(-1, 6, (BATCH, GROUPS, seqlen_q, topk)).sort().values if topk else None
        both = [x.double() * s.view(E8M0).float()[..., None] for x, s in ((k, k_scale), (v, v_scale))]
        exact = dense_attention(q, *both, ids, sequences, 16, 0.3)
        rounded = dense_attention(q, k_values, v_values, ids, sequences, 16, 0.3)
        arguments = ids, sequences, 16, 0.3
        out, lse = kernels.attend_blocks(q, k, v, *arguments, None, k_scale, v_scale)
        assert_close("out", out, exact[0], rounded[0].to(dtype))
        assert_close("lse", lse, exact[1], rounded[1].float())
        pages = kernels.attend_blocks(q, k_pages, v_pages, *arguments, table, *scales)
        assert torch.equal(pages[0], out) and torch.equal(pages[1], lse)


@triton.jit
def split_kernel(x_ptr, out_ptr, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    both = decode_e4m3(split_e4m3(tl.load(x_ptr + place)).to(tl.uint8, bitcast=True), tl.float32, False)
    row = tl.arange(0, 2 * ROWS)[:, None] * DEPTH + tl.arange(0, DEPTH)[None, :]
    tl.store(out_ptr + row, both)


def test_queries_as_two_e4m3_numbers():
    """Every bf16 number down to 2^-13 of the largest is kept whole, a smaller one to 2^-21 of it."""
    x = (torch.randn(16, 32) * torch.exp2(torch.randint(-40, 40, (16, 1)))).bfloat16().float()
    x[3] = 0
    x[5] *= torch.exp2(-torch.arange(32.0))
    found = torch.empty(32, 32)
    split_kernel[(1,)](x, found, 16, 32)
    found = found[0::2] + found[1::2] / 16
    largest = x.abs().amax(1, keepdim=True)
    factor = found.abs().amax(1, keepdim=True) / largest.clamp(min=1e-30)
    assert (factor.log2() % 1 == 0)[factor > 0].all()
    error = (found - x * factor).abs() / (largest * factor).clamp(min=1e-30)
    assert error.max() <= 2**-21
    assert (error == 0)[x.abs() >= 2**-13 * largest].all()
