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
from .records import Partial, Results, result_row


@dataclass(frozen=True)
class CombineConstants(Sizes):
    """Constants of `combine_kernel`; heads: G, padded; slots: read at once; tokens: per program.

    stages: of partial outputs, on their way in shared memory.
    """

    heads: int
    slots: int
    tokens: int
    stages: int
    overlap: bool


@triton.jit
def total_lse(lse_ptr, numbers, first_row, none, C: tl.constexpr):
    """[heads] fp32, base 2: the lse over all used slots of one token and group."""
    HEADS: tl.constexpr = C.heads
    head = tl.arange(0, HEADS)
    row_max = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in range(0, C.topk, C.slots):
        slot = start + tl.arange(0, C.slots)
        used = tl.load(numbers + slot, mask=slot < C.topk, other=none) < none
        place = first_row + slot[:, None] * C.group_size + head[None, :]
        mask = used[:, None] & (head < C.group_size)[None, :]
        lse = tl.load(lse_ptr + place, mask=mask, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(lse, axis=0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        total = total * tl.exp2(row_max - shift) + tl.sum(tl.exp2(lse - shift[None, :]), axis=0)
        row_max = new_max
    return row_max + tl.log2(total)


@triton.jit
def combine_token(partial, numbers, first_row, results, out_row, none, topk, C: tl.constexpr):
    """out and lse of one token and group: its slots' partial results, weighted by exp2(their lse - lse).

    topk: C.topk, but at run time, so that the compiler does not unroll the loop. numbers: of its slots' lists;
    first_row: of its partial results; out_row: of its first head in the results.
    """
    HEADS: tl.constexpr = C.heads
    DEPTH: tl.constexpr = C.depth
    lse = total_lse(partial.lse, numbers, first_row, none, C)
    offset = tl.where(lse == float("-inf"), 0.0, lse)
    head, d = tl.arange(0, HEADS), tl.arange(0, DEPTH)[None, :]
    acc = tl.zeros([HEADS, DEPTH], tl.float32)
    # Copied into shared memory ahead of their use: the loads of an unrolled loop wait for one another.
    for slot in tl.range(0, topk, num_stages=C.stages):
        # An unused slot has no heads to load.
        used = head < tl.where(tl.load(numbers + slot) < none, C.group_size, 0)
        place = first_row + slot * C.group_size + head
        weight = tl.exp2(tl.load(partial.lse + place, mask=used, other=float("-inf")) - offset)
        part = partial.out + place[:, None] * C.head_dim + d
        mask = used[:, None] & (d < C.head_dim)
        acc += weight[:, None] * tl.load(part, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    row = out_row + head.to(tl.int64) * results.seqlen_q
    out = acc.to(results.out.dtype.element_ty)
    mask = (head < C.group_size)[:, None] & (d < C.head_dim)
    tl.store(results.out + row[:, None] * C.head_dim + d, out, mask=mask)
    tl.store(results.lse + row, lse * LN_2, mask=head < C.group_size)


@triton.jit
def combine_kernel(partial, skip_ptr, results, index, first_range, C: tl.constexpr):
    """`combine_token` for those of a pass's tokens whose skip is 0. Program (i, n) owns C.tokens tokens of range n."""
    await_previous(C.overlap)
    token_range = find_token_range(index, first_range + tl.program_id(1), C.topk)
    # Tokens are counted from the index's first one.
    begin = (token_range.first_token - index.first_token).to(tl.int32)
    first, end = begin + tl.program_id(0) * C.tokens, begin + token_range.num_tokens.to(tl.int32)
    skip_ptr += token_range.group * index.num_tokens
    tokens = first + tl.arange(0, C.tokens)
    # Where neighbours share, nearly all are left out: then there is little to launch, and one load to wait for.
    if tl.min(tl.load(skip_ptr + tokens, mask=tokens < end, other=1), axis=0) == 0:
        for token in range(first, tl.minimum(first + C.tokens, end)):
            if tl.load(skip_ptr + token) == 0:
                position = index.first_token + token
                batch, query = position // results.seqlen_q, position % results.seqlen_q
                out_row = result_row(results, batch, token_range.group, 0, query, C.group_size)
                slots = index.numbers + (token_range.group * index.num_tokens + token) * C.topk
                first_row = (tl.program_id(1) * index.range_tokens + token - begin) * C.topk * C.group_size
                combine_token(partial, slots, first_row, results, out_row, index.none, index.topk, C)


@functools.lru_cache
def combine_constants(problem: Problem, target: Target) -> CombineConstants:
    """Constants of `combine_kernel`."""
    sizes, heads = sizes_of(problem), triton.next_power_of_2(problem.group_size)
    # Only NVIDIA GPUs copy ahead into shared memory: a slot of all heads per stage but one, beside a little else.
    room = (target.shared_memory - 2048) // (heads * sizes["depth"] * problem.element_size)
    return CombineConstants(
        **sizes,
        heads=heads,
        slots=min(64, triton.next_power_of_2(sizes["topk"])),
        # With more tokens per program, what is read at once lies further apart, and memory is slower.
        tokens=2,
        stages=max(1, min(4, 1 + room)) if target.backend == "cuda" else 4,
        overlap=target.overlaps,
    )


def launch(
    partial: Partial, index: InverseIndex, skip: torch.Tensor, results: Results, problem: Problem, target: Target
) -> Launch:
    """The launch that fills the results of a pass's tokens whose skip [Hkv, B*Sq] is 0, but for its ranges."""
    constants = combine_constants(problem, target)
    grid = triton.cdiv(index.range_tokens, constants.tokens), 1, 1
    tensors = {"partial": partial, "skip_ptr": skip, "results": results}
    arguments = {**tensors, "index": index, "first_range": 0}
    return Launch(combine_kernel, grid, arguments, {"C": constants}, Options(overlap=constants.overlap))
