"""Selection against the dense definition, ids compared exactly: integer inputs make ties real."""

from dataclasses import replace

import pytest
import torch
from helpers import dense_selection, plain

import flexmsa
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.target import padded
from flexmsa.kernels.triton.selection.launch import choose_config, select_blocks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def integers(*shape, dtype=torch.float32):
    return torch.randint(-2, 3, shape).to(dtype)


def check(index_q, index_k, block_size, topk, local=1, init=0, sequences=None, **overrides):
    if sequences is None:
        sequences = plain(index_q.shape[0], index_q.shape[2], index_k.shape[2])
    config = choose_config(index_q, index_k, sequences, SelectionRule(block_size, topk))
    # Blocks whole, as 16 bits have them, which the interpreter does not multiply.
    config = replace(config, **{"columns": padded(block_size), **overrides})
    found = select_blocks(index_q, index_k, sequences, SelectionRule(block_size, topk, local, init), config=config)
    wanted = dense_selection(index_q, index_k, sequences, SelectionRule(block_size, topk, local, init))
    assert found.dtype == torch.int32 and found.is_contiguous()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    return found


SHAPES = {
    # name: (B, Hkv, Sq, Sk, Di, block_size, topk, local, init, splits, dtype)
    "one token": (1, 3, 1, 1, 16, 128, 16, 1, 0, 1, torch.float32),
    "training": (2, 3, 75, 75, 16, 16, 3, 1, 0, 1, torch.float32),
    "chunk, forced ends": (2, 4, 20, 333, 80, 48, 3, 2, 1, 1, torch.float32),
    "chunk, split": (1, 4, 20, 333, 96, 48, 4, 1, 1, 3, torch.float32),
    "half": (1, 1, 70, 300, 16, 16, 5, 1, 0, 1, torch.float16),
    "decode, split": (2, 4, 1, 900, 16, 16, 5, 1, 0, 7, torch.float32),
    "more splits than blocks": (1, 4, 2, 100, 16, 16, 2, 1, 0, 9, torch.float16),
    "topk beyond the blocks": (1, 2, 9, 100, 16, 5, 32, 1, 2, 4, torch.float32),
    "topk 1": (1, 2, 9, 100, 16, 5, 1, 1, 0, 1, torch.float32),
    "block 128": (1, 3, 40, 700, 16, 128, 2, 1, 0, 1, torch.float32),
    "no forced block": (1, 2, 30, 200, 16, 16, 3, 0, 0, 2, torch.float32),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("draw", [integers, lambda *s, dtype: torch.randn(s).to(dtype)], ids=["ties", "normal"])
def test_matches_definition(shape, draw):
    batch, groups, seqlen_q, seqlen_k, depth, block_size, topk, local, init, splits, dtype = shape
    index_q = draw(batch, groups, seqlen_q, depth, dtype=dtype)
    index_k = draw(batch, 1, seqlen_k, depth, dtype=dtype)
    check(index_q, index_k, block_size, topk, local, init, num_splits=splits)


@pytest.mark.parametrize("block_size", [48, 40])
def test_parts_of_blocks(block_size):
    index_q, index_k = integers(2, 3, 30, 16), integers(2, 1, 333, 16)
    index_k[0, 0, 100] = torch.nan
    for splits, local in ((1, 1), (3, 2)):
        check(index_q, index_k, block_size, 3, local, num_splits=splits, columns=16)


@pytest.mark.parametrize("seqlen_q", [1, 20])
@pytest.mark.parametrize("clear", [False, True])
def test_keys_as_the_rows_of_the_product(seqlen_q, clear):
    index_q, index_k = integers(2, 3, seqlen_q, 16), integers(2, 1, 333, 16)
    for splits, period in ((1, 4), (4, 1)):
        check(index_q, index_k, 48, 3, num_splits=splits, swap=True, clear=clear, period=period)


@pytest.mark.parametrize(("splits", "local", "init"), [(1, 1, 0), (2, 3, 1)])
@pytest.mark.parametrize("halves", [False, True])
def test_blocks_one_by_one(splits, local, init, halves):
    """Two tiles, one with few blocks that are clear; many scores are equal."""
    index_q, index_k = integers(1, 3, 40, 16), integers(1, 1, 170, 16)
    changes = {"num_splits": splits, "rows": 64, "period": 1, "halves": halves}
    check(index_q, index_k, 16, 5, local, init, clear=True, **changes)


@pytest.mark.parametrize(
    ("draw", "init", "topk", "splits"),
    [
        *((integers, 3, topk, splits) for topk, splits in [(5, 3), (5, 40), (2, 200), (16, 150), (40, 90), (70, 9)]),
        *((torch.randn, 0, topk, splits) for topk, splits in [(5, 3), (5, 40), (40, 90)]),
    ],
)
def test_many_splits(draw, init, topk, splits):
    """More splits than a tile of the merge has columns, and more than can hold a chosen block.

    With ties and forced blocks, and without.
    """
    index_q, index_k = draw(1, 3, 1, 16), draw(1, 1, 200 * 4, 16)
    check(index_q, index_k, 4, topk, 1, min(init, topk - 1), num_splits=splits, rows=16)


def test_too_many_blocks():
    with pytest.raises(NotImplementedError, match=r"topk: expected at most 512 .* got 513"):
        flexmsa.select_blocks(integers(1, 1, 1, 16), integers(1, 1, 600, 16), block_size=1, topk=513, backend="triton")


def test_bulk_copies():
    index_q, index_k = integers(2, 3, 20, 16), integers(2, 1, 333, 16)
    check(index_q, index_k, 16, 3, use_tma=True, num_splits=2)


@pytest.mark.parametrize("splits", [1, 3])
def test_packed_documents(splits):
    documents = [[0, 0, 1, 0, 1], [0, 1, 40, 1, 40], [0, 40, 60, 40, 60], [1, 0, 3, 0, 0], [1, 3, 60, 3, 60]]
    sequences = torch.tensor(documents, dtype=torch.int32)
    ids = check(integers(2, 3, 60, 16), integers(2, 1, 60, 16), 16, 2, sequences=sequences, rows=16, num_splits=splits)
    assert (ids[1, :, :3] == -1).all()
    assert (ids[0, :, 0] == torch.tensor([0, -1])).all()


def test_cache_slots_outside_the_sequence_do_not_leak():
    index_q, index_k = integers(2, 4, 2, 16), integers(2, 1, 200, 16)
    index_k[0, :, 77:] = float("nan")
    index_k[1, :, :20] = float("inf")
    sequences = torch.tensor([[0, 0, 2, 0, 77], [1, 0, 2, 20, 200]], dtype=torch.int32)
    for splits in (1, 3):
        check(index_q, index_k, 16, 3, sequences=sequences, num_splits=splits)


def test_fewer_keys_than_queries():
    sequences = torch.tensor([[0, 0, 20, 0, 5]], dtype=torch.int32)
    ids = check(integers(1, 2, 20, 16), integers(1, 1, 5, 16), 16, 2, sequences=sequences)
    assert (ids[:, :, :15] == -1).all()


def test_strides():
    index_q = integers(1, 30, 16, 3).permute(0, 3, 1, 2)
    index_k = integers(1, 1, 16, 180).transpose(2, 3)[:, :, ::2]
    check(index_q, index_k, 16, 2)


@pytest.mark.parametrize("splits", [1, 2])
def test_extreme_numbers(splits):
    index_q, index_k = integers(1, 3, 40, 16), integers(1, 1, 120, 16)
    index_k[0, 0, 17], index_k[0, 0, 40], index_k[0, 0, 70:90] = float("inf"), -float("inf"), float("nan")
    index_q[0, 1, 5:20] = float("nan")
    index_q[0, 2] *= 3e38
    index_q[0, 0, ::3] = -0.0
    check(index_q, index_k, 16, 3, num_splits=splits)
