"""Softmax over blocks of scores that are met one after another, and the attention that it weights.

With S the scores of a row, out = sum_j e^(S_j) v_j / sum_j e^(S_j) and lse = ln sum_j e^(S_j). ``PlainAttention`` adds
up just these, in half the passes over the scores that ``OnlineAttention`` takes. That is exact while lse stays within
+-55, as it does in layers that normalise their queries and keys, and it tells where it is not. ``OnlineAttention``
takes any scores, and keeps what each row has so far normalised.

Rows are numbered as in ``packing``: one for each token and group, G heads to a row, the last for padding.
"""

import math

import torch
from torch import Tensor

from flexmsa.kernels.torch.packing import Scratch
from flexmsa.kernels.torch.tile import Tile

# Of plain sums: 2^80 either way leaves room in float32 for weights that are 2^46 times smaller, and for the values.
_LARGEST_LSE = 80.0 * math.log(2)


class OnlineSoftmax:
    """The logsumexp of the scores that each row and head [num_rows + 1, G] has met so far."""

    def __init__(self, num_rows: int, group_size: int, scratch: Scratch) -> None:
        self._scratch = scratch
        self.lse = torch.full((num_rows + 1, group_size), -torch.inf, dtype=scratch.dtype)

    def update(self, tile: Tile, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Meet scores [C, T * G, block_size]: returns their softmax, and the weight [C, T * G, 1] of this block's
        result against the result so far.

        Softmax is one fused pass, and gives back the logsumexp: its largest value is exp(maximum - logsumexp).
        """
        maximum = scores.amax(-1, keepdim=True)
        if maximum.min() == -torch.inf:
            # Every score of a row overflowed: the block shall weigh nothing, rather than NaN.
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
    """out [num_rows + 1, G * D] and lse [num_rows + 1, G] over the blocks so far: 0 and -inf before the first."""

    def __init__(self, num_rows: int, group_size: int, head_dim: int, scratch: Scratch) -> None:
        self._scratch = scratch
        self._softmax = OnlineSoftmax(num_rows, group_size, scratch)
        self._out = scratch.take("out_rows", num_rows + 1, group_size * head_dim).zero_()

    def add(self, tile: Tile, scores: Tensor, v_blocks: Tensor) -> None:
        """Meet the scores [C, T * G, block_size] of the tile's blocks."""
        probs, weight = self._softmax.update(tile, scores)
        before = tile.gather(self._out, self._scratch, "before", self._softmax.lse.shape[1])
        merged = torch.bmm(probs, tile.operand(v_blocks), out=self._scratch.take("merged", *before.shape))
        torch.lerp(before, merged, weight, out=merged)
        self._out.index_copy_(0, tile.rows, merged.view(-1, self._out.shape[1]))

    def finish(self) -> tuple[Tensor, Tensor]:
        return self._out, self._softmax.lse


class PlainAttention:
    """The same, by way of plain sums; scores come in base 2, whose powers are cheaper."""

    def __init__(self, num_rows: int, group_size: int, head_dim: int, scratch: Scratch) -> None:
        self._scratch = scratch
        self._sums = torch.zeros(num_rows + 1, group_size, dtype=scratch.dtype)
        self._out = scratch.take("out_rows", num_rows + 1, group_size * head_dim).zero_()

    @staticmethod
    def is_exact(out: Tensor, lse: Tensor) -> Tensor:
        """Which rows of out [..., D] and lse [...] are right to rounding; those that met no key are not."""
        # A sum is finite only if its terms are; where finite terms overflow, a row is done again for nothing.
        return (lse.abs() <= _LARGEST_LSE) & out.sum(-1).isfinite()

    def add(self, tile: Tile, scores: Tensor, v_blocks: Tensor) -> None:
        """Meet the scores [C, T * G, block_size] of the tile's blocks; they are overwritten."""
        weights = scores.exp2_()
        self._sums.index_add_(0, tile.rows, weights.sum(-1).view(-1, self._sums.shape[1]))
        out = tile.gather(self._out, self._scratch, "before", self._sums.shape[1])
        torch.baddbmm(out, weights, tile.operand(v_blocks), out=out)
        self._out.index_copy_(0, tile.rows, out.view(-1, self._out.shape[1]))

    def finish(self) -> tuple[Tensor, Tensor]:
        # A row that met no key has the sum 0 and stays 0; all other sums are far larger than what is added here.
        tiny = torch.finfo(self._sums.dtype).tiny
        self._out.unflatten(1, (self._sums.shape[1], -1)).div_((self._sums + tiny)[..., None])
        return self._out, self._sums.log_()
