"""A few queries choose among many keys: a first look in bf16 rules out nearly all keys, fp32 decides between the rest.

Products of bf16 take a quarter of the time of widening the keys first, on CPUs that have instructions for them; e4m3
keys become bf16 in three passes over a few megabytes. PyTorch rounds the results to bf16. A key can make its block one
of the best only if its rough score is not below the topk-th best block's by more than both may be wrong.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.torch import fp8
from flexmsa.kernels.torch.index_keys import IndexKeys, forced_and_hidden
from flexmsa.kernels.torch.packing import Array, Scratch, array

# Rounding to 8 bits moves a score, and the one that it is compared with, by 2^-9 of itself each. Twice that.
_MARGIN = 2.0**-7
# For each thread: one product for all is slow on some CPUs, and so are very many, or another number for each thread.
_PRODUCTS = 4
# Keys whose best rough score is kept.
_KEYS_PER_MAXIMUM = 8
# Queries are multiplied by it before they meet e4m3 keys, which are tiny as bf16 numbers, and scores by what is left.
_LIFT = 2.0**60


@functools.cache
def multiplies_bf16() -> bool:
    """Whether the CPU has instructions for products of bf16: AVX512_BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def best_blocks(
    queries: Tensor, position: Array, index_k: IndexKeys, rule: SelectionRule, scratch: Scratch
) -> Tensor | None:
    """The topk blocks [R, topk], ascending, of bf16 queries [R, Di] at position [R], which see more than topk.

    There is a local block. None if the rough scores say too little: some are not finite, or would leave more than a
    quarter of the blocks.
    """
    forced, hidden = forced_and_hidden(rule, position, index_k.num_blocks)
    is_open = ~(forced | hidden)
    fine = rough_maxima(queries, index_k, rule, scratch)
    # Queries in rows: numbers that are reckoned with lie side by side.
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
        worth = (array(fine[torch.as_tensor(left)].float()) >= limit) & possible[:, left].T[:, None]
        exact = _exact_maxima(queries, index_k, rule.block_size, left, worth.any(2))
        scores[possible[:, blocks]] = exact.T[possible[:, left]]
    order = np.argsort(-scores, kind="stable")[:, : rule.topk]
    return torch.as_tensor(np.sort(blocks[order]).astype(np.int32))


def rough_maxima(queries: Tensor, index_k: IndexKeys, rule: SelectionRule, scratch: Scratch) -> Tensor:
    """The best rough score of queries [R, Di] with keys that lie a constant number J of keys apart, [num_blocks, J, R].

    Zero for blocks that the last query is forced to choose.
    """
    num_blocks, size, num_vectors = index_k.num_blocks, rule.block_size, len(queries)
    apart = _KEYS_PER_MAXIMUM if size % _KEYS_PER_MAXIMUM == 0 else 1
    maxima = scratch.take("maxima", num_blocks, size // apart, num_vectors, dtype=torch.bfloat16).zero_()
    factors = None
    if index_k.factors is not None:
        # The scores of a query side by side, as their factors are.
        maxima = maxima.view(num_vectors, num_blocks, -1).permute(1, 2, 0)
        queries = queries * _LIFT
        factors = (index_k.factors[0] * (fp8.BFLOAT16_SHIFT / fp8.SHIFT / _LIFT)).to(torch.bfloat16)
    for first, stop in index_k.stretches(num_vectors, narrow=True):
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
    """Scores [n, R] of keys [n, Di] with queries [R, Di], by equal products."""
    num_products = _PRODUCTS * torch.get_num_threads()
    cut = len(keys) - len(keys) % num_products
    for part, batch in (slice(cut), num_products), (slice(cut, None), 1):
        if len(keys[part]):
            by_product = queries.T.expand(batch, -1, -1)
            torch.bmm(keys[part].unflatten(0, (batch, -1)), by_product, out=scores[part].unflatten(0, (batch, -1)))


def _halve(scores: Tensor, width: int) -> Tensor:
    """The maxima [..., width] of scores [..., width * 2^n] that lie ``width`` apart; the scores are overwritten."""
    while scores.shape[-1] > width:
        first, second = scores.chunk(2, -1)
        scores = torch.maximum(first, second, out=first)
    return scores


def rough_error(queries: Tensor, index_k: IndexKeys) -> Array:
    """By how much rough scores of queries [R, Di] may be wrong, beside their rounding: [R]."""
    # Whatever lies below the least normal number may count as zero: a sum, and a number of an e4m3 key.
    least = torch.finfo(torch.float32).tiny * (queries.shape[1] + 1)
    if index_k.factors is None:
        return np.full(len(queries), least)
    scale = array(index_k.factors).max() / fp8.SHIFT
    lost = np.abs(array(queries.float())).sum(-1) * fp8.LARGEST_SUBNORMAL
    return least + scale * (lost + least * fp8.BFLOAT16_SHIFT / _LIFT)


def least_scores(maxima: Array, error: Array, forced: Array, is_open: Array, topk: int) -> Array:
    """The least rough score [R] of a block that can be among the topk best, by rough maxima [R, num_blocks].

    These are wrong by no more than ``error`` [R] and their rounding. forced, is_open: [R, num_blocks], blocks that are
    chosen whatever their score, and blocks that may be.
    """
    ranked = np.where(is_open, maxima, np.where(forced, np.inf, -np.inf))
    threshold = np.partition(ranked, -topk)[:, -topk]
    return np.where(threshold > 0, threshold * (1 - _MARGIN), threshold * (1 + _MARGIN)) - 2 * error


def _exact_maxima(queries: Tensor, index_k: IndexKeys, block_size: int, blocks: Array, worth: Array) -> Array:
    """The best score [n, R] of queries [R, Di] with the keys of blocks [n] that are ``worth`` [n, J] a look."""
    block, offset = np.nonzero(worth)
    num_maxima = worth.shape[1]
    keys = (blocks[block] * block_size + offset)[:, None] + np.arange(0, block_size, num_maxima)
    rows = index_k.rows(keys.flatten())
    products = rows @ queries.to(rows.dtype).T
    if index_k.factors is not None:
        products.mul_(index_k.factors[0, torch.as_tensor(keys.flatten()), None])
    scores = array(products.view(*keys.shape, -1).amax(1))
    return np.maximum.reduceat(scores, np.searchsorted(block, np.arange(len(blocks))))
