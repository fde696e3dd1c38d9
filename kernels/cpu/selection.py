"""Which blocks each query and group attends to: the block's best token score, and the topk best blocks.

    block_scores[b, r, i, c] = max over keys j of block c visible to query i of <index_q[b, r, i], index_k[b, j]>

Queries are taken in tiles, so that the scores of one tile against one stretch of keys stay in the cache and block
scores exist for one tile only.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from flexmsa.kernels.cpu import fp8
from flexmsa.kernels.cpu.packing import Scratch, check_page_table, compute_dtype, query_positions
from flexmsa.kernels.cpu.reverse_index import batch_by_size
from flexmsa.kernels.cpu.sieve import candidates, multiplies_bf16, rough_maxima

# Token scores computed at once, and keys copied for them.
_SCORES_PER_STEP = 2**19
_KEYS_PER_STEP = 2**14
# Query vectors in a tile, when there are that many.
_VECTORS_PER_TILE = 512
# Up to so many, one product per block is faster than one for all blocks.
_FEW_VECTORS = 64


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
    page_table: Tensor | None = None,
    index_k_scale: Tensor | None = None,
) -> Tensor:
    """index_q [B,Hkv,Sq,Di], index_k [B,1,Sk,Di] to block_indices [B,Hkv,Sq,topk] int32.

    With page_table [B,max_pages], index_k is pages [num_pages,1,block_size,Di]. e4m3 keys have an index_k_scale of
    the shape of index_k but for Di, or e4m3 queries.

    Numbers count from the first block of the query's sequence; they ascend and are padded with -1. The newest
    ``num_local_blocks`` and the oldest ``num_init_blocks`` visible blocks rank above all others, equal scores rank
    by block number, NaN is the lowest score. Only visible blocks are selected, whatever the numbers.
    """
    check_page_table(page_table, sequences, block_size, index_k.shape[0])
    if fp8.is_e4m3(index_q):
        index_q, index_k = index_q.to(torch.float16), index_k.to(torch.float16)
    rules = _Rules(block_size, topk, num_local_blocks, num_init_blocks)
    batch, num_kv_heads, seqlen_q, _ = index_q.shape
    tiles = _tiles(sequences, rules, num_kv_heads)
    if sum(tile.stop - tile.start for tile in tiles) == batch * seqlen_q:
        block_indices = torch.empty(batch, num_kv_heads, seqlen_q, topk, dtype=torch.int32)
    else:
        # Right where at most topk blocks are visible; the other queries are overwritten.
        _, position = query_positions(sequences, batch, seqlen_q)
        newest = position.div(block_size, rounding_mode="floor")[:, None, :, None]
        ids = torch.arange(topk, dtype=torch.int32)
        block_indices = torch.where(ids <= newest, ids, -1).repeat(1, num_kv_heads, 1, 1)
    sizes = [(tile.stop - tile.start, tile.num_blocks) for tile in tiles]
    scratch = Scratch(compute_dtype(index_q.dtype))
    for group in batch_by_size(sizes, max(1, _SCORES_PER_STEP // (num_kv_heads * block_size))):
        members = [tiles[i] for i in group]
        keys = _IndexKeys(index_k, index_k_scale, page_table, members, num_kv_heads, index_q.dtype, rules, scratch)
        _select(index_q, keys, members, rules, scratch, block_indices)
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


class _IndexKeys:
    """The index keys of C sequences, read from a contiguous or paged cache in stretches of blocks.

    They are copied into one buffer: products are fastest on what the processor's cache holds. But a few queries of one
    sequence use each key once, and read it ``in_place`` if they can, or in bf16 first, ``sieved``. Scores of e4m3 keys
    are to be multiplied by ``factors`` [C, num_blocks * block_size], None for others. Keys and factors are zero beyond
    the end of a sequence.
    """

    def __init__(
        self,
        index_k: Tensor,
        index_k_scale: Tensor | None,
        page_table: Tensor | None,
        tiles: list[_Queries],
        num_kv_heads: int,
        query_dtype: torch.dtype,
        rules: _Rules,
        scratch: Scratch,
    ) -> None:
        self._keys = index_k[:, 0]
        self._page_table = page_table
        self._tiles = tiles
        self._block_size = rules.block_size
        self._scratch = scratch
        self.num_blocks = max(tile.num_blocks for tile in tiles)
        few = len(tiles) == 1 and (tiles[0].stop - tiles[0].start) * num_kv_heads <= _FEW_VECTORS
        # Only the newest block may end beyond the keys, and is not scored where it is local.
        whole = rules.num_local_blocks > 0
        self.in_place = few and whole and page_table is None and index_k.dtype == scratch.dtype
        self.sieved = few and whole and index_k.dtype == query_dtype == torch.bfloat16 and multiplies_bf16()
        self.factors: Tensor | None = None
        if index_k_scale is not None:
            self.factors = fp8.factors(self._load("scales", fp8.as_scales(index_k_scale)[:, 0], 0, self.num_blocks))

    def blocks(self, first: int, stop: int) -> Tensor:
        """Blocks ``first .. stop - 1`` of each sequence in the compute dtype, [C, n * block_size, Di]: read only."""
        if self.in_place:
            return self.stored(first, stop).flatten(0, 1)[None]
        return self._load("keys", self._keys, first, stop)

    def stored(self, first: int, stop: int) -> Tensor:
        """Whole blocks ``first .. stop - 1`` of the one sequence as they are stored, [n, block_size, Di]: read only."""
        (tile,) = self._tiles
        if self._page_table is not None:
            return self._take(self._keys, self._page_table[tile.batch, first:stop])
        start, end = (tile.k_start + block * self._block_size for block in (first, stop))
        return self._keys[tile.batch, start:end].unflatten(0, (-1, self._block_size))

    def widened(self, blocks: Tensor) -> Tensor:
        """These whole blocks of the one sequence in the compute dtype, [n, block_size, Di]."""
        (tile,) = self._tiles
        if self._page_table is not None:
            stored = self._take(self._keys, self._page_table[tile.batch, blocks])
        else:
            num_whole = (tile.k_end - tile.k_start) // self._block_size
            stored = self._take(self.stored(0, num_whole), blocks)
        return self._scratch.widen(stored, self._scratch.take("keys", *stored.shape))

    def _take(self, blocks: Tensor, numbers: Tensor) -> Tensor:
        """These of blocks [N, block_size, ...], in a buffer."""
        out = self._scratch.take("blocks", len(numbers), *blocks.shape[1:], dtype=blocks.dtype)
        return torch.index_select(blocks, 0, numbers, out=out)

    def _load(self, name: str, x: Tensor, first: int, stop: int) -> Tensor:
        """These blocks of x [B,S,...] or of pages of it, [C, n * block_size, ...]."""
        start, num_keys = first * self._block_size, (stop - first) * self._block_size
        out = self._scratch.take(name, len(self._tiles), num_keys, *x.shape[2:])
        for part, tile in zip(out, self._tiles, strict=True):
            count = max(0, min(tile.k_end - tile.k_start - start, num_keys))
            if self._page_table is None:
                stored = x[tile.batch, tile.k_start + start : tile.k_start + start + count]
            else:
                pages = self._page_table[tile.batch, first : first - (-count // self._block_size)]
                stored = self._take(x, pages).flatten(0, 1)[:count]
            self._scratch.widen(stored, part[:count])
            if count < num_keys:
                part[count:].zero_()
        return out


def _select(
    index_q: Tensor,
    index_k: _IndexKeys,
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
    forced, hidden = _forced_and_hidden(position, index_k.num_blocks, rules)
    scores = _sieved_scores(queries, index_k, forced, hidden, rules, scratch) if index_k.sieved else None
    if scores is None:
        scores = _block_scores(queries, index_k, position, rules, scratch, clean=False)
    if bool(scores.isnan().any()):
        scores = _block_scores(queries, index_k, position, rules, scratch, clean=True)
    limit = torch.finfo(scores.dtype).max
    scores.clamp_(-limit, limit)
    scores.masked_fill_(forced, torch.inf).masked_fill_(hidden, -torch.inf)
    best = _best(scores.transpose(1, 2).flatten(0, 1), rules.topk)
    best = best.view(*token.shape, num_kv_heads, rules.topk)
    real = start + offset == token
    block_indices.transpose(1, 2)[batch.expand_as(token)[real], token[real]] = best[real]


def _block_scores(
    queries: Tensor,
    index_k: _IndexKeys,
    position: Tensor,
    rules: _Rules,
    scratch: Scratch,
    clean: bool,
) -> Tensor:
    """Block scores [C, num_blocks, R] of queries [C, R, Di] at position [C, 1, R].

    A NaN token score makes its block's score NaN, unless ``clean``. Forced blocks are left at zero. A block that is
    not forced lies wholly in the past, except where there is no forced local block.
    """
    num_tiles, num_vectors, _ = queries.shape
    num_blocks, block_size = index_k.num_blocks, rules.block_size
    block_scores = scratch.take("block_scores", num_tiles, num_blocks, num_vectors).zero_()
    num_scored = num_blocks - rules.num_local_blocks
    num_keys = _SCORES_PER_STEP // num_vectors
    step = (num_keys if index_k.in_place else min(num_keys, _KEYS_PER_STEP)) // (num_tiles * block_size)
    limit = torch.finfo(queries.dtype).max
    for first in range(rules.num_init_blocks, num_scored, max(1, step)):
        stop = min(first + max(1, step), num_scored)
        scores = _products(index_k.blocks(first, stop), queries, block_size, scratch)
        if index_k.factors is not None:
            factors = index_k.factors[:, first * block_size : stop * block_size]
            scores.mul_(factors.view(num_tiles, -1, block_size, 1))
        if clean:
            scores.nan_to_num_(-limit, limit, -limit)
        if rules.num_local_blocks == 0:
            key = torch.arange(first * block_size, stop * block_size).view(-1, block_size, 1)
            scores.masked_fill_(key > position[:, None], -torch.inf)
        torch.amax(scores, 2, out=block_scores[:, first:stop])
    return block_scores


def _sieved_scores(
    queries: Tensor, index_k: _IndexKeys, forced: Tensor, hidden: Tensor, rules: _Rules, scratch: Scratch
) -> Tensor | None:
    """Block scores [1, num_blocks, R] of queries [1, R, Di] of one sequence; -inf where bf16 rules a block out.

    None if that says too little. forced, hidden: [1, num_blocks, R].
    """
    num_blocks, num_vectors = index_k.num_blocks, queries.shape[1]
    narrow = queries[0].to(torch.bfloat16)
    rough = scratch.take("rough maxima", num_blocks, num_vectors, dtype=torch.bfloat16).zero_()
    step = max(1, _SCORES_PER_STEP // (num_vectors * rules.block_size))
    num_scored = num_blocks - rules.num_local_blocks
    for first in range(rules.num_init_blocks, num_scored, step):
        stop = min(first + step, num_scored)
        rough[first:stop] = rough_maxima(index_k.stored(first, stop), narrow, scratch)
    chosen = candidates(rough, forced[0], hidden[0], rules.topk)
    if chosen is None:
        return None
    block_scores = scratch.take("block_scores", 1, num_blocks, num_vectors).fill_(-torch.inf)
    if len(chosen):
        keys = index_k.widened(chosen).flatten(0, 1)[None]
        block_scores[:, chosen] = _products(keys, queries, rules.block_size, scratch).amax(2)
    return block_scores


def _forced_and_hidden(position: Tensor, num_blocks: int, rules: _Rules) -> tuple[Tensor, Tensor]:
    """Which blocks a query chooses whatever they score, and which it does not see: [..., num_blocks, R]."""
    block, newest = torch.arange(num_blocks)[:, None], position.div(rules.block_size, rounding_mode="floor")
    return (block > newest - rules.num_local_blocks) | (block < rules.num_init_blocks), block > newest


def _products(keys: Tensor, queries: Tensor, block_size: int, scratch: Scratch) -> Tensor:
    """keys [C, n * block_size, Di] times queries [C, R, Di]: [C, n, block_size, R], in the order that is fastest."""
    num_vectors = queries.shape[1]
    blocks = keys.unflatten(1, (-1, block_size))
    if num_vectors > _FEW_VECTORS:
        scores = scratch.take("scores", *blocks.shape[:3], num_vectors)
        torch.bmm(keys, queries.transpose(1, 2), out=scores.flatten(1, 2))
        return scores
    scores = scratch.take("scores", *blocks.shape[:2], num_vectors, block_size)
    by_block = queries[:, None].expand(-1, blocks.shape[1], -1, -1).flatten(0, 1)
    torch.bmm(by_block, blocks.flatten(0, 1).transpose(1, 2), out=scores.flatten(0, 1))
    return scores.transpose(2, 3)


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
