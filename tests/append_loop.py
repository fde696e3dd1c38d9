"""A cache's tensors, and what `append` has to do with them, as a loop over rows and tokens."""

from typing import NamedTuple

import int8_oracle
import torch
from helpers import least_scale, lengths
from torch import Tensor

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
BATCH, HEADS, HEAD_DIM, INDEX_DIM, PAGE, PAGES = 3, 3, 16, 24, 8, 6


class Buffers(NamedTuple):
    """The arguments of `append` from the cache on."""

    k: Tensor
    v: Tensor
    index_k: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    index_k_scale: Tensor | None
    page_table: Tensor | None
    kv_starts: Tensor
    kv_lens: Tensor
    sequences: Tensor
    status: Tensor

    def copy(self):
        return Buffers(*(None if x is None else x.clone() for x in self))


def make_cache(paged, dtype=torch.float32, kv_lens=(0, 7, 19)):
    """Contiguous rows, or pages that are handed out in a shuffled order; all with garbage in them.

    dtype: int8 is for the index keys of a cache in float32.
    """
    rows, keys = (BATCH * PAGES + 2, PAGE) if paged else (BATCH, PAGE * PAGES)
    shapes = [(rows, HEADS, keys, HEAD_DIM), (rows, HEADS, keys, HEAD_DIM), (rows, 1, keys, INDEX_DIM)]
    keys = torch.float32 if dtype == torch.int8 else dtype
    caches = [torch.randn(shape).to(kind) for shape, kind in zip(shapes, (keys, keys, dtype), strict=True)]
    scales = [torch.randint(256, shape[:3], dtype=torch.uint8) if dtype == E4M3 else None for shape in shapes]
    if dtype == torch.int8:
        scales[2] = torch.randn(shapes[2][:3])
    table = torch.randperm(BATCH * PAGES + 2)[: BATCH * PAGES].view(BATCH, PAGES).int() if paged else None
    kv_starts = lengths(0, 0, 0) if paged else lengths(0, 3, 5)
    sequences = torch.full((2 * BATCH, 5), -7, dtype=torch.int32)
    return Buffers(*caches, *scales, table, kv_starts, lengths(*kv_lens), sequences, lengths(0, 0))


def new_tokens(count):
    """New vectors, their strides in no order."""
    shapes = [(HEADS, HEAD_DIM), (HEADS, HEAD_DIM), (1, INDEX_DIM)]
    return [torch.randn(count, depth, BATCH, heads).permute(2, 3, 0, 1) for heads, depth in shapes]


def append_loop(new, lens, cache):
    """What `append` does to the cache; a row that does not fit stays as it was, and is counted in status."""
    tokens = new[0].shape[2]
    counts = [tokens] * BATCH if lens is None else lens.clamp(0, tokens).tolist()
    rows = []
    for b, count in enumerate(counts):
        filled = int(cache.kv_lens[b])
        places = [divmod(filled + i, PAGE) for i in range(count)]
        fits = filled + count <= PAGE * PAGES
        if cache.page_table is not None and fits:
            fits = all(0 <= cache.page_table[b, block] < len(cache.k) for block, _ in places)
        cache.status[1] += not fits
        count = count if fits else 0
        for i, (block, key) in enumerate(places[:count]):
            row, key = (b, filled + i) if cache.page_table is None else (int(cache.page_table[b, block]), key)
            for x, stored, scale in zip(new, cache[:3], cache[3:6], strict=True):
                vectors = x[b, :, i].float()
                if stored.dtype == torch.int8:
                    vectors, scale[row, :, key] = int8_oracle.quantised(vectors)
                elif scale is not None:
                    factor = least_scale(vectors)
                    scale[row, :, key] = factor.to(E8M0).view(torch.uint8)
                    vectors = vectors / factor[:, None]
                stored[row, :, key] = vectors.to(stored.dtype)
        cache.kv_lens[b] = filled + count
        start, end = int(cache.kv_starts[b]), int(cache.kv_lens[b])
        if lens is not None:
            rows += [[b, 0, count, start, end], [b, count, tokens, 0, 0]]
        else:
            rows += [[b, 0, tokens, start, end] if fits else [b, 0, tokens, 0, 0]]
    cache.sequences[: len(rows)] = torch.tensor(rows, dtype=torch.int32)


def assert_same(cache, expected):
    """Bit for bit."""
    for name, x, y in zip(Buffers._fields, cache, expected, strict=True):
        assert (x is None and y is None) or torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name
