"""What the backward's kernels hand to each other: rows in the order of the lists, partial results, and their layout."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem


class GatheredRows(NamedTuple):
    """What a token range keeps of each entry and of its G query rows, in the order of the lists.

    queries, limits: [entries] int32, the query of an entry, and how many keys of its block that query sees; delta,
    lse2: [entries, G] fp32.
    """

    queries: Any
    limits: Any
    delta: Any
    lse2: Any


class PartialResults(NamedTuple):
    """Gradients that are still to be summed.

    q: [entries, G, D] in q's dtype, each row's own share of dQ, with heads innermost in some layouts (see
    `partial_place`); k, v: [slots, block_size, D] fp32, the shares of the work items that have a slot.
    """

    q: Any
    k: Any
    v: Any


class KeyGradients(NamedTuple):
    """The sums of dK and dV, [B, Hkv, Sk, D] fp32 and contiguous."""

    k: Any
    v: Any
    num_kv_heads: Any
    seqlen_k: Any


class Work(NamedTuple):
    """A token range for the kernels of dK and dV: its work items, number and group, and what they read and write."""

    items: Any
    rows: Any
    partial: Any
    sums: Any
    range_number: Any
    group: Any


@dataclass(frozen=True)
class Workspace:
    """Memory that is used again by each token range.

    places: [tokens, topk] int32, where in the order of the lists the entry of a top-k slot went, -1 if it belongs to no
    list; heads_inside: partial.q has its heads innermost.
    """

    rows: GatheredRows
    places: Tensor
    partial: PartialResults
    heads_inside: bool


def make_workspace(
    q: Tensor, lse: Tensor, sequences: Tensor, problem: Problem, num_entries: int, num_slots: int, heads_inside: bool
) -> Workspace:
    """An uninitialised workspace for token ranges of `num_entries` entries and `num_slots` slots of work items."""
    group_size, head_dim = problem.group_size, problem.head_dim
    return Workspace(
        GatheredRows(
            queries=sequences.new_empty(num_entries),
            limits=sequences.new_empty(num_entries),
            delta=lse.new_empty(num_entries, group_size),
            lse2=lse.new_empty(num_entries, group_size),
        ),
        places=sequences.new_empty(num_entries),
        partial=PartialResults(
            q=q.new_empty(num_entries, group_size, head_dim),
            k=lse.new_empty(num_slots, problem.block_size, head_dim),
            v=lse.new_empty(num_slots, problem.block_size, head_dim),
        ),
        heads_inside=heads_inside,
    )


@triton.jit
def partial_place(row, d, group_size: tl.constexpr, head_dim: tl.constexpr, heads_inside: tl.constexpr):
    """Where element `d` of row `row` is kept in PartialResults.q; heads_inside: see `Workspace`."""
    if heads_inside:
        return row // group_size * (group_size * head_dim) + row % group_size + d * group_size
    else:
        return row * head_dim + d
