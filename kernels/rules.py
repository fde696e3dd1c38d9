"""Which blocks a query may keep, said once for every implementation."""

from dataclasses import dataclass
from typing import Any

# The largest topk of the Triton kernels: longer lists take minutes to compile, and do not fit the shared memory.
MOST_BLOCKS = 512
# The most queries per row that gather their own blocks: a few share hardly any.
FEW_QUERIES = 16
# The most dims of int8 index keys: sums of more products would not be exact in float32.
MOST_INT8_DIMS = 1024


@dataclass(frozen=True)
class SelectionRule:
    """A query keeps `topk` blocks of `block_size` keys: the forced ones, then those of the best scores.

    Forced are the `num_local_blocks` newest and the `num_init_blocks` oldest blocks that the query sees. Equal scores
    are decided for the smaller id, and NaN is the lowest score. The Triton kernels have the same rule as
    `triton/selection/rule.py`.
    """

    block_size: int
    topk: int
    num_local_blocks: int = 1
    num_init_blocks: int = 0

    def is_forced(self, block: Any, newest: Any) -> Any:
        """Whether a query keeps visible block `block` whatever it scores; newest: the newest block that it sees.

        Both may be numbers, tensors or arrays.

        >>> rule = SelectionRule(block_size=16, topk=4, num_local_blocks=1, num_init_blocks=1)
        >>> [rule.is_forced(block, newest=3) for block in range(4)]
        [True, False, False, True]
        """
        return (block > newest - self.num_local_blocks) | (block < self.num_init_blocks)
