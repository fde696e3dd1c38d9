"""A step over pages as it is launched for GPUs: compiled, and without further compilations as sequences grow."""

import os

import pytest
import torch

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.launch import compile_key, record
from flexmsa.testing.compiled import report
from flexmsa.testing.launches import TARGETS

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

GROUPS, HEADS, DEPTH, PAGE = 4, 64, 128, 128
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def step(tokens, sequences, max_pages, rows=1, stored=(BF16, BF16)):
    """A step of `tokens` tokens: `rows` batch rows of sequences, or packed ones in one row; keys beside values.

    stored: the dtypes of the pages, and of those of index keys.
    """

    def arranged(heads, depth, dtype=BF16):
        return meta(tokens, heads, depth, dtype=dtype).unflatten(0, (rows, -1)).transpose(1, 2)

    k, v = meta(4096, GROUPS, PAGE, 2 * DEPTH, dtype=stored[0]).split(DEPTH, dim=3)
    index_k = meta(4096, 1, PAGE, DEPTH, dtype=stored[1])
    scale, index_scale = (meta(PAGE, dtype=torch.uint8) if dtype == FP8 else None for dtype in stored)
    new = [meta(1, heads, tokens, DEPTH) for heads in (GROUPS, GROUPS, 1)]
    kernels.write_pages(*new, meta(tokens, dtype=torch.int64), k, v, index_k, None, None, None, (1.0, 1.0, 1.0))
    table = meta(sequences if rows > 1 else sequences + 1, 5, dtype=torch.int32)
    pages = meta(sequences, max_pages, dtype=torch.int32)
    written = arranged(HEADS, DEPTH), arranged(GROUPS, 16, torch.int32)
    queries = arranged(HEADS, DEPTH), arranged(GROUPS, DEPTH)
    rule = SelectionRule(PAGE, 16)
    kernels.attend_pages(*queries, k, v, index_k, pages, scale, scale, index_scale, table, rule, 0.1, *written)


DECODE, DRAFTS, MIXED = (32, 32, 32), (9, 4, 1), (2080, 33, 1)
# All on Hopper; elsewhere the step that has most kernels.
COMPILED = [
    *(("sm_90", sizes, (stored, stored)) for sizes in (DECODE, DRAFTS, MIXED) for stored in (BF16, FP8)),
    # vLLM's MiniMax-M3 has e4m3 keys beside index keys in bf16.
    *(("sm_90", sizes, stored) for sizes in (DECODE, MIXED) for stored in ((FP8, BF16), (BF16, FP8))),
    *((name, MIXED, (BF16, BF16)) for name in ("sm_80", "sm_100", "gfx942")),
]


@pytest.mark.parametrize(("name", "sizes", "stored"), COMPILED, ids=str)
def test_compiles(name, sizes, stored):
    target, (tokens, sequences, rows) = TARGETS[name], sizes
    with record(target) as launches:
        step(tokens, sequences, 1024, rows, stored)
    names = {launch.kernel.__name__ for launch in launches}
    assert "write_kernel" in names and names & {"attend_kernel", "query_major_kernel", "query_major_sm90_kernel"}
    for launch in launches:
        assert report(launch.compile(target)).shared <= target.shared_memory, launch.kernel.__name__


def test_growing_sequences_compile_nothing():
    target = TARGETS["sm_90"]
    found = []
    for max_pages in (1, 5, 40, 8192):
        with record(target) as launches:
            step(32, 32, max_pages, rows=32)
        found.append({(launch.kernel.__name__, compile_key(launch)) for launch in launches})
    # One variant without splits, one with few and one with many.
    assert len(set.union(*found)) <= len(found[0]) + 2 * 3
    assert found[3] == found[2]
