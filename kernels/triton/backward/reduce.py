"""The backward's sums of partial results: dK and dV over work items, dQ over top-k slots, both in a fixed order."""

import functools
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ..common.launch import Launch, Options
from ..common.target import padded
from ..schedule.inverse_index import InverseIndex, load_block
from ..schedule.work_items import WorkItems, load_share
from .workspace import KeyGradients, Workspace, partial_place


@dataclass(frozen=True)
class ItemConstants:
    """Constants of `sum_items_kernel`; keys: per program; depth: D, padded."""

    head_dim: int
    block_size: int
    keys: int
    depth: int


@triton.jit
def sum_items_kernel(blocks_ptr, items, partial, sums, range_number, group, C: tl.constexpr):
    """Add the work items of block program_id(0)'s list, if it has several, to C.keys of its keys' gradients."""
    number = tl.program_id(0)
    share = load_share(items, range_number, number)
    if share.num_items == 0:
        return
    block = load_block(blocks_ptr, number)
    key = tl.program_id(1) * C.keys + tl.arange(0, C.keys)[:, None]
    d = tl.arange(0, C.depth)[None, :]
    mask = (block.first_key + key < block.stop_key) & (key < C.block_size) & (d < C.head_dim)
    tile = key * C.head_dim + d
    place = ((block.batch * sums.num_kv_heads + group) * sums.seqlen_k + block.first_key) * C.head_dim + tile
    grad_k = tl.load(sums.k + place, mask=mask, other=0.0)
    grad_v = tl.load(sums.v + place, mask=mask, other=0.0)
    for item in tl.range(0, share.num_items, num_stages=4):
        slot = (share.first_slot + item) * C.block_size * C.head_dim + tile
        grad_k += tl.load(partial.k + slot, mask=mask, other=0.0)
        grad_v += tl.load(partial.v + slot, mask=mask, other=0.0)
    tl.store(sums.k + place, grad_k, mask=mask)
    tl.store(sums.v + place, grad_v, mask=mask)


@functools.lru_cache
def item_constants(problem: Problem) -> ItemConstants:
    """Constants of `sum_items_kernel`."""
    return ItemConstants(problem.head_dim, problem.block_size, keys=16, depth=padded(problem.head_dim))


def sum_items(
    index: InverseIndex,
    items: WorkItems,
    workspace: Workspace,
    sums: KeyGradients,
    range_number: int,
    group: int,
    problem: Problem,
) -> None:
    """Add the partial dK and dV of a token range to the sums; nothing where no list can have several work items."""
    if workspace.partial.k.shape[0] == 0:
        return
    constants = item_constants(problem)
    Launch(
        sum_items_kernel,
        (index.num_blocks, triton.cdiv(problem.block_size, constants.keys), 1),
        {
            "blocks_ptr": index.blocks,
            "items": items,
            "partial": workspace.partial,
            "sums": sums,
            "range_number": range_number,
            "group": group,
        },
        {"C": constants},
    ).run()


@dataclass(frozen=True)
class SlotConstants:
    """Constants of `sum_slots_kernel`; heads: per program; depth: D, padded."""

    group_size: int
    head_dim: int
    heads_inside: bool
    heads: int
    depth: int


@triton.jit
def sum_slots_kernel(
    places_ptr, partial_q_ptr, grad_q_ptr, group, first_token, seqlen_q, num_kv_heads, topk, C: tl.constexpr
):
    """grad_q [B, Hq, Sq, D] of C.heads heads of token first_token + program_id(0).

    A top-k slot whose place is -1 belongs to no list, and adds nothing.
    """
    HEADS: tl.constexpr = C.heads
    DEPTH: tl.constexpr = C.depth
    local = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DEPTH)[None, :]
    mask = (head < C.group_size) & (d < C.head_dim)
    offset = partial_place(head, d, C.group_size, C.head_dim, C.heads_inside)
    grad_q = tl.zeros([HEADS, DEPTH], tl.float32)
    for slot in tl.range(0, topk, loop_unroll_factor=4):
        place = tl.load(places_ptr + local * topk + slot).to(tl.int64)
        partial = partial_q_ptr + place * (C.group_size * C.head_dim) + offset
        grad_q += tl.load(partial, mask=mask & (place >= 0), other=0.0).to(tl.float32)
    token = tl.cast(first_token, tl.int64) + local
    batch, query = token // seqlen_q, token % seqlen_q
    row = ((batch * num_kv_heads + group) * C.group_size + head) * seqlen_q + query
    tl.store(grad_q_ptr + row * C.head_dim + d, grad_q.to(grad_q_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache
def slot_constants(problem: Problem, heads_inside: bool) -> SlotConstants:
    """Constants of `sum_slots_kernel`: a program holds up to 2048 numbers, or the vector of one head."""
    depth = padded(problem.head_dim)
    heads = min(triton.next_power_of_2(problem.group_size), max(1, 2048 // depth))
    return SlotConstants(problem.group_size, problem.head_dim, heads_inside, heads, depth)


def sum_slots(
    workspace: Workspace,
    grad_q: Tensor,
    group: int,
    first_token: int,
    num_tokens: int,
    topk: int,
    problem: Problem,
) -> None:
    """Fill grad_q [B, Hq, Sq, D] of the heads of `group`, for num_tokens tokens of the flattened batch."""
    constants = slot_constants(problem, workspace.heads_inside)
    Launch(
        sum_slots_kernel,
        (num_tokens, triton.cdiv(problem.group_size, constants.heads), 1),
        {
            "places_ptr": workspace.places,
            "partial_q_ptr": workspace.partial.q,
            "grad_q_ptr": grad_q,
            "group": group,
            "first_token": first_token,
            "seqlen_q": grad_q.shape[2],
            "num_kv_heads": problem.num_kv_heads,
            "topk": topk,
        },
        {"C": constants},
        Options(num_warps=max(1, min(8, constants.heads * constants.depth // 256))),
    ).run()
