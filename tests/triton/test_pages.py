"""A step over pages as it is launched for GPUs: compiled, and without further compilations as sequences grow."""

import os

import pytest
import torch

from flexmsa.kernels.triton.common.launch import compile_key
from flexmsa.testing.compiled import report
from flexmsa.testing.launches import TARGETS, Layer, StepFormat, step_launches

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

# Tokens, rows of the table, batch rows.
DECODE, DRAFTS, MIXED = (32, 32, 32), (9, 4, 1), (2080, 33, 1)
E4M3 = torch.float8_e4m3fn
# Whether keys are e4m3, and the dtype of index keys in 8 bits: all on Hopper; elsewhere the step that has most kernels.
COMPILED = [
    *(("sm_90", sizes, stored) for sizes in (DECODE, DRAFTS, MIXED) for stored in ((False, None), (True, E4M3))),
    # vLLM's MiniMax-M3 has e4m3 keys beside index keys in bf16.
    *(("sm_90", sizes, stored) for sizes in (DECODE, MIXED) for stored in ((True, None), (False, E4M3))),
    *(("sm_90", sizes, (False, torch.int8)) for sizes in (DECODE, MIXED)),
    *((name, MIXED, (False, None)) for name in ("sm_80", "sm_100", "gfx942")),
]


@pytest.mark.parametrize(("name", "sizes", "stored"), COMPILED, ids=str)
def test_compiles(name, sizes, stored):
    target, (tokens, sequences, rows) = TARGETS[name], sizes
    launches = step_launches(Layer(queries=tokens), target, StepFormat(rows, sequences, 1024, *stored))
    names = {launch.kernel.__name__ for launch in launches}
    assert "write_kernel" in names and names & {"attend_kernel", "query_major_kernel", "query_major_sm90_kernel"}
    for launch in launches:
        assert report(launch.compile(target)).shared <= target.shared_memory, launch.kernel.__name__


def test_growing_sequences_compile_nothing():
    target = TARGETS["sm_90"]
    found = []
    for max_pages in (1, 5, 40, 8192):
        launches = step_launches(Layer(queries=32), target, StepFormat(32, 32, max_pages))
        found.append({(launch.kernel.__name__, compile_key(launch)) for launch in launches})
    # One variant without splits, one with few and one with many.
    assert len(set.union(*found)) <= len(found[0]) + 2 * 3
    assert found[3] == found[2]
