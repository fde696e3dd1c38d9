"""The end of the forward in KV-outer order (see `by_block`): a token's attention from that to each of its blocks."""

import triton
import triton.language as tl

from ..common.primitives import LN_2, await_previous
from ..common.target import padded


@triton.jit
def slots_lse(partial_lse_ptr, numbers, first_row, none, topk, GROUP_SIZE, HEADS: tl.constexpr, SLOTS: tl.constexpr):
    """[HEADS] fp32, base 2: the lse over all used slots of one token and group."""
    head = tl.arange(0, HEADS)
    row_max = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    for start in range(0, topk, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        used = tl.load(numbers + slot, mask=slot < topk, other=none) < none
        place = first_row + slot[:, None] * GROUP_SIZE + head[None, :]
        mask = used[:, None] & (head < GROUP_SIZE)[None, :]
        lse = tl.load(partial_lse_ptr + place, mask=mask, other=float("-inf"))
        new_max = tl.maximum(row_max, tl.max(lse, axis=0))
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        total = total * tl.exp2(row_max - shift) + tl.sum(tl.exp2(lse - shift[None, :]), axis=0)
        row_max = new_max
    return row_max + tl.log2(total)


@triton.jit
def combine_token(
    partial_ptr, partial_lse_ptr, numbers, first_row, out_ptr, lse_ptr, out_row, stride, none, topk,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr, DEPTH: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """out and lse of one token and group, from out_row on, heads being `stride` rows apart.

    They are its slots' partial outputs, weighted by exp2(their lse - lse).
    """
    lse = slots_lse(partial_lse_ptr, numbers, first_row, none, topk, GROUP_SIZE, HEADS, SLOTS)
    offset = tl.where(lse == float("-inf"), 0.0, lse)
    head, d = tl.arange(0, HEADS), tl.arange(0, DEPTH)[None, :]
    acc = tl.zeros([HEADS, DEPTH], tl.float32)
    # Copied into shared memory ahead of their use: the loads of an unrolled loop wait for one another.
    for slot in tl.range(0, topk, num_stages=4):
        # An unused slot has no heads to load.
        used = head < tl.where(tl.load(numbers + slot) < none, GROUP_SIZE, 0)
        place = first_row + slot * GROUP_SIZE + head
        weight = tl.exp2(tl.load(partial_lse_ptr + place, mask=used, other=float("-inf")) - offset)
        part = partial_ptr + place[:, None] * HEAD_DIM + d
        mask = used[:, None] & (d < HEAD_DIM)
        acc += weight[:, None] * tl.load(part, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    row = out_row + head.to(tl.int64) * stride
    out = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * HEAD_DIM + d, out, mask=(head < GROUP_SIZE)[:, None] & (d < HEAD_DIM))
    tl.store(lse_ptr + row, lse * LN_2, mask=head < GROUP_SIZE)


@triton.jit(do_not_specialize=["chunk", "none"])
def combine_slots_kernel(
    partial_ptr,
    partial_lse_ptr,
    numbers_ptr,
    skip_ptr,
    out_ptr,
    lse_ptr,
    chunk,
    seqlen_q,
    first_token,
    num_tokens,
    chunk_tokens,
    none,
    num_kv_heads,
    topk,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    SLOTS: tl.constexpr,
    TOKENS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`combine_token` for those of TOKENS tokens of a chunk whose skip is 0."""
    await_previous(OVERLAP)
    num_chunks = tl.cdiv(num_tokens, chunk_tokens)
    group, begin = tl.cast(chunk // num_chunks, tl.int64), chunk % num_chunks * chunk_tokens
    first, end = begin + tl.program_id(0) * TOKENS, tl.minimum(begin + chunk_tokens, num_tokens)
    skip_ptr += group * num_tokens
    tokens = first + tl.arange(0, TOKENS)
    # Where neighbours share, nearly all are left out: then there is little to launch, and one load to wait for.
    if tl.min(tl.load(skip_ptr + tokens, mask=tokens < end, other=1), axis=0) == 0:
        for token in range(first, tl.minimum(first + TOKENS, end)):
            if tl.load(skip_ptr + token) == 0:
                batch, query = (first_token + token) // seqlen_q, (first_token + token) % seqlen_q
                out_row = (tl.cast(batch, tl.int64) * num_kv_heads + group) * GROUP_SIZE * seqlen_q + query
                combine_token(
                    partial_ptr, partial_lse_ptr, numbers_ptr + (group * num_tokens + token) * topk,
                    (token - begin) * topk * GROUP_SIZE, out_ptr, lse_ptr, out_row, seqlen_q, none, topk,
                    GROUP_SIZE, HEAD_DIM, HEADS, DEPTH, SLOTS,
                )  # fmt: skip


def combine_constants(group_size: int, head_dim: int, topk: int) -> dict[str, int]:
    """The compile-time arguments of `combine_slots_kernel`, but for OVERLAP."""
    return {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "HEADS": triton.next_power_of_2(group_size),
        "DEPTH": padded(head_dim),
        "SLOTS": min(64, triton.next_power_of_2(topk)),
        # With more tokens a program, what is read at once lies further apart, and memory is slower.
        "TOKENS": 2,
    }
