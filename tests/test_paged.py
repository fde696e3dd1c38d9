"""The functions for engines: ragged steps over pages, writing by slots, and what they refuse."""

import pytest
from paged_cases import CASES, run


@pytest.mark.parametrize("step", CASES.values(), ids=CASES)
def test_a_step_is_each_sequence_on_its_own(step):
    run(step, "torch")
