"""Records that the index loss's kernels share, and how they load a part of a block, entries and their queries."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..common.launch import View
from ..schedule.inverse_index import InverseIndex
from ..schedule.work_items import WorkItem, WorkItems, load_item
from .config import LossConfig, LossConstants


class Sizes(NamedTuple):
    """Hkv, G, Sq, Sk, and the scales in base 2: numbers that the kernels take at run time."""

    num_kv_heads: int
    group_size: int
    seqlen_q: int
    seqlen_k: int
    scale: float
    index_scale: float


class Buffers(NamedTuple):
    """fp32 and contiguous: what the kernels of a token range read and write beside the gradients.

    lse [B*Sq, Hq]: the main branch's, natural; partial_lse [entry of the token range, part] and index_lse [token of the
    range]: the student's, base 2; losses [token range, item, part].
    """

    lse: torch.Tensor
    partial_lse: torch.Tensor
    index_lse: torch.Tensor
    losses: torch.Tensor


class Gradients(NamedTuple):
    """Where gradients go, all fp32 and contiguous; None stands for a call without gradients.

    unit: their factor, index_scale / count; grad_q [B, Hkv, Sq, Di], grad_k [B, 1, Sk, Di]; partial_q
    [entry of the token range, part, Di]; partial_k [slot of the work items, part, columns, Di].
    """

    unit: torch.Tensor
    grad_q: torch.Tensor
    grad_k: torch.Tensor
    partial_q: torch.Tensor
    partial_k: torch.Tensor


@dataclass(frozen=True)
class LossCall:
    """The arguments of the kernels for one index, with config and constants; gradients: None for the loss alone."""

    q: View
    k: View
    index_q: View
    index_k: View
    buffers: Buffers
    index: InverseIndex
    items: WorkItems
    gradients: Gradients | None
    sizes: Sizes
    config: LossConfig
    constants: LossConstants

    def arguments(self, kernel: Any, range_number: int) -> dict[str, Any]:
        """The arguments of a kernel for a token range, by the names of its parameters."""
        fields = vars(self)
        return {name: fields[name] for name in kernel.arg_names if name in fields} | {"range_number": range_number}


@triton.jit
def load_part(items, range_number, columns: tl.constexpr):
    """WorkItem program_id(0), but with the keys of part program_id(1) of its block; a part past the end has none."""
    item = load_item(items, range_number)
    first_key = item.first_key + tl.program_id(1) * columns
    stop_key = tl.minimum(item.stop_key, first_key + columns)
    return WorkItem(item.batch, first_key, stop_key, item.shift, item.begin, item.stop, item.slot, item.block)


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
    """Entries `number` of a work item, counted from the token range's first, int32; past its end, the last again."""
    place = entries_ptr + tl.minimum(number, num_entries - 1)
    # The low halves suffice, because the difference fits.
    return tl.load(place).to(tl.int32) - first_entry.to(tl.int32)
