"""Attention to pages that a server assigns: stateless functions for a step of an engine.

Tokens come first, as engines have them: T tokens of R sequences, in a row. Chunks of prompts, drafts and single tokens
may be mixed. Everything stays on the device, and in a CUDA graph the same tensors are written anew before a replay.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flexmsa import _core, ops, validation
from flexmsa._buffers import FP8
from flexmsa._page_checks import check_buffer, check_one_scale, check_paged_batch, check_pair, check_table, check_tokens
from flexmsa._profiling import profiled
from flexmsa.backends import choose_backend
from flexmsa.ops.checks import check_decodes
from flexmsa.types import AuxOutput, AuxRequest

__all__ = ["PagePools", "PagedBatch", "attend_pages", "select_pages", "write_pages"]


@dataclass(frozen=True)
class PagePools:
    """The pages of one layer: k, v [P, Hkv, page_size, D], index_k [P, 1, page_size, Di], of any strides but the last.

    Attributes:
        k, v, index_k: views of an engine's memory.
        k_scale, v_scale, index_k_scale: for e4m3 pages. A float: number = scale * stored, for all of them. uint8
            [P, heads, page_size], contiguous: a power of two for each token and head; view it as float8_e8m0fnu. None:
            the numbers are as they are stored. index_k may be int8, with float32 [P, 1, page_size], contiguous.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not match.

    >>> k, v = torch.zeros(2, 6, 1, 16, 32).unbind(0)
    >>> PagePools(k, v, torch.zeros(6, 1, 16, 8)).page_size
    16
    """

    k: Tensor
    v: Tensor
    index_k: Tensor
    k_scale: Tensor | float | None = None
    v_scale: Tensor | float | None = None
    index_k_scale: Tensor | float | None = None
    # As kernels take them: [page_size] ones for e4m3 pages without scales for each token.
    scales: tuple[Tensor | None, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = {"k_scale": self.k_scale, "v_scale": self.v_scale, "index_k_scale": self.index_k_scale}
        pools = {"k": self.k, "v": self.v, "index_k": self.index_k}
        tensors = {name: scale if isinstance(scale, Tensor) else None for name, scale in given.items()}
        validation.check_pools(pools, tensors)
        for (name, scale), (of, pool) in zip(given.items(), pools.items(), strict=True):
            if pool.stride(3) != 1:
                raise ValueError(f"{of}: expected a dense last dimension, got strides {list(pool.stride())}")
            if not isinstance(scale, Tensor):
                check_one_scale(name, scale, pool)
        if isinstance(self.k_scale, Tensor) != isinstance(self.v_scale, Tensor):
            raise ValueError("k_scale, v_scale: expected scales for each token in both or in neither")
        if 0 in self.k.shape or 0 in self.index_k.shape:
            sizes = f"{list(self.k.shape)} and {list(self.index_k.shape)}"
            raise ValueError(f"k, index_k: expected at least one page, head and number, got {sizes}")
        scales = (
            scale if isinstance(scale, Tensor) else _ones(pool.device, self.page_size) if pool.dtype == FP8 else None
            for pool, scale in zip(pools.values(), given.values(), strict=True)
        )
        object.__setattr__(self, "scales", tuple(scales))

    @property
    def page_size(self) -> int:
        """Tokens per page, which are a block of the attention."""
        return self.k.shape[2]

    @property
    def factors(self) -> tuple[float, float, float]:
        """What numbers of k, v and index_k are multiplied by before they are stored as e4m3."""
        scales = self.k_scale, self.v_scale, self.index_k_scale
        k, v, index_k = (1.0 / scale if isinstance(scale, float) else 1.0 for scale in scales)
        return k, v, index_k


def _ones(device: torch.device, page_size: int) -> Tensor:
    """The codes of scales 1."""
    return torch.full((page_size,), 127, dtype=torch.uint8, device=device)


# Rows of a table beside those of the sequences: padding tokens, and a beginning at a multiple of 16 bytes.
_SPARE = 4


class _Part(NamedTuple):
    """Tokens that are computed together: `rows` sequences of seqlen_q tokens each, or packed ones in a single row."""

    tokens: slice
    rows: int
    seqlen_q: int
    table: Tensor
    # That of the batch, from this row on.
    page_table: Tensor
    first_row: int

    def arrange(self, x: Tensor) -> Tensor:
        """Return the part of x [T, H, D] as [rows, H, seqlen_q, D], a view."""
        return x[self.tokens].unflatten(0, (self.rows, self.seqlen_q)).transpose(1, 2)


class PagedBatch:
    """Which tokens each sequence of a step has, and its pages; made once per step, and used by every layer.

    Attributes:
        table: [R + 4, 5] int32, the sequences as kernels take them.
        num_tokens, page_size: as given.

    >>> page_table = torch.tensor([[3, 1], [0, -1]], dtype=torch.int32)
    >>> kv_lens, offsets = torch.tensor([20, 7], dtype=torch.int32), torch.tensor([0, 4, 5], dtype=torch.int32)
    >>> PagedBatch(page_table, kv_lens, offsets, num_tokens=5, page_size=16)
    PagedBatch(num_sequences=2, num_tokens=5, num_decodes=0, page_size=16)
    """

    def __init__(
        self,
        page_table: Tensor,
        kv_lens: Tensor,
        cu_seqlens_q: Tensor | None = None,
        *,
        num_tokens: int,
        num_decodes: int = 0,
        page_size: int = 128,
        table: Tensor | None = None,
    ) -> None:
        """Make the table of sequences; nothing is read back from the device.

        Args:
            page_table: [R, max_pages] int32, the pages of each sequence; rows may be strided.
            kv_lens: [R] int32, the keys of each sequence, its new tokens among them.
            cu_seqlens_q: [R + 1] int32, where the tokens of each sequence begin, from 0 on; tokens past the last offset
                are padding, and get out 0. None: each sequence has num_tokens // R tokens, as in a decoding step,
                which then takes fewest launches; a sequence that is padding has kv_lens 0.
            num_tokens: T.
            num_decodes: the first sequences of cu_seqlens_q that have one token each; they are computed as a decoding
                step, and not in the tiles of many tokens that others share. 0 is right for any batch.
            page_size: tokens per page.
            table: [R + 4, 5] int32, where to write the table: that of an earlier batch, for a graph that was captured
                with it. The graph also reads that batch's page_table, to be written anew, and has its num_decodes.

        Raises:
            ValueError, TypeError: a shape, dtype, device or, on a CPU, a value is not as described.
        """
        check_paged_batch(page_table, kv_lens, cu_seqlens_q, num_tokens, num_decodes, page_size)
        count = kv_lens.shape[0]
        if cu_seqlens_q is not None and not torch.compiler.is_compiling():
            check_decodes(cu_seqlens_q, num_decodes)
        if num_decodes == count:
            # Tokens past the last sequence belong to a part that has one.
            cu_seqlens_q, num_decodes = (None, 0) if num_tokens == count else (cu_seqlens_q, count - 1)
        uniform = cu_seqlens_q is None
        if table is None:
            table = torch.empty(count + _SPARE, 5, dtype=torch.int32, device=kv_lens.device)
        check_table(table, count + _SPARE, kv_lens.device)
        ops.paged_table(cu_seqlens_q, kv_lens, page_table, num_tokens, page_size, num_decodes, table)
        self.table, self.num_tokens, self.page_size = table, num_tokens, page_size
        self._sizes = count, num_decodes
        rows, others = count if uniform else 1, num_tokens - num_decodes
        first, first_pages = ops.second_part(num_decodes)
        own = table[first : first + count - num_decodes + (0 if uniform else 1)]
        tables = own, page_table[first_pages:], first_pages
        self._parts = [_Part(slice(num_decodes, num_tokens), rows, others // rows, *tables)] if others else []
        if num_decodes:
            tables = table[:num_decodes], page_table[:num_decodes], 0
            self._parts.insert(0, _Part(slice(0, num_decodes), num_decodes, 1, *tables))

    def __repr__(self) -> str:
        count, num_decodes = self._sizes
        return (
            f"PagedBatch(num_sequences={count}, num_tokens={self.num_tokens}, num_decodes={num_decodes}, "
            f"page_size={self.page_size})"
        )


@profiled("write pages")
def write_pages(
    k: Tensor, v: Tensor, index_k: Tensor, pools: PagePools, slots: Tensor, *, backend: str | None = None
) -> None:
    """Write new tokens to their slots, in place: slot s is place s % page_size of page s // page_size.

    Args:
        k, v: [T, Hkv, D]; index_k: [T, 1, Di].
        pools: pages with a scale for each token get new scales; other e4m3 pages keep numbers within e4m3's range.
        slots: [T] int32 or int64; a negative slot, or one past the last page, is skipped. Slots differ.
        backend: as for `flexmsa.decode`.

    Raises:
        RuntimeError: a token needs a gradient. ValueError, TypeError: an argument is not as described.

    >>> pools = PagePools(*torch.zeros(2, 6, 1, 16, 32).unbind(0), torch.zeros(6, 1, 16, 8))
    >>> write_pages(torch.ones(2, 1, 32), torch.ones(2, 1, 32), torch.ones(2, 1, 8), pools, torch.tensor([35, -1]))
    >>> pools.k[2, 0, :5].amax(-1).tolist()
    [0.0, 0.0, 0.0, 1.0, 0.0]
    """
    for name, x, pool in (("k", k, pools.k), ("v", v, pools.v), ("index_k", index_k, pools.index_k)):
        check_tokens(name, x, None, pool, pool.shape[1])
    validation.reject_gradients(k=k, v=v, index_k=index_k)
    validation.reject_gradients(**{"pools.k": pools.k, "pools.v": pools.v, "pools.index_k": pools.index_k})
    validation.check_lengths("slots", slots, pools.k.device)
    validation.check_shape("slots", slots, (k.shape[0],), "[T]")
    new = (x.transpose(0, 1).unsqueeze(0) for x in (k, v, index_k))
    stored = pools.k, pools.v, pools.index_k, *pools.scales
    ops.write_pages(*new, slots, *stored, *pools.factors, choose_backend("paged", backend, k))


@profiled("select from pages")
def select_pages(
    index_q: Tensor,
    pools: PagePools,
    batch: PagedBatch,
    *,
    topk: int = 16,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Select blocks for each token and group, as `flexmsa.select_blocks` does.

    Args:
        index_q: [T, Hkv, Di].
        out: [T, Hkv, topk] int32 to write to, of any strides but the last.
        Others: as for `flexmsa.decode`; "reference" has no kernel for this.

    Returns:
        block_indices [T, Hkv, topk] int32, ascending, then -1; `out` if it is given.

    Raises:
        ValueError, TypeError: an argument is not as described.

    >>> pools = PagePools(*torch.randn(2, 6, 1, 16, 32).unbind(0), torch.randn(6, 1, 16, 8))
    >>> batch = PagedBatch(torch.tensor([[3, 1]]).int(), torch.tensor([20]).int(), num_tokens=1, page_size=16)
    >>> select_pages(torch.randn(1, 1, 8), pools, batch, topk=3)
    tensor([[[ 0,  1, -1]]], dtype=torch.int32)
    """
    check_pair(pools, batch, PagePools, PagedBatch)
    validation.check_settings(pools.page_size, topk, num_local_blocks, num_init_blocks)
    check_tokens("index_q", index_q, batch.num_tokens, pools.index_k, pools.k.shape[1])
    validation.reject_gradients(index_q=index_q, k=pools.k, v=pools.v, index_k=pools.index_k)
    shape = batch.num_tokens, pools.k.shape[1], topk
    if out is None:
        out = torch.empty(shape, dtype=torch.int32, device=index_q.device)
    check_buffer("out", out, shape, torch.int32, index_q.device)
    backend = choose_backend("paged", backend, index_q)
    for part in batch._parts:
        keys, written = (pools.index_k, part.table, part.page_table, pools.scales[2]), part.arrange(out)
        numbers = num_local_blocks, num_init_blocks, backend, part.first_row
        ops.select_pages(part.arrange(index_q), *keys, written, *numbers)
    return out


@profiled("attend to pages")
def attend_pages(
    q: Tensor,
    index_q: Tensor | None,
    pools: PagePools,
    batch: PagedBatch,
    *,
    topk: int | None = 16,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    scale: float | None = None,
    block_indices: Tensor | None = None,
    out: Tensor | None = None,
    block_indices_out: Tensor | None = None,
    backend: str | None = None,
    return_aux: AuxRequest | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """Select blocks and attend to them, as `flexmsa.decode` does: a token sees its sequence up to itself.

    Args:
        q: [T, Hq, D], the newest tokens of each sequence, whose keys have been written.
        index_q: [T, Hkv, Di]; may be None if nothing is selected.
        topk: None attends to every block.
        block_indices: [T, Hkv, topk] int32, attended to instead of a selection.
        out: [T, Hq, D] of q's dtype to write to, of any strides but the last, in memory other than q's.
        block_indices_out: [T, Hkv, topk] int32, where a selection is written, of any strides but the last.
        Others: as for `flexmsa.decode`; "reference" has no kernel for this.

    Returns:
        [T, Hq, D], which is `out` if it is given; or with `return_aux` also an AuxOutput, lse [T, Hq] and block_indices
        [T, Hkv, topk], None where every block is taken. A token that sees no key gets 0.

    Raises:
        RuntimeError: q or index_q needs a gradient. ValueError, TypeError: an argument is not as described.

    >>> pools = PagePools(*torch.randn(2, 6, 1, 16, 32).unbind(0), torch.randn(6, 1, 16, 8))
    >>> batch = PagedBatch(torch.tensor([[3, 1]]).int(), torch.tensor([20]).int(), num_tokens=1, page_size=16)
    >>> attend_pages(torch.randn(1, 4, 32), torch.randn(1, 1, 8), pools, batch, topk=1).shape
    torch.Size([1, 4, 32])
    """
    aux = validation.check_aux(return_aux)
    validation.check_scale("scale", scale)
    if aux.any_loss:
        raise ValueError("return_aux: expected lse or block_indices, got index_loss, which training has")
    check_pair(pools, batch, PagePools, PagedBatch)
    validation.check_settings(pools.page_size, topk, num_local_blocks, num_init_blocks)
    check_tokens("q", q, batch.num_tokens, pools.k, pools.k.shape[1], groups=True)
    backend = choose_backend("paged", backend, q)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_buffer("out", out, tuple(q.shape), q.dtype, q.device)
    num_kv_heads, ids = pools.k.shape[1], block_indices
    if ids is not None:
        check_buffer("block_indices", ids, (batch.num_tokens, num_kv_heads, None), torch.int32, q.device, False)
    if ids is not None or topk is None:
        if block_indices_out is not None:
            raise ValueError("block_indices_out: expected None where nothing is selected, got a tensor")
        index_q = None
    elif index_q is None:
        raise TypeError("index_q: expected a tensor to select with, got None; or pass block_indices or topk=None")
    else:
        check_tokens("index_q", index_q, batch.num_tokens, pools.index_k, num_kv_heads)
        shape, ids = (batch.num_tokens, num_kv_heads, topk), block_indices_out
        ids = torch.empty(shape, dtype=torch.int32, device=q.device) if ids is None else ids
        check_buffer("block_indices_out", ids, shape, torch.int32, q.device)
    validation.reject_gradients(q=q, index_q=index_q, k=pools.k, v=pools.v, index_k=pools.index_k, out=out)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    if isinstance(pools.k_scale, float):
        scale = scale * pools.k_scale
    numbers, found = (pools.page_size, num_local_blocks, num_init_blocks, scale, backend), []
    for part in batch._parts:
        q_part, index_part, to, chosen = (None if x is None else part.arrange(x) for x in (q, index_q, out, ids))
        if index_part is None:
            main, stored = (q_part, pools.k, pools.v, chosen, part.table), (part.page_table, *pools.scales[:2])
            lse = ops.attend_blocks(*main, pools.page_size, scale, backend, *stored, to, part.first_row)
        else:
            branches, stored = (q_part, index_part, pools.k, pools.v, pools.index_k), (part.page_table, *pools.scales)
            lse = ops.select_and_attend(*branches, part.table, *numbers, *stored, to, chosen, part.first_row)
        found.append(lse)
    if isinstance(pools.v_scale, float) and pools.v_scale != 1.0:
        out.mul_(pools.v_scale)
    if return_aux is None:
        return out
    lse = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in found])
    return out, _core.requested(aux, lse, ids)
