"""The functions for engines through the Triton kernels: query by query, and in the tiles of many queries."""

from dataclasses import replace

import pytest
from paged_cases import CASES

from flexmsa.testing import check_paged_step

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("seed", [0, 1], ids=["each query", "tiles"])
@pytest.mark.parametrize("step", CASES.values(), ids=CASES)
def test_a_step_is_each_sequence_on_its_own(step, seed):
    check_paged_step(replace(step, seed=seed), backend="triton")
