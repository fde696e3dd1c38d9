"""What a user needs to fuzz flexmsa on their own hardware (install flexmsa[test]).

`strategies.cases` draws inputs, `oracle.attention` says what is right, `check_case` compares the two.
"""

from flexmsa.testing import oracle, strategies
from flexmsa.testing.assertions import assert_close
from flexmsa.testing.cases import Case
from flexmsa.testing.check import check_case

__all__ = ["Case", "assert_close", "check_case", "oracle", "strategies"]
