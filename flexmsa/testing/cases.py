"""A test case as a few numbers, which hypothesis can draw and shrink, and a failure prints as code."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexmsa.kernels.layout import lay_out

__all__ = ["Case"]

# What `Case.values` may be, and `Case.ids`.
VALUES = ("normal", "ties", "huge", "zeros", "unseen NaN", "odd scores")
IDS = ("selected", "given", "garbage")
# What says which keys a query sees, in a `Case` and in the functions.
LENGTHS = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "kv_starts", "kv_lens")
_GARBAGE = (-(2**31), -2, 2**30, 2**31 - 1)


@dataclass(frozen=True)
class Case:
    """Shapes and settings of one call of `flexmsa.attention`, which determine its inputs.

    Index queries and keys are multiples of 1/16 whose products are exact in every dtype, so a selection has one right
    answer. The numbers are drawn on the device that they are for.

    Attributes:
        strided, offset: as for `lay_out`, of all five inputs.
        values: "normal"; "ties", index vectors of few values, which makes equal scores common; "huge", which saturates
            both softmaxes; "zeros"; "unseen NaN", in keys that no query sees; "odd scores", NaN and infinities in the
            index vectors, whose loss is not compared.
        ids: "selected" by the index branch; "given", random ids in any order, with -1 and repeats; "garbage", as given,
            with ids out of range, which only GPUs accept.
        lse_gradient: the lse is differentiated too.
        deferred: the backward computes the index loss (`index_loss_value` of `flexmsa.attention`).

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
    cu_seqlens_q: tuple[int, ...] | None = None
    cu_seqlens_k: tuple[int, ...] | None = None
    kv_starts: tuple[int, ...] | None = None
    kv_lens: tuple[int, ...] | None = None
    scale: float | None = None
    index_scale: float | None = None
    dtype: str = "float32"
    strided: bool = False
    offset: int = 0
    values: str = "normal"
    ids: str = "selected"
    lse_gradient: bool = True
    deferred: bool = False
    seed: int = 0

    @property
    def shape(self) -> tuple[Any, ...]:
        """All that the kernels of a GPU are compiled for; other lengths, masks and values share them."""
        sizes = self.num_kv_heads, self.group_size, self.head_dim, self.index_head_dim, self.block_size, self.topk
        return "layer", *sizes, self.dtype, self.strided, self.offset, self.scale is None or self.scale > 0

    @property
    def kind(self) -> str:
        """What it is called in a summary."""
        if self.topk is None:
            return "warm-up"
        if self.cu_seqlens:
            return "packed documents"
        if self.cu_seqlens_q:
            return "packed documents, some queries"
        if self.kv_lens:
            return "part-filled cache"
        return "left padding" if self.kv_starts else "plain"

    def inputs(self, device: str | torch.device) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
        """Return (q, k, v, index_q, index_k) and the keyword arguments of `flexmsa.attention`."""
        generator = self._generator(device)
        factor = 8 if self.values == "huge" else 1

        def place(x: Tensor) -> Tensor:
            dtype = getattr(torch, self.dtype)
            batch, heads, seqlen, size = x.shape
            shape = batch, heads, seqlen, size
            laid = lay_out(shape, strided=self.strided, offset=self.offset, dtype=dtype, device=device)
            return laid.copy_(torch.zeros_like(x) if self.values == "zeros" else x)

        def normal(heads: int, seqlen: int, size: int, factor: int = 1) -> Tensor:
            drawn = torch.randn(self.batch, heads, seqlen, size, generator=generator, device=device)
            return place(factor * drawn)

        def exact(heads: int, seqlen: int) -> Tensor:
            largest, unit = 1 if self.values == "ties" else 31, factor / 16
            shape = self.batch, heads, seqlen, self.index_head_dim
            drawn = torch.randint(-largest, largest + 1, shape, generator=generator, device=device) * unit
            if self.values == "odd scores":
                kinds = torch.randint(0, 200, shape, generator=generator, device=device)
                for kind, odd in enumerate((torch.nan, torch.inf, -torch.inf)):
                    drawn = drawn.masked_fill(kinds == kind, odd)
            return place(drawn)

        q = normal(self.num_kv_heads * self.group_size, self.seqlen_q, self.head_dim, factor)
        k = normal(self.num_kv_heads, self.seqlen_k, self.head_dim, factor)
        v = normal(self.num_kv_heads, self.seqlen_k, self.head_dim)
        index_q, index_k = exact(self.num_kv_heads, self.seqlen_q), exact(1, self.seqlen_k)
        if self.values == "unseen NaN":
            for x in (k, v, index_k):
                self._hide(x)
        return (q, k, v, index_q, index_k), self.settings(device)

    def settings(self, device: str | torch.device) -> dict[str, Any]:
        """Return the keyword arguments of `flexmsa.attention`."""
        names = ("block_size", "topk", "num_local_blocks", "num_init_blocks", *LENGTHS, "scale", "index_scale")
        settings = {name: getattr(self, name) for name in names}
        return {
            name: torch.tensor(value, dtype=torch.int32, device=device) if isinstance(value, tuple) else value
            for name, value in settings.items()
        }

    def block_indices(self, device: str | torch.device) -> Tensor | None:
        """Return the ids that the main branch attends to; None where the index branch selects, and in the warm-up."""
        if self.ids == "selected" or self.topk is None:
            return None
        generator = self._generator(device)
        shape = self.batch, self.num_kv_heads, self.seqlen_q, self.topk
        blocks = -(-self.seqlen_k // self.block_size)
        ids = torch.randint(-1, blocks, shape, generator=generator, device=device, dtype=torch.int32)
        if self.ids == "garbage":
            kinds = torch.randint(0, 20, shape, generator=generator, device=device)
            for kind, number in enumerate((blocks, *_GARBAGE)):
                ids = ids.masked_fill(kinds == kind, number)
        return ids

    def _generator(self, device: str | torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed)

    def _hide(self, x: Tensor) -> None:
        """Fill the keys x [B, H, Sk, ...] outside each row's range with NaN."""
        for row in range(self.batch):
            start = 0 if self.kv_starts is None else self.kv_starts[row]
            end = self.seqlen_k if self.kv_lens is None else self.kv_lens[row]
            x[row, :, :start] = torch.nan
            x[row, :, max(start, end) :] = torch.nan
