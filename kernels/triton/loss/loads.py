"""Records that the index loss's kernels share, and how they load a part of a block, entries and their queries."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import View
from ..common.tiles import load_tile
from ..schedule.inverse_index import InverseIndex, find_token_range
from ..schedule.work_items import WorkItem, WorkItems, item_entries, load_item
from .config import LossConfig, LossConstants


class Sizes(NamedTuple):
    """B, Hkv, G, Sq, Sk, and the scales in base 2: numbers that the kernels take at run time."""

    batch: int
    num_kv_heads: int
    group_size: int
    seqlen_q: int
    seqlen_k: int
    scale: float
    index_scale: float


class Buffers(NamedTuple):
    """Contiguous: what the kernels of a pass read and write beside the gradients; fp32 but for the teacher.

    lse [B*Sq, Hq]: the main branch's, natural, or else teacher, see there; partial_lse [entry of the pass, part] and
    index_lse [token of the pass]: the student's, base 2; losses [token range, item, part].
    """

    lse: torch.Tensor | None
    teacher: torch.Tensor | None
    partial_lse: torch.Tensor
    index_lse: torch.Tensor
    losses: torch.Tensor


class Gradients(NamedTuple):
    """Where gradients go, all contiguous; None stands for a call without gradients.

    unit: their factor, fp32; grad_q [B, Hkv, Sq, Di] and partial_q [entry of the pass, part, Di], of one dtype; grad_k
    [range of a pass, B, Sk, Di], since groups share index keys, and partial_k [slot of the work items, part, columns,
    Di], fp32.
    """

    unit: torch.Tensor
    grad_q: torch.Tensor
    grad_k: torch.Tensor
    partial_q: torch.Tensor
    partial_k: torch.Tensor


class PartEntries(NamedTuple):
    """The entries that a program works on: where they are, their number, and what they are counted from.

    first_entry: of the pass; first_query: what entry // topk is added to; group: int64; x_base: the rows of index_q.
    """

    entries_ptr: Any
    number: Any
    first_entry: Any
    first_query: Any
    group: Any
    x_base: Any


@dataclass(frozen=True)
class LossCall:
    """The arguments of the kernels for one index, with config and constants.

    q, k: None where the teacher is given; gradients: None for the loss alone.
    """

    q: View | None
    k: View | None
    index_q: View
    index_k: View
    buffers: Buffers
    index: InverseIndex
    items: WorkItems
    gradients: Gradients | None
    sizes: Sizes
    config: LossConfig
    constants: LossConstants

    def arguments(self, kernel: Any) -> dict[str, Any]:
        """The arguments of a kernel for the first pass, by the names of its parameters."""
        fields = vars(self)
        return {name: fields[name] for name in kernel.arg_names if name in fields} | {"first_range": 0}


@triton.jit
def load_part(items, first_range, columns: tl.constexpr):
    """WorkItem program_id(0) of range program_id(2) of a pass, but with the keys of part program_id(1) of its block.

    A part past the end has none.
    """
    item = load_item(items, first_range, tl.program_id(2))
    first_key = item.first_key + tl.program_id(1) * columns
    stop_key = tl.minimum(item.stop_key, first_key + columns)
    return WorkItem(item.batch, first_key, stop_key, item.shift, item.begin, item.stop, item.slot, item.block)


@triton.jit
def find_entries(part, index_q, index, items, sizes, first_range):
    """The PartEntries of a part, in range program_id(2) of a pass."""
    number = tl.program_id(2)
    first_entry = find_token_range(index, first_range, index.topk).first_entry
    tokens = find_token_range(index, first_range + number, index.topk)
    x_base = index_q.ptr + part.batch * index_q.stride_b + tokens.group * index_q.stride_h
    first_query = (tokens.first_token - part.batch * sizes.seqlen_q).to(tl.int32) - number * index.range_tokens
    entries_ptr = item_entries(index, items, first_range, number, part.begin)
    return PartEntries(entries_ptr, part.stop - part.begin, first_entry, first_query, tokens.group, x_base)


@triton.jit
def load_index_keys(index_k, part, C: tl.constexpr):
    """The index keys of a part, [columns, index_depth], zero past its last key."""
    base = index_k.ptr + part.batch * index_k.stride_b
    num_keys, stride_s, stride_d = part.stop_key - part.first_key, index_k.stride_s, index_k.stride_d
    return load_tile(base, part.first_key, num_keys, stride_s, stride_d, C.columns, C.index_head_dim, C.index_depth)


@triton.jit
def load_rows(base, query, stride_s, stride_d, head_dim: tl.constexpr, depth: tl.constexpr):
    """The vectors of queries [ROWS] as a tile [ROWS, depth]."""
    d = tl.arange(0, depth)
    rows = base + query.to(tl.int64)[:, None] * stride_s + d.to(tl.int64)[None, :] * stride_d
    if head_dim == depth:
        return tl.load(rows)
    else:
        return tl.load(rows, mask=(d < head_dim)[None, :], other=0.0)


@triton.jit
def load_entries(entries_ptr, number, num_entries, first_entry):
    """Entries `number` of a work item, counted from the pass's first, int32; past its end, the last again."""
    place = entries_ptr + tl.minimum(number, num_entries - 1)
    # The low halves suffice, because the difference fits.
    return tl.load(place).to(tl.int32) - first_entry.to(tl.int32)
