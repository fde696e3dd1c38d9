"""Tools to fuzz flexmsa on your own hardware (install flexmsa[test]).

`strategies.cases` draws inputs, `oracle.attention` computes the right results, `check_case` compares the two.
`strategies.schedules` draws the operations on a cache during serving, and `check_schedule` runs and checks them.
`strategies.paged_steps` draws steps of an engine over pages, and `check_paged_step` runs and checks them.
"""

from flexmsa._extras import missing

try:
    from flexmsa.testing import oracle, strategies
    from flexmsa.testing.assertions import assert_close
    from flexmsa.testing.cases import Case
    from flexmsa.testing.check import check_case
    from flexmsa.testing.paged_steps import PagedStep, check_paged_step
    from flexmsa.testing.schedules import Schedule, check_schedule
except ModuleNotFoundError as error:
    raise missing("flexmsa.testing", "test", error) from error

__all__ = [
    "Case",
    "PagedStep",
    "Schedule",
    "assert_close",
    "check_case",
    "check_paged_step",
    "check_schedule",
    "oracle",
    "strategies",
]
