"""A step of an engine as a test case: compared with dense attention of each sequence on its own.

Pages hold NaN until they are written, and page tables hold garbage behind their last page, so that a read of either
shows.
"""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexmsa.paged import PagedBatch, PagePools, attend_pages, select_pages, write_pages
from flexmsa.testing.assertions import assert_close
from flexmsa.testing.check import kernels_for_many_queries
from flexmsa.testing.schedules import FP8, check_newest, draw_exact, dtype_of, name_formats
from flexmsa.types import AuxRequest

__all__ = ["PagedStep", "check_paged_step"]

# What `PagedStep.scales` may be, and the scales of keys, values and index keys where pools have one each.
SCALES = ("token", "tensor", "none")
_TENSOR_SCALES = 0.5, 2.0, 0.25
_UNUSED = 2**31 - 1


@dataclass(frozen=True)
class PagedStep:
    """Sequences of a step, and their pages.

    Attributes:
        queries, kv_lens: new tokens and keys of each sequence.
        padding: tokens past the last sequence.
        uniform: without offsets: each sequence has as many queries.
        num_decodes: as for `PagedBatch`.
        fp8_keys: pages of keys and values are e4m3. index_dtype: of those of index keys, if it is another than `dtype`.
        scales: of e4m3 pages: "token", "tensor" or "none".
        own_out: results go to buffers with holes, which hold NaN.

    >>> check_paged_step(PagedStep((1, 1, 20), (90, 3, 40), padding=2, num_decodes=2))
    """

    queries: tuple[int, ...] = ()
    kv_lens: tuple[int, ...] = ()
    padding: int = 0
    uniform: bool = False
    num_decodes: int = 0
    fp8_keys: bool = False
    index_dtype: str | None = None
    scales: str = "token"
    own_out: bool = True
    dtype: str = "float32"
    block_size: int = 16
    topk: int | None = 3
    num_local_blocks: int = 1
    num_init_blocks: int = 1
    num_kv_heads: int = 2
    group_size: int = 3
    head_dim: int = 16
    index_head_dim: int = 16
    seed: int = 0

    @property
    def shape(self) -> tuple[Any, ...]:
        """All that the kernels of a GPU are compiled for; other sequences share them."""
        sizes = self.num_kv_heads, self.group_size, self.head_dim, self.index_head_dim, self.block_size, self.topk
        return "pages", *sizes, self.dtype, self.fp8_keys, self.index_dtype, self.scales

    @property
    def kind(self) -> str:
        """What it is called in a summary."""
        layout = "uniform" if self.uniform else "decodes first" if self.num_decodes else "ragged"
        return f"engine, {layout}{name_formats(self.fp8_keys, self.index_dtype)}"

    @property
    def num_tokens(self) -> int:
        """Those of all sequences, and padding."""
        return sum(self.queries) + self.padding

    @property
    def rule(self) -> dict[str, Any]:
        """The arguments of a selection."""
        return {name: getattr(self, name) for name in ("topk", "num_local_blocks", "num_init_blocks")}

    def new_pools(self, num_pages: int, device: str | torch.device = "cpu") -> PagePools:
        """Return pages of NaN: keys and values side by side, as engines have them, and index keys beside a hole."""

        def empty(heads: int, width: int, dtype: torch.dtype) -> Tensor:
            # int8 has no NaN; the scales of its tokens are.
            fill: Any = 127 if dtype == torch.int8 else torch.nan
            return torch.full((num_pages, heads, self.block_size, width), fill, device=device).to(dtype)

        dtype = getattr(torch, self.dtype)
        k, v = empty(self.num_kv_heads, 2 * self.head_dim, FP8 if self.fp8_keys else dtype).split(self.head_dim, dim=3)
        index_k = empty(1, self.index_head_dim + 16, dtype_of(self.index_dtype) or dtype)[..., : self.index_head_dim]
        scales: list[Any] = [None] * 3
        for place, pool in enumerate((k, v, index_k)):
            if pool.dtype == torch.int8:
                scales[place] = torch.full(pool.shape[:3], torch.nan, device=device)
            elif pool.dtype == FP8 and self.scales == "token":
                scales[place] = torch.full(pool.shape[:3], 255, dtype=torch.uint8, device=device)
            elif pool.dtype == FP8 and self.scales == "tensor":
                scales[place] = _TENSOR_SCALES[place]
        return PagePools(k, v, index_k, *scales)


class StepRun:
    """The tensors of a step: all of its keys are in their pages."""

    def __init__(self, step: PagedStep, device: str | torch.device, backend: str | None) -> None:
        self.step, self.device, self.backend = step, device, backend
        self._generator = torch.Generator().manual_seed(step.seed)
        size, count = step.block_size, len(step.kv_lens)
        needed = [-(-length // size) for length in step.kv_lens]
        pages = torch.randperm(sum(needed) + 2, generator=self._generator).tolist()
        self.pools = step.new_pools(len(pages), device)
        width = max(needed) + 1
        table = torch.full((count, 2 * width), _UNUSED, dtype=torch.int32)
        slots = []
        for row, length in enumerate(step.kv_lens):
            own = torch.tensor([pages.pop() for _ in range(needed[row])], dtype=torch.int32)
            table[row, : needed[row]] = own
            position = torch.arange(length)
            slots.append(own[position // size].long() * size + position % size)
        self.page_table = table.to(device)[:, :width]
        self.keys = self._write(slots)
        heads = step.num_kv_heads * step.group_size
        self.q = self._draw(step.num_tokens, heads, step.head_dim)
        # int8 keys are scored with queries in int8.
        stored = "int8" if step.index_dtype == "int8" else None
        self.index_q = self._draw_exact(step.num_tokens, step.num_kv_heads, step.index_head_dim, stored=stored)
        self.batch = self._batch()

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, getattr(torch, self.step.dtype))

    def _draw_exact(self, *shape: int, stored: str | None) -> Tensor:
        """Numbers whose products are exact in every dtype, so that a selection has one right answer."""
        return draw_exact(shape, stored, self._generator).to(self.device, getattr(torch, self.step.dtype))

    def _write(self, slots: list[Tensor]) -> list[list[Tensor]]:
        """Write the tokens of all sequences in any order, and some of none; return what they are read back as."""
        step, pools = self.step, self.pools
        total = sum(step.kv_lens)
        k, v = (self._draw(total, step.num_kv_heads, step.head_dim) for _ in range(2))
        new = k, v, self._draw_exact(total, 1, step.index_head_dim, stored=step.index_dtype)
        order = torch.randperm(total + 2, generator=self._generator)
        past = self.pools.k.shape[0] * step.block_size
        to = torch.cat([*slots, torch.tensor([-1, past])])[order].to(self.device)
        k, v, index_k = (torch.cat([x, x.new_zeros(2, *x.shape[1:])])[order.to(x.device)] for x in new)
        write_pages(k, v, index_k, pools, to, backend=self.backend)
        stored = (pools.k, pools.k_scale), (pools.v, pools.v_scale), (pools.index_k, pools.index_k_scale)
        read = [_read_back(x, *pool).split(step.kv_lens) for x, pool in zip(new, stored, strict=True)]
        return [list(sequence) for sequence in zip(*read, strict=True)]

    def _batch(self) -> PagedBatch:
        step = self.step
        lens = torch.tensor(step.kv_lens, dtype=torch.int32, device=self.device)
        offsets = torch.tensor([0, *itertools.accumulate(step.queries)], dtype=torch.int32, device=self.device)
        sizes: dict[str, Any] = {"num_tokens": step.num_tokens, "num_decodes": step.num_decodes}
        return PagedBatch(self.page_table, lens, None if step.uniform else offsets, **sizes, page_size=step.block_size)

    def attend(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return out, lse and block_indices, of one call."""
        step = self.step
        out = self._buffer(self.q.shape[1], step.head_dim, self.q.dtype) if step.own_out else None
        ids = self._ids() if step.own_out and step.topk is not None else None
        how: dict[str, Any] = {"backend": self.backend, "return_aux": AuxRequest(lse=True, block_indices=True)}
        how |= {**step.rule, "out": out, "block_indices_out": ids}
        found, aux = attend_pages(self.q, self.index_q, self.pools, self.batch, **how)
        assert out is None or found is out
        assert ids is None or aux.block_indices is ids
        return found, aux.lse, aux.block_indices

    def attend_in_parts(self) -> tuple[Tensor, Tensor]:
        """Return out and block_indices, of a selection and of attention to it."""
        ids = self._ids() if self.step.own_out else None
        found = select_pages(self.index_q, self.pools, self.batch, **self.step.rule, out=ids, backend=self.backend)
        assert ids is None or found is ids
        out = attend_pages(self.q, None, self.pools, self.batch, block_indices=found, backend=self.backend)
        assert isinstance(out, Tensor)
        return out, found

    def _ids(self) -> Tensor:
        return self._buffer(self.step.num_kv_heads, self.step.topk or 0, torch.int32)

    def _buffer(self, heads: int, width: int, dtype: torch.dtype) -> Tensor:
        """A buffer with a hole after each head."""
        shape = self.step.num_tokens, 2 * heads, width
        fill: Any = torch.nan if dtype.is_floating_point else _UNUSED
        return torch.full(shape, fill, dtype=dtype, device=self.device)[:, ::2]


def _read_back(x: Tensor, pool: Tensor, scale: Tensor | float | None) -> Tensor:
    """What new tokens x are in the pages, in their dtype; int8 holds what is drawn for it exactly."""
    if pool.dtype != FP8:
        return x
    factor: Any = 1.0 if scale is None else scale
    if isinstance(scale, Tensor):
        # The least power of two with which the largest number is at most e4m3's.
        mantissa, exponent = torch.frexp(x.double().abs().amax(-1, keepdim=True) / 448)
        factor = torch.exp2(torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=-126).float())
    return ((x.float() / factor).clamp(-448, 448).to(FP8).float() * factor).to(x.dtype)


def check_paged_step(step: PagedStep, device: str | torch.device = "cpu", backend: str | None = None) -> None:
    """Assert that a step has the results of one dense pass over each sequence, in one call and in its parts.

    Args:
        step: sizes, sequences and seed.
        device: where to run.
        backend: as for `flexmsa.attend_pages`.

    Raises:
        AssertionError: names the sequence and the error.
    """
    run = StepRun(step, device, backend)
    # Cases are small, so without this the kernels for many queries would never run.
    with kernels_for_many_queries(run.q, backend) if step.seed % 2 == 1 else nullcontext():
        found = run.attend()
        _check_sequences(run, found)
        if step.topk is not None:
            out, ids = run.attend_in_parts()
            assert found[2] is not None and torch.equal(ids, found[2]), "select_pages: blocks differ"
            assert_close("out of given blocks", out, found[0], found[0])


def _check_sequences(run: StepRun, found: tuple[Tensor, Tensor, Tensor | None]) -> None:
    """Compare each sequence with the reference; tokens past them, and before their first key, see nothing."""
    step, first = run.step, 0
    for row, (count, length) in enumerate(zip(step.queries, step.kv_lens, strict=True)):
        blind = max(0, count - length)
        _check_blind(f"sequence {row}", found, slice(first, first + blind))
        part, first = slice(first + blind, first + count), first + count
        if count > blind:
            results: Any = tuple(None if x is None else x[part].transpose(0, 1) for x in found)
            queries = (x[part].transpose(0, 1) for x in (run.q, run.index_q))
            keys = (x.transpose(0, 1) for x in run.keys[row])
            check_newest(f"sequence {row}", *queries, *keys, found=results, block_size=step.block_size, **step.rule)
    _check_blind("padding", found, slice(first, None))


def _check_blind(name: str, found: tuple[Tensor, Tensor, Tensor | None], part: slice) -> None:
    out, lse, ids = (None if x is None else x[part] for x in found)
    assert out is not None and not out.any(), f"{name}: out of a query without keys is not 0"
    assert lse is not None and (lse == -torch.inf).all(), f"{name}: lse of a query without keys is not -inf"
    assert ids is None or (ids == -1).all(), f"{name}: a query without keys has blocks"
