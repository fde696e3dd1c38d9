"""How often the selection compiles: lengths that grow compile it once without splits and once with them."""

import pytest
import torch

pytest.importorskip("triton")

from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.launch import record
from flexmsa.kernels.triton.selection.launch import rank_blocks
from flexmsa.kernels.triton.selection.merge import merge_splits
from flexmsa.testing.launches import TARGETS, meta

BLOCK = 128
# Every number of blocks up to 600, then larger and larger steps, up to 4M keys.
CAPACITIES = [1, *range(BLOCK, 600 * BLOCK, BLOCK), *(step * 3 << 15 for step in range(1, 44))]


def keys_of(target, batch, seqlen_q, capacity, paged=False, scaled=False, dtype=torch.bfloat16, topk=16):
    """The compile keys of the launches that select blocks of a cache with room for `capacity` keys."""
    pages = -(-capacity // BLOCK)
    rows, keys = (batch * pages, BLOCK) if paged else (batch, capacity)
    index_q = meta(batch, 4, seqlen_q, 128, dtype=dtype)
    index_k = meta(rows, 1, keys, 128, dtype=torch.float8_e4m3fn if scaled else dtype)
    scale = meta(rows, 1, keys, dtype=torch.uint8) if scaled else None
    table = meta(batch, pages) if paged else None
    sequences = meta(batch, 5)
    with record(target) as launches:
        ids, lists = rank_blocks(index_q, index_k, sequences, SelectionRule(BLOCK, topk), table, scale)
        if lists is not None:
            merge_splits(lists, ids, sequences)
    return [(launch.kernel.__name__, launch.compile_key()) for launch in launches]


def distinct(found):
    """For each kernel its compile keys, each once."""
    kernels: dict[str, dict] = {}
    for name, key in found:
        kernels.setdefault(name, {})[key] = None
    return kernels


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"batch": 7},
        {"paged": True},
        {"paged": True, "scaled": True},
        {"dtype": torch.float32},
        {"topk": 40},
        {"topk": 100},
    ],
    ids=str,
)
def test_a_cache_that_grows(target, shape):
    shape = {"batch": 1, "seqlen_q": 1, **shape}
    kernels = distinct(key for capacity in CAPACITIES for key in keys_of(target, capacity=capacity, **shape))
    assert len(kernels) == 2
    assert all(1 <= len(keys) <= 2 for keys in kernels.values())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_batches_and_splits(target):
    found = [keys_of(target, batch, 1, capacity) for batch in (1, 2, 3, 8, 50, 999) for capacity in CAPACITIES[::20]]
    assert all(len(keys) <= 2 for keys in distinct(key for keys in found for key in keys).values())


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_numbers_of_queries(target):
    """Row tiles have few sizes, each with and without splits."""
    queries = [*range(1, 80), 100, 1000, 131072]
    found = [keys_of(target, 1, seqlen_q, capacity) for seqlen_q in queries for capacity in (BLOCK, 1 << 20)]
    kernels = distinct(key for keys in found for key in keys)
    kernels.pop("merge_kernel")
    assert sum(map(len, kernels.values())) <= 8
