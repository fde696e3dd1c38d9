"""What a user needs to fuzz flexmsa on their own hardware (install flexmsa[test]).

`strategies.cases` draws inputs, `oracle.attention` says what is right, `check_case` compares the two.
`strategies.schedules` draws what happens to a cache while it serves, and `check_schedule` follows it.
"""

from flexmsa.testing import oracle, strategies
from flexmsa.testing.assertions import assert_close
from flexmsa.testing.cases import Case
from flexmsa.testing.check import check_case
from flexmsa.testing.schedules import Schedule, check_schedule

__all__ = ["Case", "Schedule", "assert_close", "check_case", "check_schedule", "oracle", "strategies"]
