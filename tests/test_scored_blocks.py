"""The best blocks of each query with their scores, by the plain PyTorch kernels, against the dense definition."""

import pytest
import torch
from helpers import dense_scored_blocks, plain, ragged, randn

from flexmsa import ops
from flexmsa.kernels.torch import fp8

BATCHES = {
    "one token": (ragged([1, 1, 1], [97, 8, 33], 1), 1),
    "ragged": (ragged([5, 0, 2], [104, 40, 2], 5), 5),
    "chunk": (plain(3, 40, 104), 40),
    "queries of their own": (
        torch.tensor([[b, i, i + 1, 0, 40 + 8 * b + i // 2] for b in range(3) for i in range(4)]),
        4,
    ),
}


def integers(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float()


def paged(x, block_size):
    """The pages of x [B, 1, S, ...] and their table, in reverse order."""
    pages = x.unflatten(2, (-1, block_size)).transpose(1, 2).flatten(0, 1)
    table = torch.arange(len(pages) - 1, -1, -1, dtype=torch.int32).view(len(x), -1)
    return pages.flip(0), table


@pytest.mark.parametrize("topk", [1, 3, 30])
@pytest.mark.parametrize("draw", [integers, randn], ids=["ties", "normal"])
@pytest.mark.parametrize("name", BATCHES)
def test_equal_the_definition(name, draw, topk):
    sequences, seqlen_q = BATCHES[name]
    index_q, index_k = draw(3, 2, seqlen_q, 16), draw(3, 1, 104, 16, seed=1)
    index_k[1, 0, 5] = torch.nan
    wanted_ids, wanted = dense_scored_blocks(index_q.double(), index_k.double(), sequences, 8, topk)
    sequences = sequences.int()
    ids, scores = ops.scored_blocks(index_q, index_k, sequences, 8, topk, "torch")
    assert torch.equal(ids, wanted_ids) and ids.dtype == torch.int32
    # NaN, the lowest score, is the least finite number of the dtype.
    limit = torch.finfo(torch.float32).max
    finite = wanted.clamp(-limit, limit).where(wanted_ids >= 0, -torch.inf)
    torch.testing.assert_close(scores.double(), finite, rtol=1e-5, atol=1e-5)
    pages, table = paged(index_k, 8)
    found = ops.scored_blocks(index_q, pages, sequences, 8, topk, "torch", table)
    assert torch.equal(found[0], ids) and torch.equal(found[1], scores)


def test_float64_scores_are_float64():
    index_q, index_k = (randn(2, heads, 40, 8, dtype=torch.float64, seed=heads) for heads in (3, 1))
    ids, scores = ops.scored_blocks(index_q, index_k, plain(2, 40, 40), 8, 4, "torch")
    wanted_ids, wanted = dense_scored_blocks(index_q, index_k, plain(2, 40, 40), 8, 4)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(scores, wanted, rtol=1e-13, atol=1e-13)


def test_e4m3_keys():
    index_q, (index_k, scale) = randn(2, 3, 5, 16), fp8.quantize(randn(2, 1, 104, 16, seed=1))
    sequences = ragged([5, 2], [90, 13], 5)
    ids, scores = ops.scored_blocks(index_q, index_k, sequences, 8, 4, "torch", None, scale)
    keys = index_k.float() * fp8.as_scales(scale).float()[..., None]
    wanted_ids, wanted = dense_scored_blocks(index_q.double(), keys.double(), sequences, 8, 4)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-5)
