"""The backward's sums of partial results, all in a fixed order: dK and dV over work items, dQ over top-k slots.

After the last pass one launch brings what was summed in fp32 to the dtypes of the results.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...problem import Problem
from ..common.launch import Launch, Options
from ..common.passes import PassLaunch
from ..common.sizes import Sizes, cdiv, sizes_of
from ..schedule.inverse_index import InverseIndex, find_token_range, load_block
from ..schedule.work_items import load_share
from .workspace import KeyGradients, TileSizes, Work, Workspace, partial_place


@dataclass(frozen=True)
class ItemConstants(Sizes):
    """Constants of `sum_items_kernel`; keys: per program."""

    keys: int


@triton.jit
def sum_items_kernel(blocks_ptr, work, C: tl.constexpr):
    """Add the work items of a block's list, if it has several, to C.keys of its keys' gradients.

    Program (block, i, n) owns keys of the list in range n of a pass.
    """
    number = tl.program_id(0)
    share = load_share(work.items, work.first_range, tl.program_id(2), number)
    group = (work.first_range + tl.program_id(2)) // work.group_ranges
    partial, sums = work.partial, work.sums
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
    return ItemConstants(**sizes_of(problem), keys=16)


def sum_items(index: InverseIndex, work: Work, problem: Problem) -> list[PassLaunch]:
    """Adds the partial dK and dV of a pass to the sums; nothing where no list can have several work items."""
    if work.items.num_slots == 0:
        return []
    constants = item_constants(problem)
    grid = index.num_blocks, cdiv(problem.block_size, constants.keys), 0
    return [PassLaunch(Launch(sum_items_kernel, grid, {"blocks_ptr": index.blocks, "work": work}, {"C": constants}))]


@dataclass(frozen=True)
class SlotConstants(TileSizes):
    """Constants of `sum_slots_kernel`; heads: per program."""

    heads: int


@triton.jit
def sum_slots_kernel(
    index, places_ptr, partial_q_ptr, grad_q_ptr, first_range, seqlen_q, num_kv_heads, topk, C: tl.constexpr
):
    """grad_q [B, Hq, Sq, D]: program (t, i, n) owns C.heads heads of token t of range n of a pass."""
    HEADS: tl.constexpr = C.heads
    DEPTH: tl.constexpr = C.depth
    tokens = find_token_range(index, first_range + tl.program_id(2), topk)
    local = tl.program_id(0).to(tl.int64)
    if local >= tokens.num_tokens:
        return
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    d = tl.arange(0, DEPTH)[None, :]
    mask = (head < C.group_size) & (d < C.head_dim)
    numbers = index.numbers + tokens.first_entry + local * topk
    places = places_ptr + (tl.program_id(2) * index.range_tokens + local) * topk
    grad_q = tl.zeros([HEADS, DEPTH], tl.float32)
    for slot in tl.range(0, topk, loop_unroll_factor=4):
        # A slot that belongs to no list adds nothing.
        used = tl.load(numbers + slot) < index.none
        row = tl.load(places + slot, mask=used, other=0).to(tl.int64)
        grad_q += tl.load(partial_q_ptr + partial_place(row + head, d, C), mask=mask & used, other=0.0).to(tl.float32)
    token = tokens.first_token + local
    batch, query = token // seqlen_q, token % seqlen_q
    row = ((batch * num_kv_heads + tokens.group) * C.group_size + head) * seqlen_q + query
    tl.store(grad_q_ptr + row * C.head_dim + d, grad_q.to(grad_q_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache
def slot_constants(sizes: TileSizes) -> SlotConstants:
    """Constants of `sum_slots_kernel`: a program holds up to 2048 numbers, or the vector of one head."""
    heads = min(triton.next_power_of_2(sizes.group_size), max(1, 2048 // sizes.depth))
    return SlotConstants(**vars(sizes), heads=heads)


def sum_slots(index: InverseIndex, workspace: Workspace, grad_q: Tensor, num_kv_heads: int) -> PassLaunch:
    """Fills grad_q [B, Hq, Sq, D] of the tokens of a pass, for the heads of their group."""
    constants = slot_constants(workspace.sizes)
    tensors = {"places_ptr": workspace.places, "partial_q_ptr": workspace.partial.q, "grad_q_ptr": grad_q}
    sizes = {"seqlen_q": grad_q.shape[2], "num_kv_heads": num_kv_heads, "topk": index.topk}
    arguments = {"index": index, **tensors, "first_range": 0, **sizes}
    options = Options(num_warps=max(1, min(8, constants.heads * constants.depth // 256)))
    grid = index.range_tokens, cdiv(constants.group_size, constants.heads), 0
    return PassLaunch(Launch(sum_slots_kernel, grid, arguments, {"C": constants}, options))


class KeySums(NamedTuple):
    """Sums and results of dK and dV, `rows` x `width` numbers each, more than 32 bits may count; all contiguous."""

    k: Any
    v: Any
    grad_k: Any
    grad_v: Any
    rows: Any
    width: Any


class LossSums(NamedTuple):
    """Sums and results of the index loss, all contiguous.

    grad_k has `rows` x `width` numbers, and so has each of `ranges` sums.
    losses: num_losses numbers, whose sum over `number`, a scalar, is the loss.
    """

    k: Any
    grad_k: Any
    ranges: Any
    rows: Any
    width: Any
    losses: Any
    num_losses: Any
    number: Any
    loss: Any


@triton.jit
def finish_kernel(keys, loss, size: tl.constexpr):
    """Write the results of the sums: program (i, 0) of dK, (i, 1) of dV, (i, 2) of index_k's gradient, (0, 3) the loss.

    A program owns `size` numbers; loss is None without one.
    """
    part = tl.arange(0, size)
    place = tl.program_id(0).to(tl.int64) * size + part
    mask = place < tl.cast(keys.rows, tl.int64) * keys.width
    if tl.program_id(1) == 0:
        tl.store(keys.grad_k + place, tl.load(keys.k + place, mask=mask).to(keys.grad_k.dtype.element_ty), mask=mask)
    elif tl.program_id(1) == 1:
        tl.store(keys.grad_v + place, tl.load(keys.v + place, mask=mask).to(keys.grad_v.dtype.element_ty), mask=mask)
    elif loss is not None:
        if tl.program_id(1) == 2:
            sums = tl.zeros([size], tl.float32)
            numbers = tl.cast(loss.rows, tl.int64) * loss.width
            for number in range(0, loss.ranges):
                sums += tl.load(loss.k + number * numbers + place, mask=place < numbers, other=0)
            tl.store(loss.grad_k + place, sums.to(loss.grad_k.dtype.element_ty), mask=place < numbers)
        elif tl.program_id(0) == 0:
            total = tl.zeros([size], tl.float64)
            for start in range(0, loss.num_losses, size):
                inside = start + part < loss.num_losses
                total += tl.load(loss.losses + start + part, mask=inside, other=0).to(tl.float64)
            mean = tl.sum(total, axis=0) / tl.load(loss.number).to(tl.float64)
            tl.store(loss.loss, mean.to(tl.float32))


def finish(sums: KeyGradients, k: Tensor, v: Tensor, loss: LossSums | None) -> tuple[Tensor, Tensor]:
    """The gradients of k and v in their dtypes; also fills what `loss` names."""
    rows = k.numel() // k.shape[3]
    keys = KeySums(sums.k, sums.v, k.new_empty(k.shape), v.new_empty(v.shape), rows, k.shape[3])
    size, numbers = 2048, max(k.numel(), 0 if loss is None else loss.rows * loss.width)
    grid = cdiv(numbers, size), 2 if loss is None else 4, 1
    Launch(finish_kernel, grid, {"keys": keys, "loss": loss}, {"size": size}).run()
    return keys.grad_k, keys.grad_v
