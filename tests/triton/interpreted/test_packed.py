"""The Triton kernels with packed documents of fewer queries than keys, and with documents without tokens."""

import pytest
import torch
from test_documents import FILLED_UP, FULL, KEYS, QUERIES, step

from flexmsa.testing import Case, check_case
from flexmsa.testing.check import kernels_for_many_queries

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


# Odd seeds take the kernels for many queries.
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("topk", [2, None])
def test_the_last_queries_of_documents(topk, seed):
    sizes = {"num_kv_heads": 2, "group_size": 3, "block_size": 8, "topk": topk, "deferred": seed == 1, "seed": seed}
    case = Case(seqlen_q=30, seqlen_k=90, cu_seqlens_q=QUERIES, cu_seqlens_k=KEYS, **sizes)
    check_case(case, backend="triton")


@pytest.mark.parametrize("topk", [2, None])
def test_documents_without_tokens_change_nothing(topk):
    inputs = Case(num_kv_heads=2, group_size=2, seqlen_q=50, seqlen_k=50).inputs("cpu")[0]
    with kernels_for_many_queries(inputs[0], "triton"):
        expected, found = (
            step(inputs, "triton", topk, cu_seqlens=torch.tensor(offsets, dtype=torch.int32))
            for offsets in (FULL, FILLED_UP)
        )
    assert all(map(torch.equal, found, expected))
