"""One forward of transformers' continuous batching: tokens of several requests in a row, and their pages of a cache.

transformers' cache has keys and values. The index keys of its tokens are beside it, one tensor per layer, in the order
of its pages: requests that share pages of the cache share their index keys too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation.continuous_batching import PagedAttentionCache

from flexmsa import ops

__all__ = ["PagedBatch", "paged_batch"]

# The attribute of transformers' cache with the index keys: layer number -> [slots, Di].
_INDEX_KEYS = "flexmsa_index_keys"


class _Slots(NamedTuple):
    """The number of tokens that a cache has room for, and which of them a forward writes and reads."""

    number: int
    written: Tensor
    read: Tensor


@dataclass(frozen=True)
class PagedBatch:
    """The arguments of a forward.

    Attributes:
        cache: transformers' cache, of one kind of layers.
        table: the table of sequences, one per request: its new tokens, and all its keys.
        written: [tokens], where `cache` has the new tokens.
        read: [keys of all requests], where it has all tokens; empty if there are no earlier ones.
    """

    cache: PagedAttentionCache
    table: Tensor
    written: Tensor
    read: Tensor

    def update(self, layer_idx: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append key and value [1, Hkv, tokens, D] to the cache; return those of all keys.

        For versions of transformers whose modules leave this to the attention function.
        """
        found = self.cache.update(key, value, layer_idx, read_index=[self.read], write_index=[self.written])
        key, value = (x.transpose(0, 1).unsqueeze(0) for x in found)
        return key, value

    def update_index(self, layer_idx: int, index_k: Tensor) -> Tensor:
        """Append index_k [1, 1, tokens, Di] to the index keys; return those of all keys, [1, 1, keys, Di]."""
        by_layer = vars(self.cache).setdefault(_INDEX_KEYS, {})
        if layer_idx not in by_layer:
            by_layer[layer_idx] = index_k.new_empty(self._slots.number, index_k.shape[3])
        by_layer[layer_idx].index_copy_(0, self._slots.written, index_k[0, 0])
        return by_layer[layer_idx].index_select(0, self._slots.read)[None, None] if len(self.read) else index_k

    @cached_property
    def _slots(self) -> "_Slots":
        cache: Any = self.cache
        if not hasattr(cache, "cache_allocators"):
            return _Slots(cache.cache_shape[0], self.written, self.read)
        # Layers share one tensor: a block of it has a page of each layer's keys, and one of its values.
        (allocator,) = cache.cache_allocators.values()
        page, stride = allocator.tokens_per_page, allocator.block_physical_stride
        # The first two sectors are the cache's own.
        blocks = allocator.num_blocks + 2 * allocator.blocks_per_sector
        written, read = (places // stride * page + places % stride for places in (self.written, self.read))
        return _Slots(blocks * page, written, read)


def paged_batch(tokens: Tensor, cache: Any, arguments: Mapping[str, Any]) -> PagedBatch | None:
    """Return the batch of a forward that continuous batching calls, or None for another forward.

    Args:
        tokens: [1, tokens] or [1, tokens, width]; only its shape and device are read.
        cache: the cache among the arguments.
        arguments: the other keyword arguments.
    """
    if not isinstance(cache, PagedAttentionCache):
        return None
    if arguments.get("block_table") is not None:
        raise ValueError("block_table: expected None, got one; set max_blocks_per_request=0")
    q_offsets, k_offsets = arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"]
    if isinstance(k_offsets, Mapping):
        (k_offsets,) = k_offsets.values()
    (read,), (written,) = arguments["read_index"], arguments["write_index"]
    keys = len(read) or tokens.shape[1]
    offsets = q_offsets.to(torch.int32), k_offsets.to(torch.int32)
    table = ops.sequence_table(tokens[:, None], offsets[0], None, None, keys, offsets[1])
    return PagedBatch(cache, table, written, read)
