"""The index keys of a few sequences, read from a contiguous or paged cache."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.sequences import page_place
from flexmsa.kernels.torch import fp8, int8
from flexmsa.kernels.torch.packing import Array, Scratch, array

# Up to this number of query vectors, one product per block is faster than one for all blocks.
FEW_VECTORS = 64
# Token scores computed at once, and bytes of keys copied for them: both fit the processor's cache.
SCORES_PER_STEP = 2**19
_COPIED_BYTES = 2**22


def forced_and_hidden(rule: SelectionRule, position: Array, num_blocks: int) -> tuple[Array, Array]:
    """Whether queries at position [..., R] choose a block whatever its score, and whether they do not see it.

    Both are [..., R, num_blocks].
    """
    block, newest = np.arange(num_blocks), (position // rule.block_size)[..., None]
    hidden = block > newest
    return rule.is_forced(block, newest) & ~hidden, hidden


@dataclass(frozen=True)
class Queries:
    """A tile of queries: the tokens ``start .. stop - 1`` of a batch row.

    The first token is at ``position`` in its sequence, the last one in block ``num_blocks - 1``.
    """

    batch: int
    start: int
    stop: int
    k_start: int
    k_end: int
    position: int
    num_blocks: int


class IndexKeys:
    """The index keys of C sequences, one per tile of ``tiles``, read a range of blocks at a time.

    The keys are copied into one buffer, as products are fastest on operands in the processor's cache. Keys that
    ``are_used_once``, by a few queries of one sequence, are read in place where possible. Scores of e4m3 and int8 keys
    must be multiplied by ``factors`` [C, num_blocks * block_size], which is None for other keys. Copies are zero beyond
    the end of a sequence.
    """

    def __init__(
        self,
        index_k: Tensor,
        index_k_scale: Tensor | None,
        page_table: Tensor | None,
        tiles: list[Queries],
        num_kv_heads: int,
        rule: SelectionRule,
        scratch: Scratch,
    ) -> None:
        self._keys = index_k[:, 0]
        self._page_table = page_table
        self._tiles = tiles
        self._rule = rule
        self._scratch = scratch
        self.dtype = index_k.dtype
        self.num_blocks = max(tile.num_blocks for tile in tiles)
        # Only the newest block may extend beyond the keys. It is not scored if it is local.
        few = len(tiles) == 1 and (tiles[0].stop - tiles[0].start) * num_kv_heads <= FEW_VECTORS
        self.are_used_once = few and rule.num_local_blocks > 0
        is_int8 = self.dtype == torch.int8
        self.are_multiplied_in_int8 = (
            is_int8 and self.are_used_once and index_k.device.type == "cpu" and int8.multiplies_int8()
        )
        self.factors: Tensor | None = None
        if index_k_scale is not None:
            scales = index_k_scale if is_int8 else fp8.as_scales(index_k_scale)
            loaded = self._load("scales", scales[:, 0], 0, self.num_blocks)
            self.factors = loaded if is_int8 else fp8.factors(loaded)

    def block_ranges(self, num_vectors: int, narrow: bool = False) -> Iterator[tuple[int, int]]:
        """The ranges (first, stop) of blocks to score, for num_vectors query vectors per sequence.

        Sized for ``blocks``, or, if ``narrow``, for ``narrow_parts``.
        """
        num_keys = SCORES_PER_STEP // num_vectors
        if not narrow and not self.are_multiplied_in_int8 and not self._are_in_place(self._scratch.dtype):
            num_keys = min(num_keys, self._num_copied(self._scratch.dtype))
        step = max(1, num_keys // (len(self._tiles) * self._rule.block_size))
        end = self.num_blocks - self._rule.num_local_blocks
        for first in range(self._rule.num_init_blocks, end, step):
            yield first, min(first + step, end)

    def blocks(self, first: int, stop: int) -> Tensor:
        """Blocks ``first .. stop - 1`` of each sequence in the compute dtype, [C, n * block_size, Di], read-only."""
        if self._are_in_place(self._scratch.dtype):
            return self._stored(first, stop)[None]
        return self._load("keys", self._keys, first, stop)

    def int8_products(self, first: int, stop: int, queries: Tensor) -> Tensor:
        """Products of blocks ``first .. stop - 1`` of the only sequence with int8 queries [R, Di], [n, block_size, R].

        In the compute dtype, exactly.
        """
        products = int8.products(queries, self._stored(first, stop)).unflatten(1, (stop - first, -1))
        return self._scratch.take("scores", *products.shape).copy_(products).permute(1, 2, 0)

    def narrow_parts(self, first: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Whole blocks ``first .. stop - 1`` of the only sequence in bf16, in parts of (key range, keys [m, Di]).

        Key numbers count from block ``first``. Keys stored in bf16 are one part, read-only. e4m3 numbers are divided by
        ``fp8.BFLOAT16_SHIFT``.
        """
        size, step = self._rule.block_size, stop - first
        if not self._are_in_place(torch.bfloat16):
            step = max(1, self._num_copied(torch.bfloat16) // size)
        for part in range(first, stop, step):
            end = min(part + step, stop)
            keys = self._stored(part, end)
            if fp8.is_e4m3(keys):
                keys = fp8.as_bfloat16(keys, self._scratch.take("e4m3", *keys.shape, dtype=torch.int16))
            yield slice((part - first) * size, (end - first) * size), keys

    def rows(self, numbers: Array) -> Tensor:
        """The keys of the only sequence at positions ``numbers`` [n], in the compute dtype, [n, Di].

        e4m3 numbers are divided by ``fp8.SHIFT``.
        """
        (tile,) = self._tiles
        if self._page_table is None:
            place, key = np.full_like(numbers, tile.batch), tile.k_start + numbers
        else:
            block, key = np.divmod(numbers, self._rule.block_size)
            row, column = page_place(self._page_table, tile.batch, tile.k_start, self._rule.block_size)
            place = array(self._page_table)[row, column + block]
        stored = self._keys[torch.as_tensor(place), torch.as_tensor(key)]
        return self._scratch.widen(stored, self._scratch.take("keys", *stored.shape))

    def _are_in_place(self, dtype: torch.dtype) -> bool:
        """Whether keys of this dtype are read where they are stored, without a copy."""
        return self.are_used_once and self._page_table is None and self.dtype == dtype

    def _num_copied(self, dtype: torch.dtype) -> int:
        """The number of keys that are copied to this dtype at once."""
        return _COPIED_BYTES // (self._keys.shape[-1] * dtype.itemsize)

    def _stored(self, first: int, stop: int) -> Tensor:
        """Whole blocks ``first .. stop - 1`` of the only sequence in their own dtype, [n * block_size, Di]."""
        (tile,) = self._tiles
        if self._page_table is not None:
            return self._take(self._keys, self._pages(tile, first, stop))
        start, end = (tile.k_start + block * self._rule.block_size for block in (first, stop))
        return self._keys[tile.batch, start:end]

    def _pages(self, tile: Queries, first: int, stop: int) -> Tensor:
        """The pages of blocks ``first .. stop - 1`` of a sequence."""
        assert self._page_table is not None
        row, column = page_place(self._page_table, tile.batch, tile.k_start, self._rule.block_size)
        return self._page_table[row, column + first : column + stop]

    def _take(self, blocks: Tensor, numbers: Tensor) -> Tensor:
        """The given ones of blocks [N, block_size, ...], one after another in a buffer."""
        out = self._scratch.take("blocks", len(numbers), *blocks.shape[1:], dtype=blocks.dtype)
        return torch.index_select(blocks, 0, numbers, out=out).flatten(0, 1)

    def _load(self, name: str, x: Tensor, first: int, stop: int) -> Tensor:
        """Blocks ``first .. stop - 1`` of x [B,S,...], or of its pages, [C, n * block_size, ...]."""
        start, num_keys = first * self._rule.block_size, (stop - first) * self._rule.block_size
        out = self._scratch.take(name, len(self._tiles), num_keys, *x.shape[2:])
        for part, tile in zip(out, self._tiles, strict=True):
            count = max(0, min(tile.k_end - tile.k_start - start, num_keys))
            if self._page_table is None:
                stored = x[tile.batch, tile.k_start + start : tile.k_start + start + count]
            else:
                pages = self._pages(tile, first, first - (-count // self._rule.block_size))
                stored = self._take(x, pages)[:count]
            self._scratch.widen(stored, part[:count])
            if count < num_keys:
                part[count:].zero_()
        return out
