"""Few queries, with a cache or without, are attended to one by one, and many in the tiles of the forward."""

import os

import pytest
import torch

pytest.importorskip("triton")

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.triton.common.launch import record
from flexmsa.testing.launches import TARGETS, meta

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")


def kernels_of(batch, queries, topk):
    """The names of the kernels of 64/4 heads over 128K keys; topk None is dense."""
    ids = None if topk is None else meta(batch, 4, queries, topk)
    q, k = (meta(batch, *shape, 128, dtype=torch.bfloat16) for shape in ((64, queries), (4, 131072)))
    with record(TARGETS["sm_90"]) as launches:
        kernels.attend_blocks(q, k, k, ids, meta(batch, 5), 128, 0.1)
    return {launch.kernel.__name__ for launch in launches}


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (1, 256), (1, 1000), (500, 16)])
def test_few_queries_take_two_launches_at_most(batch, queries):
    assert "attend_kernel" in kernels_of(batch, queries, 16) <= {"attend_kernel", "combine_kernel"}


@pytest.mark.parametrize(
    ("batch", "queries", "topk"), [(1, 1001, 16), (64, 17, 16), (1, 1, None), (1, 1, 0), (1, 1, 513)]
)
def test_the_forward_takes_all_else(batch, queries, topk):
    assert "attend_kernel" not in kernels_of(batch, queries, topk)
