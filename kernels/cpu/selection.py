"""Which blocks each query and group attends to: the block's best token score, and the topk best blocks.

    block_scores[b, r, i, c] = max over keys j of block c visible to query i of <index_q[b, r, i], index_k[b, j]>

Queries are taken in tiles, so that the scores of one tile against one stretch of keys stay in the cache and block
scores exist for one tile only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexmsa.kernels.cpu.packing import Scratch, compute_dtype, query_positions
from flexmsa.kernels.cpu.reverse_index import batch_by_size

# Token scores computed at once.
_SCORES_PER_STEP = 2**19
# Query vectors in a tile, when there are that many.
_VECTORS_PER_TILE = 512


@dataclass(frozen=True)
class _Rules:
    block_size: int
    topk: int
    num_local_blocks: int
    num_init_blocks: int


@dataclass(frozen=True)
class _Queries:
    """Tokens ``start .. stop - 1`` of a batch row.

    The first of them is at ``position`` in its sequence, the last in block ``num_blocks - 1``.
    """

    batch: int
    start: int
    stop: int
    k_start: int
    k_end: int
    position: int
    num_blocks: int


def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    sequences: Tensor,
    block_size: int,
    topk: int,
    num_local_blocks: int,
    num_init_blocks: int,
) -> Tensor:
    """index_q [B,Hkv,Sq,Di], index_k [B,1,Sk,Di] to block_indices [B,Hkv,Sq,topk] int32.

    Numbers count from the first block of the query's sequence; they ascend and are padded with -1. The newest
    ``num_local_blocks`` and the oldest ``num_init_blocks`` visible blocks rank above all others, equal scores rank
    by block number, NaN is the lowest score. Only visible blocks are selected, whatever the numbers.
    """
    rules = _Rules(block_size, topk, num_local_blocks, num_init_blocks)
    batch, num_kv_heads, seqlen_q, _ = index_q.shape
    _, position = query_positions(sequences, batch, seqlen_q)
    newest = position.div(block_size, rounding_mode="floor")[:, None, :, None]
    ids = torch.arange(topk, dtype=torch.int32)
    # Right where at most topk blocks are visible; the other queries are overwritten.
    block_indices = torch.where(ids <= newest, ids, -1).repeat(1, num_kv_heads, 1, 1)
    tiles = _tiles(sequences, rules, num_kv_heads)
    sizes = [(tile.stop - tile.start, tile.num_blocks) for tile in tiles]
    scratch = Scratch(compute_dtype(index_q.dtype))
    for group in batch_by_size(sizes, max(1, _SCORES_PER_STEP // (num_kv_heads * block_size))):
        _select(index_q, index_k, [tiles[i] for i in group], rules, scratch, block_indices)
    return block_indices


def _tiles(sequences: Tensor, rules: _Rules, num_kv_heads: int) -> list[_Queries]:
    """Tiles over the queries that see more than topk blocks."""
    tiles = []
    tokens = max(1, _VECTORS_PER_TILE // num_kv_heads)
    for batch, q_start, q_end, k_start, k_end in sequences.tolist():
        shift = k_end - k_start - q_end
        first = max(q_start, rules.topk * rules.block_size - shift)
        for stop in range(q_end, first, -tokens):
            start = max(first, stop - tokens)
            num_blocks = (stop - 1 + shift) // rules.block_size + 1
            tiles.append(_Queries(batch, start, stop, k_start, k_end, start + shift, num_blocks))
    return tiles


def _select(
    index_q: Tensor,
    index_k: Tensor,
    tiles: list[_Queries],
    rules: _Rules,
    scratch: Scratch,
    block_indices: Tensor,
) -> None:
    """Write the selection of the tiles' queries to block_indices.

    Query vectors of a tile are ordered (token, group); short tiles repeat their last token.
    """
    num_kv_heads = index_q.shape[1]
    offset = torch.arange(max(tile.stop - tile.start for tile in tiles))
    batch = torch.tensor([[tile.batch] for tile in tiles])
    start = torch.tensor([[tile.start] for tile in tiles])
    token = torch.minimum(start + offset, torch.tensor([[tile.stop - 1] for tile in tiles]))
    position = token + torch.tensor([[tile.position - tile.start] for tile in tiles])
    position = position.repeat_interleave(num_kv_heads, 1)[:, None]
    queries = index_q[batch, :, token].to(compute_dtype(index_q.dtype)).flatten(1, 2)
    scores = _block_scores(queries, index_k, position, tiles, rules, scratch, clean=False)
    if bool(scores.isnan().any()):
        scores = _block_scores(queries, index_k, position, tiles, rules, scratch, clean=True)
    block = torch.arange(scores.shape[1])[:, None]
    newest = position.div(rules.block_size, rounding_mode="floor")
    limit = torch.finfo(scores.dtype).max
    scores.clamp_(-limit, limit)
    scores.masked_fill_((block > newest - rules.num_local_blocks) | (block < rules.num_init_blocks), torch.inf)
    scores.masked_fill_(block > newest, -torch.inf)
    best = _best(scores.transpose(1, 2).flatten(0, 1), rules.topk)
    best = best.view(*token.shape, num_kv_heads, rules.topk)
    real = start + offset == token
    block_indices.transpose(1, 2)[batch.expand_as(token)[real], token[real]] = best[real]


def _block_scores(
    queries: Tensor,
    index_k: Tensor,
    position: Tensor,
    tiles: list[_Queries],
    rules: _Rules,
    scratch: Scratch,
    clean: bool,
) -> Tensor:
    """Block scores [C, num_blocks, R] of queries [C, R, Di] at position [C, 1, R].

    A NaN token score makes its block's score NaN, unless ``clean``. Forced blocks are left at zero. A block that is
    not forced lies wholly in the past, except where there is no forced local block.
    """
    num_tiles, num_vectors, _ = queries.shape
    num_blocks, block_size = max(tile.num_blocks for tile in tiles), rules.block_size
    block_scores = scratch.take("block_scores", num_tiles, num_blocks, num_vectors).zero_()
    num_scored = num_blocks - rules.num_local_blocks
    step = max(1, _SCORES_PER_STEP // (num_tiles * num_vectors * block_size))
    limit = torch.finfo(queries.dtype).max
    for first in range(rules.num_init_blocks, num_scored, step):
        stop = min(first + step, num_scored)
        keys = _keys(index_k, tiles, first * block_size, stop * block_size).to(queries.dtype)
        scores = scratch.take("scores", num_tiles, keys.shape[1], num_vectors)
        torch.bmm(keys, queries.transpose(1, 2), out=scores)
        if clean:
            scores.nan_to_num_(-limit, limit, -limit)
        if rules.num_local_blocks == 0:
            key = torch.arange(first * block_size, stop * block_size)[:, None]
            scores.masked_fill_(key > position, -torch.inf)
        by_block = scores.view(num_tiles, stop - first, block_size, num_vectors)
        torch.amax(by_block, 2, out=block_scores[:, first:stop])
    return block_scores


def _keys(index_k: Tensor, tiles: list[_Queries], start: int, stop: int) -> Tensor:
    """Keys ``start .. stop - 1`` of each tile's sequence [C, stop - start, Di]; its last key repeats beyond its end."""
    if len(tiles) == 1 and tiles[0].k_start + stop <= tiles[0].k_end:
        return index_k[tiles[0].batch, :, tiles[0].k_start + start : tiles[0].k_start + stop]
    key = torch.tensor([[tile.k_start] for tile in tiles]) + torch.arange(start, stop)
    key = torch.minimum(key, torch.tensor([[tile.k_end - 1] for tile in tiles]))
    return index_k[torch.tensor([[tile.batch] for tile in tiles]), 0, key]


def _best(scores: Tensor, topk: int) -> Tensor:
    """The topk best columns of scores [rows, num_blocks > topk], ascending, -1 instead of those that score -inf."""
    values, ids = scores.topk(topk + 1)
    # topk does not say which of equal scores it takes. That matters only if they are at the threshold.
    tied = (values[:, topk - 1] == values[:, topk]) & (values[:, topk] > -torch.inf)
    ids = ids[:, :topk].masked_fill_(values[:, :topk] == -torch.inf, scores.shape[1])
    if bool(tied.any()):
        ids[tied] = _first_best(scores[tied], values[tied, topk - 1, None], topk)
    ids = ids.sort(-1).values
    return ids.masked_fill_(ids == scores.shape[1], -1).to(torch.int32)


def _first_best(scores: Tensor, threshold: Tensor, topk: int) -> Tensor:
    """The columns above the threshold and the first that equal it, topk together."""
    above, equal = scores > threshold, scores == threshold
    room = topk - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))).nonzero()[:, 1].view(-1, topk)
