"""The device form of `flexmsa.kernels.rules.SelectionRule`: which blocks a query keeps whatever they score.

A new way to force blocks changes these functions and `SelectionRule.is_forced`, and no kernel. The kernels ask in three
places. The first `first_kept` blocks of a tile are kept and never scored. Of the blocks behind them, `is_forced` says
which are kept anyway; those from `forced_from` on may be, so the loops without masks end there.

The numbers are known at run time: another rule compiles nothing.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class ForcedBlocks(NamedTuple):
    """How many of the newest blocks that a query sees are forced, and how many of the oldest."""

    num_local: Any
    num_init: Any


@triton.jit
def first_kept(forced, num_blocks, unscored: tl.constexpr):
    """How many of the oldest blocks are kept without being scored: all num_blocks, if there are at most `unscored`."""
    return tl.where(num_blocks <= unscored, num_blocks, forced.num_init)


@triton.jit
def is_forced(forced, block, newest):
    """Whether a query keeps block `block`, not among the `first_kept`, whatever it scores; newest: the last it sees."""
    return block > newest - forced.num_local


@triton.jit
def forced_from(forced, newest):
    """The first block behind the `first_kept` that is forced for a query whose newest block is `newest`."""
    return newest - forced.num_local + 1
