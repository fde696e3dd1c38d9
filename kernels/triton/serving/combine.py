"""The end of a decoding step's attention (see `decode`), where the chosen blocks were split between programs."""

import torch
import triton
import triton.language as tl

from ..common.primitives import LN_2, LOG2_E, announce_next, await_previous
from ..common.target import Target, padded


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    partial_out_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    num_splits,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out and lse of one query row from partials: lse = log sum_s exp(lse_s), out = sum_s exp(lse_s - lse) out_s."""
    announce_next(OVERLAP)
    await_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    depth = tl.arange(0, DEPTH)
    place = row * num_splits + split
    lse = tl.load(partial_lse_ptr + place, mask=split < num_splits, other=float("-inf"))
    live = (split < num_splits)[:, None] & (depth < HEAD_DIM)[None, :]
    partial = tl.load(partial_out_ptr + place[:, None] * HEAD_DIM + depth[None, :], mask=live, other=0.0)
    largest = tl.max(lse, axis=0)
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weights = tl.exp2((lse - shift) * LOG2_E)
    total = tl.sum(weights, axis=0)
    out = tl.sum(partial * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + depth, out.to(out_ptr.dtype.element_ty), mask=depth < HEAD_DIM)
    tl.store(lse_ptr + row, tl.where(total > 0.0, shift + tl.log2(total) * LN_2, float("-inf")))


def combine_warps(splits: int, depth: int) -> int:
    """Warps of `combine_kernel`: as few as hold the partials, for one alone has no other to wait for."""
    return max(1, splits * depth // 4096)


def combine_splits(
    partial_out: torch.Tensor, partial_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, target: Target
) -> None:
    """Write out [B, Hq, Sq, D] and lse from partial_out [B * Hq * Sq, splits, D] and partial_lse."""
    num_rows, num_splits, head_dim = partial_out.shape
    splits, depth = triton.next_power_of_2(num_splits), padded(head_dim)
    combine_kernel[(num_rows,)](
        partial_out,
        partial_lse,
        out,
        lse,
        num_splits,
        HEAD_DIM=head_dim,
        SPLITS=splits,
        DEPTH=depth,
        **target.overlap(),
        num_warps=combine_warps(splits, depth),
    )
