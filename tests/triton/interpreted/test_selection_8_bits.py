"""The prototype of a selection certified from int8 scores: rows that it does not mark have the ids of flexmsa."""

import pytest
import torch

import flexmsa
from benchmarks.gpu_selection_8_bits import Parts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEQLEN, CHUNK, GROUPS, DEPTH = 2560, 256, 4, 128


def normal(q, k):
    return q, k


def integers(q, k):
    return q.mul(1.5).round(), k.mul(1.5).round()


def all_equal(q, k):
    return q, k[:, :, :1].expand_as(k).contiguous()


@pytest.mark.parametrize(
    ("kind", "most_marked"),
    [(normal, 0.02), (integers, 0.02), (all_equal, 1.0)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_rows_that_are_not_marked_have_the_ids_of_flexmsa(kind, most_marked):
    torch.manual_seed(0)
    # The interpreter does not multiply bf16.
    q, k = kind(torch.randn(1, GROUPS, SEQLEN, DEPTH).half(), torch.randn(1, 1, SEQLEN, DEPTH).half())
    parts = Parts(q, k, CHUNK)
    parts.quantise()
    wanted = flexmsa.select_blocks(q.float(), k.float())
    # The first rows, which see fewer than 16 blocks, and the last.
    for first in (0, GROUPS * (SEQLEN - CHUNK)):
        for step in parts.steps():
            step(first)
        tokens = slice(first // GROUPS, first // GROUPS + CHUNK)
        marked = parts.marked.view(SEQLEN, GROUPS)[tokens].T != 0
        same = (parts.ids == wanted)[0, :, tokens].all(-1)
        assert bool((same | marked).all())
        assert marked.float().mean() <= (most_marked if first else 0)
