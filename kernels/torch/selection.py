"""Selection: each query and group chooses the topk blocks with the best scores, a block's best token score.

    block_scores[b, r, i, c] = max over keys j of block c visible to query i of <index_q[b, r, i], index_k[b, j]>

Queries are processed in tiles, so that the scores of one tile and one range of keys stay in the processor's cache, and
block scores exist for one tile only.
"""

import numpy as np
import torch
from torch import Tensor

from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.sequences import list_sequences
from flexmsa.kernels.torch import fp8, int8
from flexmsa.kernels.torch.index_keys import FEW_VECTORS, SCORES_PER_STEP, IndexKeys, Queries, forced_and_hidden
from flexmsa.kernels.torch.inverse_index import batch_by_size
from flexmsa.kernels.torch.packing import Array, Scratch, compute_dtype, query_positions
from flexmsa.kernels.torch.prefilter import best_blocks, multiplies_bf16

# The most query vectors per tile.
_VECTORS_PER_TILE = 512


def select_blocks(
    index_q: Tensor,
    index_k: Tensor,
    sequences: Tensor,
    rule: SelectionRule,
    page_table: Tensor | None = None,
    index_k_scale: Tensor | None = None,
    ids: Tensor | None = None,
) -> Tensor:
    """index_q [B,Hkv,Sq,Di], index_k [B,1,Sk,Di] to block_indices [B,Hkv,Sq,topk] int32, ``ids`` if they are given.

    With page_table [B,max_pages], index_k is pages [num_pages,1,block_size,Di]. e4m3 keys come with an index_k_scale,
    which has the shape of index_k without Di, or is [block_size], of each page; or they come with e4m3 queries. int8
    keys come with a scale each, and queries are rounded to int8 (see ``int8``).

    Block ids count from the first block of the query's sequence; they ascend and are padded with -1. The newest
    ``num_local_blocks`` and the oldest ``num_init_blocks`` visible blocks rank above all others, equal scores rank
    by block id, NaN is the lowest score. Only visible blocks are selected, whatever the scores.
    """
    batch, num_kv_heads, seqlen_q, _ = index_q.shape
    tiles = _tiles(sequences, rule, num_kv_heads, rule.topk)
    if ids is None:
        ids = torch.empty(batch, num_kv_heads, seqlen_q, rule.topk, dtype=torch.int32)
    if sum(tile.stop - tile.start for tile in tiles) < batch * seqlen_q:
        # The result of queries that see at most topk blocks; the other queries' ids are overwritten.
        _, position = query_positions(sequences, batch, seqlen_q)
        newest = torch.as_tensor(position // rule.block_size)[:, None, :, None]
        block = torch.arange(rule.topk, dtype=torch.int32)
        ids.copy_(torch.where(block <= newest, block, -1))
    _select(index_q, index_k, tiles, rule, page_table, fp8.each_scale(index_k_scale, index_k), ids)
    return ids


def scored_blocks(
    index_q: Tensor,
    index_k: Tensor,
    sequences: Tensor,
    rule: SelectionRule,
    page_table: Tensor | None = None,
    index_k_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """block_indices and scores [B,Hkv,Sq,topk], the best first, then -1 and -inf.

    Arguments are those of ``select_blocks``; the rule forces no block.
    """
    shape = *index_q.shape[:3], rule.topk
    block_indices = torch.full(shape, -1, dtype=torch.int32)
    scores = torch.full(shape, -torch.inf, dtype=compute_dtype(index_q.dtype))
    tiles = _tiles(sequences, rule, index_q.shape[1], 0)
    _select(index_q, index_k, tiles, rule, page_table, index_k_scale, block_indices, scores)
    return block_indices, scores


def _tiles(sequences: Tensor, rule: SelectionRule, num_kv_heads: int, unscored: int) -> list[Queries]:
    """Tiles of the queries that see more than `unscored` blocks."""
    tiles = []
    tokens = max(1, _VECTORS_PER_TILE // num_kv_heads)
    for batch, q_start, q_end, k_start, k_end in list_sequences(sequences):
        shift = k_end - k_start - q_end
        first = max(q_start, unscored * rule.block_size - shift)
        for stop in range(q_end, first, -tokens):
            start = max(first, stop - tokens)
            num_blocks = (stop - 1 + shift) // rule.block_size + 1
            tiles.append(Queries(batch, start, stop, k_start, k_end, start + shift, num_blocks))
    return tiles


def _select(
    index_q: Tensor,
    index_k: Tensor,
    tiles: list[Queries],
    rule: SelectionRule,
    page_table: Tensor | None,
    index_k_scale: Tensor | None,
    block_indices: Tensor,
    scores: Tensor | None = None,
) -> None:
    """Write the selection of the tiles' queries to block_indices, ascending, or, with its scores, the best first."""
    if fp8.is_e4m3(index_q):
        index_q, index_k = index_q.to(torch.float16), index_k.to(torch.float16)
    if index_k.dtype == torch.int8:
        # The scale of a query changes no order among its scores. Sums of products of int8 numbers are exact in float32.
        index_q = int8.quantize(index_q)[0].to(torch.float32)
    num_kv_heads = index_q.shape[1]
    sizes = [(tile.stop - tile.start, tile.num_blocks) for tile in tiles]
    scratch = Scratch(compute_dtype(index_q.dtype))
    for group in batch_by_size(sizes, max(1, SCORES_PER_STEP // (num_kv_heads * rule.block_size))):
        members = [tiles[i] for i in group]
        keys = IndexKeys(index_k, index_k_scale, page_table, members, num_kv_heads, rule, scratch)
        _select_together(index_q, keys, members, rule, scratch, block_indices, scores)


def _select_together(
    index_q: Tensor,
    index_k: IndexKeys,
    tiles: list[Queries],
    rule: SelectionRule,
    scratch: Scratch,
    block_indices: Tensor,
    scores: Tensor | None,
) -> None:
    """`_select` for tiles whose keys are in `index_k`.

    The query vectors of a tile are ordered by (token, group); short tiles repeat their last token.
    """
    num_kv_heads = index_q.shape[1]
    offset = np.arange(max(tile.stop - tile.start for tile in tiles))
    batch, start, stop, first = np.array([(t.batch, t.start, t.stop, t.position) for t in tiles]).T[..., None]
    token = np.minimum(start + offset, stop - 1)
    position = np.repeat(token - start + first, num_kv_heads, 1)
    queries = index_q[torch.as_tensor(batch), :, torch.as_tensor(token)].flatten(1, 2)
    best = None
    narrow = index_q.dtype == torch.bfloat16 and index_k.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    if narrow and index_q.device.type == "cpu" and index_k.are_used_once and multiplies_bf16():
        best = best_blocks(queries[0], position[0], index_k, rule, scratch)
    values = None
    if best is None:
        every = _scores_of_all(queries.to(scratch.dtype), position, index_k, rule, scratch)
        best, values = (_best(every, rule.topk), None) if scores is None else _ranked(every, rule.topk)
    tile, column = np.nonzero(start + offset < stop)
    source = torch.as_tensor(tile), torch.as_tensor(column)
    target = torch.as_tensor(batch[tile, 0]), slice(None), torch.as_tensor(token[tile, column])
    block_indices[target] = best.view(*token.shape, num_kv_heads, rule.topk)[source]
    if scores is not None:
        assert values is not None
        scores[target] = values.view(*token.shape, num_kv_heads, rule.topk)[source]


def _scores_of_all(
    queries: Tensor, position: Array, index_k: IndexKeys, rule: SelectionRule, scratch: Scratch
) -> Tensor:
    """The scores [C * R, num_blocks] of queries [C, R, Di] at position [C, R]: inf of forced, -inf of hidden blocks."""
    forced, hidden = (torch.as_tensor(x).mT for x in forced_and_hidden(rule, position, index_k.num_blocks))
    newest_key = torch.as_tensor(position)[:, None]
    scores = _block_scores(queries, index_k, newest_key, rule, scratch, clean=False)
    if bool(scores.isnan().any()):
        scores = _block_scores(queries, index_k, newest_key, rule, scratch, clean=True)
    limit = torch.finfo(scores.dtype).max
    scores.clamp_(-limit, limit)
    scores.masked_fill_(forced, torch.inf).masked_fill_(hidden, -torch.inf)
    return scores.transpose(1, 2).flatten(0, 1)


def _block_scores(
    queries: Tensor, index_k: IndexKeys, position: Tensor, rule: SelectionRule, scratch: Scratch, clean: bool
) -> Tensor:
    """Block scores [C, num_blocks, R] of queries [C, R, Di] at position [C, 1, R].

    A NaN token score makes its block's score NaN, unless ``clean``. Forced blocks keep the score zero. If there is a
    forced local block, every other block lies wholly in the past.
    """
    num_tiles, num_vectors, _ = queries.shape
    num_blocks, block_size = index_k.num_blocks, rule.block_size
    block_scores = scratch.take("block_scores", num_tiles, num_blocks, num_vectors).zero_()
    limit = torch.finfo(queries.dtype).max
    for first, stop in index_k.block_ranges(num_vectors):
        if index_k.are_multiplied_in_int8:
            scores = index_k.int8_products(first, stop, queries[0].to(torch.int8))[None]
        else:
            scores = _products(index_k.blocks(first, stop), queries, block_size, scratch)
        if index_k.factors is not None:
            factors = index_k.factors[:, first * block_size : stop * block_size]
            scores.mul_(factors.view(num_tiles, -1, block_size, 1))
        if clean:
            scores.nan_to_num_(-limit, limit, -limit)
        if rule.num_local_blocks == 0:
            key = torch.arange(first * block_size, stop * block_size).view(-1, block_size, 1)
            scores.masked_fill_(key > position[:, None], -torch.inf)
        torch.amax(scores, 2, out=block_scores[:, first:stop])
    return block_scores


def _products(keys: Tensor, queries: Tensor, block_size: int, scratch: Scratch) -> Tensor:
    """keys [C, n * block_size, Di] times queries [C, R, Di]: [C, n, block_size, R], by the faster of two products."""
    num_vectors = queries.shape[1]
    blocks = keys.unflatten(1, (-1, block_size))
    if num_vectors > FEW_VECTORS:
        scores = scratch.take("scores", *blocks.shape[:3], num_vectors)
        torch.bmm(keys, queries.transpose(1, 2), out=scores.flatten(1, 2))
        return scores
    scores = scratch.take("scores", *blocks.shape[:2], num_vectors, block_size)
    repeated = queries[:, None].expand(-1, blocks.shape[1], -1, -1).flatten(0, 1)
    torch.bmm(repeated, blocks.flatten(0, 1).transpose(1, 2), out=scores.flatten(0, 1))
    return scores.transpose(2, 3)


def _best(scores: Tensor, topk: int) -> Tensor:
    """The topk best columns of scores [rows, num_blocks > topk], ascending, with -1 in place of a score of -inf."""
    values, ids = scores.topk(topk + 1)
    # torch.topk chooses arbitrarily between equal scores, which matters only for scores at the threshold.
    tied = (values[:, topk - 1] == values[:, topk]) & (values[:, topk] > -torch.inf)
    ids = ids[:, :topk].masked_fill_(values[:, :topk] == -torch.inf, scores.shape[1])
    if bool(tied.any()):
        ids[tied] = _first_best(scores[tied], values[tied, topk - 1, None], topk)
    ids = ids.sort(-1).values
    return ids.masked_fill_(ids == scores.shape[1], -1).to(torch.int32)


def _ranked(scores: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """The topk best columns of scores [rows, num_blocks], the best first, and their scores; then -1 and -inf."""
    missing = max(0, topk + 1 - scores.shape[1])
    scores = torch.nn.functional.pad(scores, (0, missing), value=-torch.inf)
    ids = _best(scores, topk)
    values = scores.gather(1, ids.clamp(min=0).long()).masked_fill_(ids < 0, -torch.inf)
    # The ids ascend, and a stable sort keeps the smaller one first among equal scores.
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order), values


def _first_best(scores: Tensor, threshold: Tensor, topk: int) -> Tensor:
    """The columns above the threshold and the first ones equal to it, topk in total."""
    above, equal = scores > threshold, scores == threshold
    room = topk - above.sum(-1, keepdim=True)
    return (above | (equal & (equal.cumsum(-1) <= room))).nonzero()[:, 1].view(-1, topk)
