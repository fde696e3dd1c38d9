"""The best blocks of each query with their scores against the dense definition, ids exactly; ties are frequent."""

from dataclasses import replace

import pytest
import torch
from helpers import dense_scored_blocks, plain, ragged

from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.torch import fp8
from flexmsa.kernels.triton.common.target import padded
from flexmsa.kernels.triton.selection.launch import choose_config, scored_blocks

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FRAGMENTS = torch.tensor([[b, i, i + 1, 0, 190 + 8 * b + i // 2] for b in range(2) for i in range(4)]).int()
SHAPES = {
    # name: (Hkv, Sq, Sk, block_size, topk, splits, sequences or None)
    "one token": (3, 1, 333, 16, 4, 1, None),
    "one token, split": (3, 1, 333, 16, 4, 5, None),
    "topk beyond the blocks": (2, 3, 100, 16, 16, 1, None),
    "topk beyond the blocks, split": (2, 3, 100, 16, 16, 3, None),
    "long lists": (2, 2, 400, 4, 70, 3, None),
    "long lists, not split": (2, 2, 400, 4, 70, 1, None),
    "chunk": (2, 20, 200, 16, 3, 1, None),
    "ragged": (4, 5, 200, 16, 3, 2, ragged([5, 0], [200, 40], 5)),
    "queries of their own": (2, 4, 200, 16, 3, 2, FRAGMENTS),
}


def integers(*shape):
    return torch.randint(-2, 3, shape).float()


def normal(*shape):
    return torch.randn(shape)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("draw", [integers, normal], ids=["ties", "normal"])
def test_equal_the_definition(shape, draw):
    groups, seqlen_q, seqlen_k, block_size, topk, splits, sequences = shape
    sequences = plain(2, seqlen_q, seqlen_k) if sequences is None else sequences
    index_q, index_k, rule = draw(2, groups, seqlen_q, 16), draw(2, 1, seqlen_k, 16), SelectionRule(block_size, topk, 0)
    config = choose_config(index_q, index_k, sequences, rule)
    config = replace(config, columns=padded(block_size), num_splits=splits)
    ids, scores = scored_blocks(index_q, index_k, sequences, rule, config=config)
    wanted_ids, wanted = dense_scored_blocks(index_q, index_k, sequences, block_size, topk)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(scores, wanted, rtol=1e-5, atol=1e-5)


def test_pages_of_e4m3():
    (codes, scale), index_q = fp8.quantize(torch.randn(12, 1, 16, 16)), torch.randn(2, 3, 2, 16)
    table = torch.randperm(12).int().view(2, 6)
    sequences = torch.tensor([[0, 0, 2, 0, 90], [1, 0, 2, 0, 20]], dtype=torch.int32)
    ids, scores = scored_blocks(index_q, codes, sequences, SelectionRule(16, 4, 0), table, scale)
    keys = codes.float() * fp8.as_scales(scale).float()[..., None]
    rows = keys[table.long()].transpose(1, 2).flatten(2, 3)
    wanted_ids, wanted = dense_scored_blocks(index_q, rows, sequences, 16, 4)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4)
