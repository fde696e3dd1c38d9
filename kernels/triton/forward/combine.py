"""The end of the key-major order: a token's attention, from its partial results (see `key_major`)."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..common.launch import Launch, Options
from ..common.overlap import await_previous
from ..common.sizes import Sizes, sizes_of
from ..common.softmax import LN_2
from ..common.target import Target
from ..schedule.inverse_index import InverseIndex, find_token_range
from .records import Partial, Results, result_place


@dataclass(frozen=True)
class CombineConstants(Sizes):
    """Constants of `combine_kernel`.

    rows: per program, of `tokens` neighbouring tokens or of one of the `parts` of a token's heads; slots: read at once.
    """

    rows: int
    tokens: int
    parts: int
    slots: int
    overlap: bool


@triton.jit
def used_slots(numbers, start, live, none, topk, C: tl.constexpr):
    """A tuple of C.slots masks [rows]: whether slots from `start` on hold an entry."""
    SLOTS: tl.constexpr = C.slots
    used = ()
    for number in tl.static_range(SLOTS):
        inside = live & (start + number < topk)
        used += (inside & (tl.load(numbers + start + number, mask=inside, other=none) < none),)  # type: ignore[assignment]
    return used


@triton.jit
def combine_rows(partial, numbers, first_place, live, none, topk, C: tl.constexpr):
    """(out [rows, depth], lse in base 2) of query rows: their slots' partial results, weighted by exp2(their lse).

    topk: C.topk, but at run time, so that the compiler does not unroll the loop. numbers: where the lists of each row's
    slots are; first_place: each row's first partial result; rows that are not live load nothing.
    """
    ROWS: tl.constexpr = C.rows
    DEPTH: tl.constexpr = C.depth
    SLOTS: tl.constexpr = C.slots
    d = tl.arange(0, DEPTH)[None, :]
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DEPTH], tl.float32)
    used = used_slots(numbers, 0, live, none, topk, C)
    for start in range(0, topk, SLOTS):
        # All are loaded before any is added: loads between sums would wait for one another.
        parts = ()
        lse = ()
        for number in tl.static_range(SLOTS):
            place = first_place + (start + number) * C.group_size
            lse += (tl.load(partial.lse + place, mask=used[number], other=float("-inf")),)  # type: ignore[assignment]
            part, mask = partial.out + (place * C.head_dim)[:, None] + d, used[number][:, None] & (d < C.head_dim)
            # Read once: the lse, and what others read, are to stay in the L2 cache.
            vectors = tl.load(part, mask=mask, other=0.0, eviction_policy="evict_first")
            parts += (vectors,)  # type: ignore[assignment]
        # Loaded together with these, so that the next loads need not wait for it.
        used = used_slots(numbers, start + SLOTS, live, none, topk, C)
        new_max = row_max
        for number in tl.static_range(SLOTS):
            new_max = tl.maximum(new_max, lse[number])
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        decay = tl.exp2(row_max - shift)
        total, acc, row_max = total * decay, acc * decay[:, None], new_max
        for number in tl.static_range(SLOTS):
            weight = tl.exp2(lse[number] - shift)
            total += weight
            acc += weight[:, None] * parts[number].to(tl.float32)
    return acc * tl.where(total == 0.0, 0.0, 1.0 / total)[:, None], row_max + tl.log2(total)


@triton.jit
def combine_kernel(partial, skip_ptr, results, index, first_range, C: tl.constexpr):
    """`combine_rows` for those of a pass's tokens whose skip is 0.

    Program (i * C.parts + part, n) owns C.tokens tokens of range n, or a part of the heads of one.
    """
    await_previous(C.overlap)
    token_range = find_token_range(index, first_range + tl.program_id(1), C.topk)
    # Tokens are counted from the index's first one.
    begin, num_tokens = (token_range.first_token - index.first_token).to(tl.int32), token_range.num_tokens.to(tl.int32)
    row = tl.arange(0, C.rows)
    head = tl.program_id(0) % C.parts * C.rows + row % C.group_size
    local = tl.program_id(0) // C.parts * C.tokens + row // C.group_size
    live = (row < C.tokens * C.group_size) & (head < C.group_size) & (local < num_tokens)
    skip = skip_ptr + token_range.group * index.num_tokens + begin + local
    live &= tl.load(skip, mask=live, other=1) == 0
    # Where neighbours share, nearly all are left out.
    if tl.max(live.to(tl.int32), axis=0) > 0:
        numbers = index.numbers + (token_range.group * index.num_tokens + begin + local) * C.topk
        first_place = (tl.program_id(1) * index.range_tokens + local) * (C.topk * C.group_size) + head
        out, lse = combine_rows(partial, numbers, first_place, live, index.none, index.topk, C)
        position = index.first_token + begin + local
        batch, query = position // results.seqlen_q, position % results.seqlen_q
        place = result_place(results, batch, token_range.group, head, query, C.group_size)
        d = tl.arange(0, C.depth)[None, :]
        mask = live[:, None] & (d < C.head_dim)
        out_ptr = results.out.ptr
        tl.store(out_ptr + place.out[:, None] + d, out.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(results.lse + place.lse, lse * LN_2, mask=live)


@functools.lru_cache
def combine_constants(problem: Problem, target: Target) -> CombineConstants:
    """Constants of `combine_kernel`: a program takes 1024 numbers of a slot, or the vector of one head."""
    sizes = sizes_of(problem)
    rows = max(1, 1024 // sizes["depth"])
    tokens = max(1, rows // problem.group_size)
    return CombineConstants(
        **sizes,
        rows=rows,
        tokens=tokens,
        parts=triton.cdiv(problem.group_size, rows),
        # Rows of several tokens have lists of their own, whose loads are not shared: 2 were measured to be best.
        slots=min(4 if tokens == 1 else 2, triton.next_power_of_2(sizes["topk"])),
        overlap=target.overlaps,
    )


def launch(
    partial: Partial, index: InverseIndex, skip: torch.Tensor, results: Results, problem: Problem, target: Target
) -> Launch:
    """The launch that fills the results of a pass's tokens whose skip [Hkv, B*Sq] is 0, but for its ranges."""
    constants = combine_constants(problem, target)
    grid = triton.cdiv(index.range_tokens, constants.tokens) * constants.parts, 1, 1
    tensors = {"partial": partial, "skip_ptr": skip, "results": results}
    arguments = {**tensors, "index": index, "first_range": 0}
    # Each thread loads 16 bytes of a slot.
    num_warps = max(1, min(8, constants.rows * constants.depth * problem.element_size // 512))
    return Launch(combine_kernel, grid, arguments, {"C": constants}, Options(num_warps, overlap=constants.overlap))
