"""A test case as a few numbers, which hypothesis can draw and shrink, and a failure prints as code."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Case"]


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one call of `flexmsa.attention`, which determine its inputs.

    Index queries and keys are multiples of 1/16 whose products are exact in every dtype, so a selection has one right
    answer. `ties` draws them from few values, which makes equal scores common.

    >>> inputs, settings = Case(seqlen_q=5, seqlen_k=5).inputs("cpu")
    >>> [tuple(x.shape) for x in inputs]
    [(1, 1, 5, 16), (1, 1, 5, 16), (1, 1, 5, 16), (1, 1, 5, 16), (1, 1, 5, 16)]
    """

    batch: int = 1
    num_kv_heads: int = 1
    group_size: int = 1
    head_dim: int = 16
    index_head_dim: int = 16
    seqlen_q: int = 1
    seqlen_k: int = 1
    block_size: int = 16
    topk: int | None = 2
    num_local_blocks: int = 1
    num_init_blocks: int = 0
    cu_seqlens: tuple[int, ...] | None = None
    kv_starts: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    dtype: str = "float32"
    ties: bool = False
    strided: bool = False
    seed: int = 0

    def inputs(self, device: str | torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return (q, k, v, index_q, index_k) and the keyword arguments of `flexmsa.attention`."""
        generator = torch.Generator().manual_seed(self.seed)
        dtype = getattr(torch, self.dtype)

        def layout(x: Tensor) -> Tensor:
            x = x.to(device=device, dtype=dtype)
            if not self.strided:
                return x
            # [B, S, H, D] in a wider buffer: the strides of a fused projection.
            batch, heads, seqlen, size = x.shape
            wide = torch.full((batch, seqlen, heads, size + 8), torch.nan, device=device, dtype=dtype)
            view = wide.transpose(1, 2)[..., :size]
            view.copy_(x)
            return view

        def normal(heads: int, seqlen: int, size: int) -> Tensor:
            return layout(torch.randn(self.batch, heads, seqlen, size, generator=generator))

        def exact(heads: int, seqlen: int, size: int) -> Tensor:
            largest = 1 if self.ties else 31
            drawn = torch.randint(-largest, largest + 1, (self.batch, heads, seqlen, size), generator=generator)
            return layout(drawn / 16)

        q = normal(self.num_kv_heads * self.group_size, self.seqlen_q, self.head_dim)
        k, v = (normal(self.num_kv_heads, self.seqlen_k, self.head_dim) for _ in range(2))
        index_q = exact(self.num_kv_heads, self.seqlen_q, self.index_head_dim)
        index_k = exact(1, self.seqlen_k, self.index_head_dim)
        return (q, k, v, index_q, index_k), self.settings(device)

    def settings(self, device: str | torch.device) -> dict[str, Any]:
        """Return the keyword arguments of `flexmsa.attention`."""
        names = ("block_size", "topk", "num_local_blocks", "num_init_blocks", "cu_seqlens", "kv_starts", "kv_lens")
        settings = {name: getattr(self, name) for name in names}
        return {
            name: torch.tensor(value, dtype=torch.int32, device=device) if isinstance(value, tuple) else value
            for name, value in settings.items()
        }
