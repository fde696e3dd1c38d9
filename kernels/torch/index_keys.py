"""The index keys that a few sequences are scored by, as a contiguous or paged cache has them."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.torch import fp8
from flexmsa.kernels.torch.packing import Array, Scratch, array

# Up to so many query vectors, one product per block is faster than one for all blocks.
FEW_VECTORS = 64
# Token scores computed at once, and bytes of keys copied for them: what the processor's cache holds.
SCORES_PER_STEP = 2**19
_COPIED_BYTES = 2**22


def forced_and_hidden(rule: SelectionRule, position: Array, num_blocks: int) -> tuple[Array, Array]:
    """Which blocks queries at position [..., R] choose whatever they score, and which they do not see.

    Both are [..., R, num_blocks].
    """
    block, newest = np.arange(num_blocks), (position // rule.block_size)[..., None]
    hidden = block > newest
    return rule.is_forced(block, newest) & ~hidden, hidden


@dataclass(frozen=True)
class Queries:
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


class IndexKeys:
    """The index keys of C sequences, one for each of ``tiles``, read in stretches of blocks.

    They are copied into one buffer: products are fastest on what the processor's cache holds. But those that
    ``are_used_once``, by a few queries of one sequence, are read in place if they can be. Scores of e4m3 keys are to be
    multiplied by ``factors`` [C, num_blocks * block_size], None for others. What is copied is zero beyond the end of a
    sequence.
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
        # Only the newest block may end beyond the keys, and is not scored where it is local.
        few = len(tiles) == 1 and (tiles[0].stop - tiles[0].start) * num_kv_heads <= FEW_VECTORS
        self.are_used_once = few and rule.num_local_blocks > 0
        self.factors: Tensor | None = None
        if index_k_scale is not None:
            self.factors = fp8.factors(self._load("scales", fp8.as_scales(index_k_scale)[:, 0], 0, self.num_blocks))

    def stretches(self, num_vectors: int, narrow: bool = False) -> Iterator[tuple[int, int]]:
        """First and last block (exclusive) of each stretch to be scored, for num_vectors query vectors a sequence.

        For ``blocks``, or, if ``narrow``, for ``narrow_parts``.
        """
        num_keys = SCORES_PER_STEP // num_vectors
        if not narrow and not self._are_in_place(self._scratch.dtype):
            num_keys = min(num_keys, self._num_copied(self._scratch.dtype))
        step = max(1, num_keys // (len(self._tiles) * self._rule.block_size))
        end = self.num_blocks - self._rule.num_local_blocks
        for first in range(self._rule.num_init_blocks, end, step):
            yield first, min(first + step, end)

    def blocks(self, first: int, stop: int) -> Tensor:
        """Blocks ``first .. stop - 1`` of each sequence in the compute dtype, [C, n * block_size, Di]: read only."""
        if self._are_in_place(self._scratch.dtype):
            return self._stored(first, stop)[None]
        return self._load("keys", self._keys, first, stop)

    def narrow_parts(self, first: int, stop: int) -> Iterator[tuple[slice, Tensor]]:
        """Whole blocks ``first .. stop - 1`` of the one sequence as bf16 numbers, read only, and where they belong.

        In parts [m, Di], of keys that count from block ``first``: one, if they are stored so. e4m3 numbers are divided
        by ``fp8.BFLOAT16_SHIFT``.
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
        """The keys of the one sequence that have these numbers [n] in it, in the compute dtype, [n, Di].

        e4m3 ones are divided by ``fp8.SHIFT``.
        """
        (tile,) = self._tiles
        if self._page_table is None:
            place, key = np.full_like(numbers, tile.batch), tile.k_start + numbers
        else:
            block, key = np.divmod(numbers, self._rule.block_size)
            place = array(self._page_table)[tile.batch, block]
        stored = self._keys[torch.as_tensor(place), torch.as_tensor(key)]
        return self._scratch.widen(stored, self._scratch.take("keys", *stored.shape))

    def _are_in_place(self, dtype: torch.dtype) -> bool:
        """Whether keys wanted in this dtype are read where they are stored."""
        return self.are_used_once and self._page_table is None and self.dtype == dtype

    def _num_copied(self, dtype: torch.dtype) -> int:
        """How many keys are copied to this dtype at once."""
        return _COPIED_BYTES // (self._keys.shape[-1] * dtype.itemsize)

    def _stored(self, first: int, stop: int) -> Tensor:
        """Whole blocks ``first .. stop - 1`` of the one sequence, as they are stored, [n * block_size, Di]."""
        (tile,) = self._tiles
        if self._page_table is not None:
            return self._take(self._keys, self._page_table[tile.batch, first:stop])
        start, end = (tile.k_start + block * self._rule.block_size for block in (first, stop))
        return self._keys[tile.batch, start:end]

    def _take(self, blocks: Tensor, numbers: Tensor) -> Tensor:
        """These of blocks [N, block_size, ...], put one after another in a buffer."""
        out = self._scratch.take("blocks", len(numbers), *blocks.shape[1:], dtype=blocks.dtype)
        return torch.index_select(blocks, 0, numbers, out=out).flatten(0, 1)

    def _load(self, name: str, x: Tensor, first: int, stop: int) -> Tensor:
        """These blocks of x [B,S,...] or of pages of it, [C, n * block_size, ...]."""
        start, num_keys = first * self._rule.block_size, (stop - first) * self._rule.block_size
        out = self._scratch.take(name, len(self._tiles), num_keys, *x.shape[2:])
        for part, tile in zip(out, self._tiles, strict=True):
            count = max(0, min(tile.k_end - tile.k_start - start, num_keys))
            if self._page_table is None:
                stored = x[tile.batch, tile.k_start + start : tile.k_start + start + count]
            else:
                pages = self._page_table[tile.batch, first : first - (-count // self._rule.block_size)]
                stored = self._take(x, pages)[:count]
            self._scratch.widen(stored, part[:count])
            if count < num_keys:
                part[count:].zero_()
        return out
