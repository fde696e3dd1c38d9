"""The key/value/index-key cache for generation."""

import torch
from torch import Tensor

from flexmsa import validation

__all__ = ["MSACache"]


class MSACache:
    """Keys, values and index keys of one layer, in buffers of a fixed size.

    Attributes:
        k, v: [B, Hkv, capacity, D].
        index_k: [B, 1, capacity, Di].
        kv_starts: [B] int32, the first key of each row: the number of padding tokens on the left of its prompt.
        kv_lens: [B] int32, the end of the filled part, alike in every row.
        length: the same as a Python int.

    >>> cache = MSACache(batch_size=2, num_kv_heads=1, head_dim=16, index_head_dim=8, capacity=32)
    >>> cache.append(torch.ones(2, 1, 5, 16), torch.ones(2, 1, 5, 16), torch.ones(2, 1, 5, 8))
    >>> cache.length, cache.kv_lens.tolist()
    (5, [5, 5])
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        index_head_dim: int,
        capacity: int,
        *,
        kv_starts: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate an empty cache.

        Args:
            capacity: tokens that a row can hold, padding included.
            kv_starts: [B] int; padding tokens on the left of each row's prompt. None: no padding.
        """
        for name, size in (("batch_size", batch_size), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
            validation.check_int(name, size, 1)
        validation.check_int("index_head_dim", index_head_dim, 1)
        validation.check_int("capacity", capacity, 1)
        self.k = torch.zeros(batch_size, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.index_k = torch.zeros(batch_size, 1, capacity, index_head_dim, dtype=dtype, device=device)
        self.kv_lens = torch.zeros(batch_size, dtype=torch.int32, device=self.k.device)
        self.kv_starts = torch.zeros_like(self.kv_lens)
        if kv_starts is not None:
            validation.check_sequences(batch_size, 1, capacity, self.k.device, None, kv_starts, None)
            self.kv_starts.copy_(kv_starts)
        self.length = 0

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.k.shape[2]

    def append(self, k: Tensor, v: Tensor, index_k: Tensor) -> None:
        """Write the keys, values and index keys of n new tokens behind those already there, in place.

        Args:
            k, v: [B, Hkv, n, D].
            index_k: [B, 1, n, Di].

        Raises:
            ValueError, TypeError: a shape, dtype or device differs from the cache's, or the tokens do not fit. The
                cache is then unchanged.
        """
        for name, new, buffer in (("k", k, self.k), ("v", v, self.v), ("index_k", index_k, self.index_k)):
            validation.check_cache_input(name, new, buffer, tokens=k)
        count = k.shape[2]
        self.check_room(count)
        positions = self.kv_lens[0] + torch.arange(count, device=k.device)
        for new, buffer in ((k, self.k), (v, self.v), (index_k, self.index_k)):
            buffer.index_copy_(2, positions, new.detach())
        self.kv_lens += count
        self.length += count

    def check_room(self, count: int) -> None:
        """Raise ValueError unless `count` more tokens fit."""
        if self.length + count > self.capacity:
            raise ValueError(
                f"cache: expected at most {self.capacity - self.length} more tokens, got {count}: it holds "
                f"{self.length} of {self.capacity}; make it with a larger capacity"
            )

    def reset(self) -> None:
        """Forget every token; the buffers and `kv_starts` stay."""
        self.kv_lens.zero_()
        self.length = 0
