"""The end of the attention of a decoding step (see `attend`), where programs shared the chosen blocks of a query.

    lse = log sum_s exp(lse_s),  out = sum_s exp(lse_s - lse) out_s     over the splits s of a query head

Layouts: partial out [B, Hq, Sq, num_splits, D] and lse [B, Hq, Sq, num_splits], and lse [B, Hq, Sq], contiguous; out
[B, Hq, Sq, D], any strides but the last; lse and partial results are fp32. A program owns one query head. Cost:
num_splits * D numbers are read per query head, from L2, where they have just been written.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...problem import Problem
from ..common.launch import Launch, Options, view
from ..common.overlap import announce_next, await_previous
from ..common.softmax import LN_2, LOG2_E
from ..common.target import Target, padded
from .config import AttendConfig, max_splits

# Up to so many splits take the first variant of constants: it holds a quarter of what M3's most splits, 32, need.
FEW_SPLITS = 8


@dataclass(frozen=True)
class CombineConstants:
    """Constants of `combine_kernel`; splits: no fewer than the splits of a call, a power of two; depth: D, padded."""

    head_dim: int
    depth: int
    splits: int
    overlap: bool


@triton.jit
def combine_kernel(partial_out_ptr, partial_lse_ptr, out, lse_ptr, num_splits, C: tl.constexpr):
    """See the module's docstring. Grid (Sq, Hq, B)."""
    announce_next(C.overlap)
    await_previous(C.overlap)
    query, head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (batch * tl.num_programs(1) + head) * tl.num_programs(0) + query
    split = tl.arange(0, C.splits)
    depth = tl.arange(0, C.depth)
    place = row * num_splits + split
    lse = tl.load(partial_lse_ptr + place, mask=split < num_splits, other=float("-inf"))
    live = (split < num_splits)[:, None] & (depth < C.head_dim)[None, :]
    partial = tl.load(partial_out_ptr + place[:, None] * C.head_dim + depth[None, :], mask=live, other=0.0)
    largest = tl.max(lse, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2((lse - shift) * LOG2_E)
    total = tl.sum(weights, axis=0)
    mean = tl.sum(partial * weights[:, None], axis=0) / tl.where(total != 0.0, total, 1.0)
    to = out.ptr + batch * out.stride_b + head * out.stride_h + query * out.stride_s
    tl.store(to + depth, mean.to(out.ptr.dtype.element_ty), mask=depth < C.head_dim)
    tl.store(lse_ptr + row, tl.where(total != 0.0, shift + tl.log2(total) * LN_2, float("-inf")))


@functools.lru_cache
def combine_constants(problem: Problem, target: Target, config: AttendConfig) -> CombineConstants:
    """Constants of `combine_kernel`, of one of two variants: up to FEW_SPLITS splits, or up to the most of any call."""
    most = max(config.num_splits, max_splits(problem, config.columns))
    splits = triton.next_power_of_2(FEW_SPLITS if config.num_splits <= FEW_SPLITS else most)
    return CombineConstants(problem.head_dim, padded(problem.head_dim), splits, target.overlaps)


def combine_splits(
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    constants: CombineConstants,
) -> None:
    """Write out and lse from the partial results, as the module's docstring says."""
    batch, num_heads, seqlen_q, num_splits = partial_lse.shape
    arguments = {"partial_out_ptr": partial_out, "partial_lse_ptr": partial_lse, "out": view(out), "lse_ptr": lse}
    # As few warps as hold the partial results, because one warp does not wait for others.
    options = Options(max(1, constants.splits * constants.depth // 4096), overlap=constants.overlap)
    grid = seqlen_q, num_heads, batch
    Launch(combine_kernel, grid, arguments | {"num_splits": num_splits}, {"C": constants}, options).run()
