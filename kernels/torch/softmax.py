"""Softmax over the blocks of a row one after another, and the attention with its weights.

With S the scores of a row, out = sum_j e^(S_j) v_j / sum_j e^(S_j) and lse = ln sum_j e^(S_j). ``PlainAttention`` adds
up exactly these sums, in half the passes over the scores that ``OnlineAttention`` needs. Its results are exact while
lse stays within +-55, as in layers that normalise their queries and keys, and ``is_exact`` finds the rows where they
are not. ``OnlineAttention`` accepts any scores, and keeps each row's partial result normalised.

Rows are numbered as in ``packing``: one per token and group, G heads per row, the last one for padding.
"""

import math

import torch
from torch import Tensor

from flexmsa.kernels.torch.packing import Scratch
from flexmsa.kernels.torch.tile import Tile

# For plain sums: 2^80 or 2^-80 leaves room in float32 for weights that are 2^46 times smaller, and for the values.
_LARGEST_LSE = 80.0 * math.log(2)


class OnlineSoftmax:
    """The logsumexp [num_rows + 1, G] of each row's and head's scores so far."""

    def __init__(self, num_rows: int, group_size: int, scratch: Scratch) -> None:
        self._scratch = scratch
        self.lse = torch.full((num_rows + 1, group_size), -torch.inf, dtype=scratch.dtype)

    def update(self, tile: Tile, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Add scores [C, T * G, block_size]; returns their softmax, and the weight [C, T * G, 1] of this block.

        A result so far becomes (1 - weight) * result + weight * this block's result. Softmax is one fused pass, whose
        largest value gives the logsumexp: it is exp(maximum - logsumexp).
        """
        maximum = scores.amax(-1, keepdim=True)
        if maximum.min() == -torch.inf:
            # Every score of a row is -inf: the block must get the weight 0, not NaN.
            lowest = torch.finfo(scores.dtype).min
            scores.clamp_(min=lowest)
            maximum.clamp_(min=lowest)
        probs = torch.softmax(scores, -1, out=self._scratch.take("probs", *scores.shape))
        new = maximum.sub_(probs.amax(-1, keepdim=True).log_())
        old = tile.column(self.lse)
        lse = torch.logaddexp(old, new)
        self.lse.index_copy_(0, tile.rows, lse.view(-1, self.lse.shape[1]))
        return probs, new.sub_(old).sigmoid_()


class OnlineAttention:
    """out [num_rows + 1, G * D] and lse [num_rows + 1, G] over the blocks so far; before the first, 0 and -inf."""

    def __init__(self, num_rows: int, group_size: int, head_dim: int, scratch: Scratch) -> None:
        self._scratch = scratch
        self._softmax = OnlineSoftmax(num_rows, group_size, scratch)
        self._out = scratch.take("out_rows", num_rows + 1, group_size * head_dim).zero_()

    def add(self, tile: Tile, scores: Tensor, v_blocks: Tensor) -> None:
        """Add the scores [C, T * G, block_size] of the tile's blocks."""
        probs, weight = self._softmax.update(tile, scores)
        before = tile.gather(self._out, self._scratch, "before", self._softmax.lse.shape[1])
        merged = torch.bmm(probs, tile.operand(v_blocks), out=self._scratch.take("merged", *before.shape))
        torch.lerp(before, merged, weight, out=merged)
        self._out.index_copy_(0, tile.rows, merged.view(-1, self._out.shape[1]))

    def finish(self) -> tuple[Tensor, Tensor]:
        return self._out, self._softmax.lse


class PlainAttention:
    """The same results from plain sums. Scores are in base 2, as exp2 is cheaper than exp."""

    def __init__(self, num_rows: int, group_size: int, head_dim: int, scratch: Scratch) -> None:
        self._scratch = scratch
        self._sums = torch.zeros(num_rows + 1, group_size, dtype=scratch.dtype)
        self._out = scratch.take("out_rows", num_rows + 1, group_size * head_dim).zero_()

    @staticmethod
    def is_exact(out: Tensor, lse: Tensor) -> Tensor:
        """Whether each row of out [..., D] and lse [...] is exact up to rounding; False for rows without keys."""
        # A finite sum implies finite terms. If finite terms overflow in the sum, a row is computed again needlessly.
        return (lse.abs() <= _LARGEST_LSE) & out.sum(-1).isfinite()

    def add(self, tile: Tile, scores: Tensor, v_blocks: Tensor) -> None:
        """Add the scores [C, T * G, block_size] of the tile's blocks; they are overwritten."""
        weights = scores.exp2_()
        self._sums.index_add_(0, tile.rows, weights.sum(-1).view(-1, self._sums.shape[1]))
        out = tile.gather(self._out, self._scratch, "before", self._sums.shape[1])
        torch.baddbmm(out, weights, tile.operand(v_blocks), out=out)
        self._out.index_copy_(0, tile.rows, out.view(-1, self._out.shape[1]))

    def finish(self) -> tuple[Tensor, Tensor]:
        # A row without keys has the sum 0 and stays 0. All other sums are far larger than `tiny`.
        tiny = torch.finfo(self._sums.dtype).tiny
        self._out.unflatten(1, (self._sums.shape[1], -1)).div_((self._sums + tiny)[..., None])
        return self._out, self._sums.log_()
