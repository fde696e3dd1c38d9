"""A prefilter for a few queries and many keys: rough scores in bf16 rule out nearly all keys, fp32 scores the rest.

On CPUs with bf16 instructions, bf16 products take a quarter of the time of converting the keys to fp32 first. e4m3 keys
become bf16 in three passes over a few megabytes. PyTorch rounds the products to bf16. A key is ruled out if its rough
score is below that of the topk-th best block by more than the errors of both scores.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.torch import fp8
from flexmsa.kernels.torch.index_keys import IndexKeys, forced_and_hidden
from flexmsa.kernels.torch.packing import Array, Scratch, array

# Rounding to 8 bits changes each of the two compared scores by up to 2^-9 of itself; the margin is twice the sum.
_MARGIN = 2.0**-7
# Products per thread. One product for all keys is slow on some CPUs, as are very many products, or unequal numbers of
# them per thread.
_PRODUCTS = 4
# Keys per kept maximum of rough scores.
_KEYS_PER_MAXIMUM = 8
# e4m3 keys are tiny as bf16 numbers. Queries are multiplied by this factor before the product, and scores by the rest.
_LIFT = 2.0**60


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16: AVX512_BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def best_blocks(
    queries: Tensor, position: Array, index_k: IndexKeys, rule: SelectionRule, scratch: Scratch
) -> Tensor | None:
    """The topk blocks [R, topk], ascending, of bf16 queries [R, Di] at position [R], which see more than topk blocks.

    The rule must force a local block. Returns None if the rough scores are of no use: some are not finite, or more than
    a quarter of the blocks remain.
    """
    forced, hidden = forced_and_hidden(rule, position, index_k.num_blocks)
    is_open = ~(forced | hidden)
    fine = rough_maxima(queries, index_k, rule, scratch)
    # Queries as contiguous rows, for the computations below.
    maxima = np.ascontiguousarray(array(fine.amax(1).float()).T)
    error = rough_error(queries, index_k)
    if not (np.isfinite(maxima) | ~is_open).all() or not np.isfinite(error).all():
        return None
    limit = least_scores(maxima, error, forced, is_open, rule.topk)
    possible = (maxima >= limit[:, None]) & is_open
    left = np.flatnonzero(possible.any(0))
    if 4 * len(left) > index_k.num_blocks:
        return None
    blocks = np.flatnonzero((possible | forced).any(0))
    scores = np.where(forced[:, blocks], np.inf, -np.inf)
    if len(left):
        remaining = (array(fine[torch.as_tensor(left)].float()) >= limit) & possible[:, left].T[:, None]
        exact = _exact_maxima(queries, index_k, rule.block_size, left, remaining.any(2))
        scores[possible[:, blocks]] = exact.T[possible[:, left]]
    order = np.argsort(-scores, kind="stable")[:, : rule.topk]
    return torch.as_tensor(np.sort(blocks[order]).astype(np.int32))


def rough_maxima(queries: Tensor, index_k: IndexKeys, rule: SelectionRule, scratch: Scratch) -> Tensor:
    """The best rough score of queries [R, Di] with every J-th key of a block, [num_blocks, J, R].

    Zero for blocks that the last query is forced to choose.
    """
    num_blocks, size, num_vectors = index_k.num_blocks, rule.block_size, len(queries)
    apart = _KEYS_PER_MAXIMUM if size % _KEYS_PER_MAXIMUM == 0 else 1
    maxima = scratch.take("maxima", num_blocks, size // apart, num_vectors, dtype=torch.bfloat16).zero_()
    factors = None
    if index_k.factors is not None:
        # The scores of one query are contiguous, like the factors of the keys.
        maxima = maxima.view(num_vectors, num_blocks, -1).permute(1, 2, 0)
        queries = queries * _LIFT
        factors = (index_k.factors[0] * (fp8.BFLOAT16_SHIFT / fp8.SHIFT / _LIFT)).to(torch.bfloat16)
    for first, stop in index_k.block_ranges(num_vectors, narrow=True):
        scores = scratch.take("rough", (stop - first) * size, num_vectors, dtype=torch.bfloat16)
        if factors is None:
            for part, keys in index_k.narrow_parts(first, stop):
                _multiply(keys, queries, scores[part])
            torch.amax(scores.view(stop - first, apart, -1), 1, out=maxima[first:stop].flatten(1))
        else:
            scores = scores.view(num_vectors, -1)
            for part, keys in index_k.narrow_parts(first, stop):
                torch.mm(queries, keys.T, out=scores[:, part])
            scores.mul_(factors[first * size : stop * size])
            scores = _halve(scores.view(num_vectors, -1, size), size // apart)
            maxima[first:stop].copy_(scores.permute(1, 2, 0))
    return maxima


def _multiply(keys: Tensor, queries: Tensor, scores: Tensor) -> None:
    """Scores [n, R] of keys [n, Di] with queries [R, Di], by products of equal size."""
    num_products = _PRODUCTS * torch.get_num_threads()
    cut = len(keys) - len(keys) % num_products
    for part, batch in (slice(cut), num_products), (slice(cut, None), 1):
        if len(keys[part]):
            by_product = queries.T.expand(batch, -1, -1)
            torch.bmm(keys[part].unflatten(0, (batch, -1)), by_product, out=scores[part].unflatten(0, (batch, -1)))


def _halve(scores: Tensor, width: int) -> Tensor:
    """The maxima [..., width] of the scores [..., width * 2^n] that are ``width`` apart; overwrites the scores."""
    while scores.shape[-1] > width:
        first, second = scores.chunk(2, -1)
        scores = torch.maximum(first, second, out=first)
    return scores


def rough_error(queries: Tensor, index_k: IndexKeys) -> Array:
    """The largest error [R] of rough scores of queries [R, Di], in addition to their rounding."""
    # Products may flush subnormal numbers to zero: a sum, and a number of an e4m3 key.
    least = torch.finfo(torch.float32).tiny * (queries.shape[1] + 1)
    if index_k.factors is None:
        return np.full(len(queries), least)
    scale = array(index_k.factors).max() / fp8.SHIFT
    lost = np.abs(array(queries.float())).sum(-1) * fp8.LARGEST_SUBNORMAL
    return least + scale * (lost + least * fp8.BFLOAT16_SHIFT / _LIFT)


def least_scores(maxima: Array, error: Array, forced: Array, is_open: Array, topk: int) -> Array:
    """The least rough score [R] of a block that can be among the topk best, from rough maxima [R, num_blocks].

    The maxima are wrong by at most ``error`` [R] and their rounding. forced [R, num_blocks] marks the blocks chosen
    whatever their score, is_open [R, num_blocks] those chosen by their score.
    """
    ranked = np.where(is_open, maxima, np.where(forced, np.inf, -np.inf))
    threshold = np.partition(ranked, -topk)[:, -topk]
    return np.where(threshold > 0, threshold * (1 - _MARGIN), threshold * (1 + _MARGIN)) - 2 * error


def _exact_maxima(queries: Tensor, index_k: IndexKeys, block_size: int, blocks: Array, remaining: Array) -> Array:
    """The best fp32 score [n, R] of queries [R, Di] with the ``remaining`` [n, J] keys of blocks [n]."""
    block, offset = np.nonzero(remaining)
    num_maxima = remaining.shape[1]
    keys = (blocks[block] * block_size + offset)[:, None] + np.arange(0, block_size, num_maxima)
    rows = index_k.rows(keys.flatten())
    products = rows @ queries.to(rows.dtype).T
    if index_k.factors is not None:
        products.mul_(index_k.factors[0, torch.as_tensor(keys.flatten()), None])
    scores = array(products.view(*keys.shape, -1).amax(1))
    return np.maximum.reduceat(scores, np.searchsorted(block, np.arange(len(blocks))))
