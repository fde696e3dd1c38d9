"""The functions for engines through the Triton kernels: query by query, and in the tiles of many queries."""

import pytest
from paged_cases import CASES, run

from flexmsa.kernels.triton.serving import launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("few", [True, False], ids=["each query", "tiles"])
@pytest.mark.parametrize("step", CASES.values(), ids=CASES)
def test_a_step_is_each_sequence_on_its_own(step, few, monkeypatch):
    if not few:
        monkeypatch.setattr(launch, "FEW_QUERIES", 0)
        monkeypatch.setattr(launch, "FEW_ROWS", 0)
    run(step, "triton")
