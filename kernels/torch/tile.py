"""A tile: a few key/value blocks, each with rows that attend to it, in one batched product.

Shapes: C blocks, T tokens per block, G heads per token, so C * T * G query vectors; see ``packing`` for rows and
blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexmsa.kernels.torch.packing import Scratch


@dataclass(frozen=True)
class Tile:
    """Block ``blocks[c]`` and its rows ``rows[c]``; the zero row pads short lists.

    rows is [C * T]. future [C, M, block_size] is True for the keys that the first M rows of each block do not see yet;
    it is None if all rows see the whole block.
    """

    blocks: list[int]
    rows: Tensor
    future: Tensor | None

    def gather(self, rows: Tensor, scratch: Scratch, name: str, group_size: int) -> Tensor:
        """rows [num_rows + 1, G * D] to [C, T * G, D]."""
        gathered = scratch.take(name, self.rows.numel(), rows.shape[1])
        torch.index_select(rows, 0, self.rows, out=gathered)
        return gathered.view(len(self.blocks), -1, rows.shape[1] // group_size)

    def column(self, rows: Tensor) -> Tensor:
        """One number per head, rows [num_rows + 1, G], to [C, T * G, 1]."""
        return rows.index_select(0, self.rows).view(len(self.blocks), -1, 1)

    def operand(self, blocks: Tensor) -> Tensor:
        """blocks [num_blocks, block_size, D] to [C, block_size, D]."""
        if len(self.blocks) == 1:
            return blocks.narrow(0, self.blocks[0], 1)
        return blocks[self.blocks]

    def score(self, gathered: Tensor, blocks: Tensor, scratch: Scratch, name: str) -> Tensor:
        """Products [C, T * G, block_size] of gathered rows and the keys of their blocks."""
        scores = scratch.take(name, *gathered.shape[:2], blocks.shape[1])
        return torch.bmm(gathered, self.operand(blocks).transpose(1, 2), out=scores)

    def hide_future(self, scores: Tensor, value: float) -> Tensor:
        """Set the scores [C, T * G, block_size] of unseen keys to ``value``, in place."""
        if self.future is not None:
            by_token = scores.unflatten(1, (self.rows.numel() // len(self.blocks), -1))
            by_token[:, : self.future.shape[1]].masked_fill_(self.future[:, :, None], value)
        return scores

    def add_to_blocks(self, blocks: Tensor, scores: Tensor, gathered: Tensor) -> None:
        """Add scores^T [C, block_size, T * G] times gathered [C, T * G, D] to this tile's ``blocks``."""
        if len(self.blocks) == 1:
            block = self.operand(blocks)
            torch.baddbmm(block, scores.transpose(1, 2), gathered, out=block)
        else:
            blocks.index_add_(0, torch.tensor(self.blocks), torch.bmm(scores.transpose(1, 2), gathered))


def max_tokens(group_size: int, *sizes: int) -> int:
    """Tokens per tile for operands with rows of ``sizes`` numbers that together should fit the second-level cache."""
    return max(1, 2**19 // (group_size * max(*sizes, 32)))
