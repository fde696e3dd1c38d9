"""The softmax of a tile's scores, in base 2: of whole rows, and online."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softmax_rows(scores, count, scale, positive: tl.constexpr, masked: tl.constexpr):
    """(weights, 1 / their sums, lse in base 2) of scores [ROWS, COLUMNS], of which row r sees the first count[r].

    Without `masked`, all rows see the whole tile.
    """
    if not positive:
        scores, scale = scores * scale, 1.0
    if masked:
        scores = tl.where(tl.arange(0, scores.shape[1])[None, :] < count[:, None], scores, float("-inf"))
    # A positive scale is multiplied in after the maximum, together with the subtraction of it.
    row_max = tl.max(scores, axis=1) * scale
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    weights = tl.exp2(scores * scale - shift[:, None])
    row_sum = tl.sum(weights, axis=1)
    return weights, tl.where(row_sum > 0, 1.0 / row_sum, 0.0), row_max + tl.log2(row_sum)


@triton.jit
def softmax_update(acc, row_max, row_sum, scores, v, v_scales):
    """Online softmax, base 2: fold scores `[M, N]` (-inf: not seen) and values `[N, D]` into the running state.

    v_scales [1, N], or 1: what the values are still to be multiplied by.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    precision: tl.constexpr = "ieee" if v.dtype == tl.float32 else "tf32"
    acc = tl.dot((weights * v_scales).to(v.dtype), v, acc * decay[:, None], input_precision=precision)
    return acc, new_max, row_sum
