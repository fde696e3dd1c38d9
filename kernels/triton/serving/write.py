"""Write new tokens of an engine's sequences into pages, each to a slot that the engine names, in one launch.

Slot s is place s % page_size of page s // page_size; a slot that is negative, or past the last page, is skipped. e4m3
pages get quantized vectors with a scale each (see `fp8`), or, without scales, the nearest numbers of e4m3's range; int8
pages of index keys get quantized vectors (see `int8`).

Layouts: k, v [1, Hkv, T, D], index_k [1, 1, T, Di] and pages [num_pages, heads, page_size, D], any strides; scales
[num_pages, heads, page_size] contiguous; slots [T]. Program i owns tokens i * TOKENS .., all heads. Each token is read
and written once.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import Launch, view
from ..common.overlap import announce_next, await_previous
from ..common.target import Target, target_of
from .append import VectorConstants, Vectors, copy_vectors, vector_sizes


class Slot(NamedTuple):
    """Where a token goes: its number through all pages, its page, its place in it, and whether there is such a page."""

    number: Any
    page: Any
    key: Any
    exists: Any


@dataclass(frozen=True)
class WriteConstants(VectorConstants):
    """Constants of `write_kernel`."""

    page_size: int


@triton.jit
def load_slots(slots, slot_stride, token, num_tokens, num_pages, page_size: tl.constexpr):
    """The Slots of tokens [N]."""
    number = tl.load(slots + token.to(tl.int64) * slot_stride, mask=token < num_tokens, other=-1).to(tl.int64)
    page = number // page_size
    return Slot(number, page, number % page_size, (number >= 0) & (page < num_pages))


@triton.jit
def write_kernel(keys, values, index_keys, slots, slot_stride, num_tokens, num_pages, num_kv_heads, C: tl.constexpr):
    """See the module's docstring. Grid (tiles of tokens,)."""
    announce_next(C.overlap)
    await_previous(C.overlap)
    first = tl.program_id(0) * C.tokens
    lane = tl.arange(0, C.tokens * C.heads)
    token, head = first + lane // C.heads, (lane % C.heads).to(tl.int64)
    slot = load_slots(slots, slot_stride, token, num_tokens, num_pages, C.page_size)
    number = (slot.page * num_kv_heads + head) * C.page_size + slot.key
    live = slot.exists & (head < num_kv_heads)
    token = token.to(tl.int64)
    copy_vectors(keys, 0, head, token, slot.page, slot.key, number, live, C.head_dim, C.depth)
    copy_vectors(values, 0, head, token, slot.page, slot.key, number, live, C.head_dim, C.depth)
    token = first + tl.arange(0, C.tokens)
    slot = load_slots(slots, slot_stride, token, num_tokens, num_pages, C.page_size)
    token = token.to(tl.int64)
    copy_vectors(
        index_keys, 0, 0, token, slot.page, slot.key, slot.number, slot.exists, C.index_head_dim, C.index_depth
    )


@functools.lru_cache
def write_constants(
    num_kv_heads: int, head_dim: int, index_head_dim: int, page_size: int, one: bool, target: Target
) -> WriteConstants:
    """Constants of `write_kernel`; one: tokens are few, and each gets a program."""
    sizes = vector_sizes(num_kv_heads, head_dim, index_head_dim, one, target)
    return WriteConstants(**sizes, page_size=page_size)


def write_pages(
    k: torch.Tensor,
    v: torch.Tensor,
    index_k: torch.Tensor,
    slots: torch.Tensor,
    pages_k: torch.Tensor,
    pages_v: torch.Tensor,
    pages_index_k: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    index_k_scale: torch.Tensor | None,
    factors: tuple[float, float, float],
) -> None:
    """Write the new tokens, as the module's docstring says; factors: of numbers that become e4m3 without scales."""
    _, num_kv_heads, num_tokens, head_dim = k.shape
    if num_tokens == 0:
        return
    target = target_of(k.device)
    one = num_tokens <= 4 * target.num_sms
    constants = write_constants(num_kv_heads, head_dim, index_k.shape[3], pages_k.shape[2], one, target)
    Launch(
        write_kernel,
        (triton.cdiv(num_tokens, constants.tokens), 1, 1),
        {
            "keys": Vectors(view(k), view(pages_k), k_scale, factors[0]),
            "values": Vectors(view(v), view(pages_v), v_scale, factors[1]),
            "index_keys": Vectors(view(index_k), view(pages_index_k), index_k_scale, factors[2]),
            "slots": slots,
            "slot_stride": slots.stride(0),
            "num_tokens": num_tokens,
            "num_pages": pages_k.shape[0],
            "num_kv_heads": num_kv_heads,
        },
        {"C": constants},
        constants.options,
    ).run()
