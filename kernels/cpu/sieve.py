"""A first look at index keys in bf16: which blocks can be among the best.

Products of bf16 read the keys as they are, which takes a quarter of the time of widening them first, on CPUs that have
instructions for them. PyTorch rounds their results to bf16. So they rule blocks out, nearly all, and what is left is
scored in fp32.
"""

import functools

import torch
from torch import Tensor

from flexmsa.kernels.cpu.packing import Scratch

# Rounding to 8 bits moves a score, and the one that it is compared with, by 2^-9 of itself each. Twice that.
_MARGIN = 2.0**-7


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16: AVX512_BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def rough_maxima(blocks: Tensor, queries: Tensor, scratch: Scratch) -> Tensor:
    """The best score of each of blocks [n, block_size, Di] for each of queries [R, Di], all bf16: [n, R]."""
    num_blocks, block_size, _ = blocks.shape
    num_vectors = len(queries)
    scores = scratch.take("rough", num_blocks, block_size, num_vectors, dtype=torch.bfloat16)
    torch.bmm(blocks, queries.T.expand(num_blocks, -1, -1), out=scores)
    # In two steps: a maximum over what lies num_vectors apart is slow.
    parts = 8 if block_size % 8 == 0 else 1
    return scores.view(num_blocks, parts, -1).amax(1).view(num_blocks, -1, num_vectors).amax(1)


def candidates(rough: Tensor, forced: Tensor, hidden: Tensor, topk: int) -> Tensor | None:
    """The blocks [n] that can be among the topk best for one of R queries, by rough scores [num_blocks, R].

    forced, hidden: [num_blocks, R], blocks that are chosen whatever their score, and blocks that may not be. None if
    the rough scores say too little: some are not finite, or would leave more than a quarter of the blocks.
    """
    scores = rough.float()
    open_blocks = ~(forced | hidden)
    if not bool(scores[open_blocks].isfinite().all()):
        return None
    scores = scores.masked_fill(forced, torch.inf).masked_fill(hidden, -torch.inf)
    threshold = scores.topk(topk, 0).values[-1]
    possible = (open_blocks & (scores >= threshold - threshold.abs() * _MARGIN)).any(1).nonzero()[:, 0]
    return possible if 4 * len(possible) <= len(rough) else None
