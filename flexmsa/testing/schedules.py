"""Serving as a test case: a schedule of operations on a cache, compared with dense attention after every append.

A plain list of tensors per row mirrors the right contents of the cache. Before each step, every position of the cache
without a token is filled with NaN, so that a read of one shows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexmsa import MSACache, PagedMSACache, decode, reference
from flexmsa.cache import Cache
from flexmsa.testing.assertions import assert_close, product_size
from flexmsa.types import AuxRequest

__all__ = ["Schedule", "check_newest", "check_schedule"]

FP8 = torch.float8_e4m3fn
# What index keys may be stored as; None: in the dtype of all.
INDEX_DTYPES = (None, "float8_e4m3fn", "int8")
# The codes of NaN among e4m3 numbers and among scales; int8 has none.
_NAN = {FP8: 0x7F, torch.uint8: 0xFF, torch.int8: 0x7F}


@dataclass(frozen=True)
class Schedule:
    """A cache and the operations on it.

    steps: ("append", lens), the number of new tokens per row, in one call; ("trim", counts); ("reorder", rows);
    ("share", (source, target)), half of the source's tokens, for paged caches; ("reset",). index_dtype: of index keys,
    if it is another than `dtype`.

    >>> check_schedule(Schedule(steps=(("append", (20, 7)), ("trim", (1, 0)), ("append", (1, 1)))))
    """

    steps: tuple[tuple[Any, ...], ...]
    batch: int = 2
    num_kv_heads: int = 2
    group_size: int = 2
    head_dim: int = 16
    index_head_dim: int = 16
    block_size: int = 16
    topk: int | None = 2
    num_init_blocks: int = 0
    capacity: int = 128
    paged: bool = False
    fp8_keys: bool = False
    index_dtype: str | None = None
    dtype: str = "float32"
    seed: int = 0

    @property
    def shape(self) -> tuple[Any, ...]:
        """All that the kernels of a GPU are compiled for; other steps and lengths share them."""
        sizes = self.num_kv_heads, self.group_size, self.head_dim, self.index_head_dim, self.block_size, self.topk
        return "cache", *sizes, self.dtype, self.capacity, self.paged, self.fp8_keys, self.index_dtype

    @property
    def kind(self) -> str:
        """What it is called in a summary."""
        return f"serving, {'paged' if self.paged else 'contiguous'}{name_formats(self.fp8_keys, self.index_dtype)}"

    def new_cache(self, device: str | torch.device) -> Cache:
        """Return the empty cache at the beginning of the schedule."""
        dtype = getattr(torch, self.dtype)
        dtypes = {"dtype": FP8 if self.fp8_keys else dtype, "index_dtype": dtype_of(self.index_dtype) or dtype}
        settings: dict[str, Any] = {**dtypes, "device": device}
        sizes = (self.batch, self.num_kv_heads, self.head_dim, self.index_head_dim)
        if not self.paged:
            return MSACache(*sizes, self.capacity, **settings)
        pages = -(-self.capacity // self.block_size)
        # One spare page per row, for copies while rows are reordered.
        count = (pages + 1) * self.batch
        return PagedMSACache(*sizes, num_pages=count, max_pages=pages, page_size=self.block_size, **settings)


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of this name, None for None."""
    return None if name is None else getattr(torch, name)


def name_formats(fp8_keys: bool, index_dtype: str | None) -> str:
    """How the 8-bit dtypes of a cache are called in a summary."""
    kinds = {"e4m3": fp8_keys or index_dtype == "float8_e4m3fn", "int8": index_dtype == "int8"}
    return "".join(f", {kind}" for kind, used in kinds.items() if used)


def draw_exact(shape: tuple[int, ...], stored: str | None, generator: torch.Generator) -> Tensor:
    """Draw numbers that `stored` (None: a dtype of 16 bits or more) holds exactly, with frequent ties of scores.

    A vector in int8 has one number of +-127 / 16, so that its scale is 1 / 16.
    """
    largest, unit = {"float8_e4m3fn": (7, 4), "int8": (15, 16)}.get(stored or "", (31, 16))
    x = torch.randint(-largest, largest + 1, shape, generator=generator)
    if stored == "int8":
        place = torch.randint(shape[-1], (*shape[:-1], 1), generator=generator)
        x.scatter_(-1, place, 254 * torch.randint(2, place.shape, generator=generator) - 127)
    return x / unit


@dataclass
class _Run:
    schedule: Schedule
    cache: Cache
    backend: str | None
    generator: torch.Generator
    rows: list[list[Tensor]] = field(default_factory=list)

    def draw(self, heads: int, count: int, size: int, stored: str | None, exact: bool) -> Tensor:
        """Return [B, heads, count, size]; `exact` numbers, and those `stored` in 8 bits, have exact products."""
        shape = (self.schedule.batch, heads, count, size)
        x = (
            draw_exact(shape, stored, self.generator)
            if exact or stored
            else torch.randn(shape, generator=self.generator)
        )
        if stored:
            x *= torch.exp2(torch.randint(-3, 1, shape[:3], generator=self.generator))[..., None]
        return x.to(device=self.cache.k.device, dtype=getattr(torch, self.schedule.dtype))


def check_schedule(schedule: Schedule, device: str | torch.device = "cpu", backend: str | None = None) -> None:
    """Assert that after every append the newest tokens have the results of one dense pass over their row.

    Args:
        schedule: sizes, steps and seed.
        device: where to run.
        backend: as for `flexmsa.decode`.

    Raises:
        AssertionError: names the step and the error.
    """
    run = _Run(schedule, schedule.new_cache(device), backend, torch.Generator().manual_seed(schedule.seed))
    sizes = ((schedule.num_kv_heads, schedule.head_dim),) * 2 + ((1, schedule.index_head_dim),)
    dtype = getattr(torch, schedule.dtype)
    empty = [torch.zeros(heads, 0, size, dtype=dtype, device=run.cache.k.device) for heads, size in sizes]
    run.rows = [list(empty) for _ in range(schedule.batch)]
    for number, (name, *arguments) in enumerate(schedule.steps):
        _poison(run.cache)
        try:
            _STEPS[name](run, *arguments)
            lens = [row[0].shape[1] for row in run.rows]
            assert run.cache.kv_lens.tolist() == lens, f"kv_lens: got {run.cache.kv_lens.tolist()} for {lens}"
        except AssertionError as error:
            raise AssertionError(f"step {number}, {name} {arguments}: {error}") from error
    run.cache.check()


def _append(run: _Run, lens: tuple[int, ...]) -> None:
    schedule, cache = run.schedule, run.cache
    count = max(1, *lens)
    keys, index = "float8_e4m3fn" if schedule.fp8_keys else None, schedule.index_dtype
    q = run.draw(schedule.num_kv_heads * schedule.group_size, count, schedule.head_dim, None, False)
    k, v = (run.draw(schedule.num_kv_heads, count, schedule.head_dim, keys, False) for _ in range(2))
    # int8 keys are scored with queries in int8.
    index_q = run.draw(schedule.num_kv_heads, count, schedule.index_head_dim, "int8" if index == "int8" else None, True)
    index_k = run.draw(1, count, schedule.index_head_dim, index, True)
    ragged = torch.tensor(lens, dtype=torch.int32, device=k.device) if len({*lens, count}) > 1 else None
    cache.append(k, v, index_k, lens=ragged, backend=run.backend)
    rule = {name: getattr(schedule, name) for name in ("block_size", "topk", "num_init_blocks")}
    aux_request = AuxRequest(lse=True, block_indices=True)
    result = decode(q, cache, index_q, **rule, backend=run.backend, return_aux=aux_request)
    assert isinstance(result, tuple)
    out, aux = result
    assert aux.lse is not None
    for row, length in enumerate(lens):
        new = [x[row, :, :length] for x in (k, v, index_k)]
        run.rows[row] = [torch.cat(pair, dim=1) for pair in zip(run.rows[row], new, strict=True)]
        found = out[row], aux.lse[row], None if aux.block_indices is None else aux.block_indices[row]
        _compare(run, row, q[row], index_q[row], length, found)


def _compare(
    run: _Run, row: int, q: Tensor, index_q: Tensor, length: int, found: tuple[Tensor, Tensor, Tensor | None]
) -> None:
    """Compare the row's result (out, lse, block_indices) for its `length` newest tokens."""
    schedule, (out, lse, ids) = run.schedule, found
    assert not out[:, length:].any(), f"row {row}: out of a query without a token is not 0"
    assert (lse[:, length:] == -torch.inf).all(), f"row {row}: lse of a query without a token is not -inf"
    assert ids is None or (ids[:, length:] == -1).all(), f"row {row}: a query without a token has blocks"
    if length == 0:
        return
    settings = {name: getattr(schedule, name) for name in ("block_size", "topk", "num_init_blocks")}
    results = out[:, :length], lse[:, :length], None if ids is None else ids[:, :length]
    check_newest(f"row {row}", q[:, :length], index_q[:, :length], *run.rows[row], found=results, **settings)


def check_newest(
    name: str,
    q: Tensor,
    index_q: Tensor,
    k: Tensor,
    v: Tensor,
    index_k: Tensor,
    *,
    found: tuple[Tensor, Tensor, Tensor | None],
    block_size: int,
    topk: int | None,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
) -> None:
    """Compare out, lse and block_indices of the newest tokens of a sequence with the dense reference; all [H, S, ...].

    block_indices None: every block is attended to.

    >>> q, k = torch.randn(2, 1, 16), torch.randn(1, 1, 16)
    >>> results = k.expand(2, 1, 16), (q * k).sum(-1) / 4, None
    >>> check_newest("a token", q, k, k, k, k, found=results, block_size=16, topk=None)
    """
    out, lse, ids = found
    q, index_q, k, v, index_k = (x[None] for x in (q, index_q, k, v, index_k))
    total = k.shape[2]
    end = torch.arange(total - q.shape[2] + 1, total + 1, device=k.device)[None]
    rules = (torch.zeros_like(end), end, block_size)
    expected = None
    if ids is not None:
        assert topk is not None
        expected = reference.select_blocks(index_q, index_k, *rules, topk, num_local_blocks, num_init_blocks)
        assert torch.equal(ids[None], expected), f"{name}: blocks differ from the dense reference's"
    scale = q.shape[3] ** -0.5
    exact = reference.block_sparse_attention(q.double(), k.double(), v.double(), expected, *rules, scale)
    eager = reference.block_sparse_attention(q, k, v, expected, *rules, scale, q.dtype)
    terms = {"out": 0.0, "lse": product_size(q, k)}
    for result, got, right, base in zip(terms, (out, lse), exact, eager, strict=True):
        assert_close(f"{name}, {result}", got[None].cpu(), right.cpu(), base.cpu(), terms[result])


def _trim(run: _Run, counts: tuple[int, ...]) -> None:
    lens = [row[0].shape[1] for row in run.rows]
    counts = tuple(min(count, length) for count, length in zip(counts, lens, strict=True))
    run.cache.trim(counts[0] if len(set(counts)) == 1 else torch.tensor(counts, device=run.cache.k.device))
    run.rows = [[x[:, : x.shape[1] - count] for x in row] for row, count in zip(run.rows, counts, strict=True)]


def _reorder(run: _Run, rows: tuple[int, ...]) -> None:
    cache = run.cache
    assert isinstance(cache, MSACache | PagedMSACache)
    cache.reorder(torch.tensor(rows, device=cache.k.device))
    run.rows = [list(run.rows[row]) for row in rows]


def _share(run: _Run, pair: tuple[int, int]) -> None:
    source, target = pair
    if not isinstance(run.cache, PagedMSACache) or source == target:
        return
    tokens = (run.rows[source][0].shape[1] + 1) // 2
    run.cache.share(source, [target], tokens)
    run.rows[target] = [x[:, :tokens] for x in run.rows[source]]


def _reset(run: _Run) -> None:
    run.cache.reset()
    run.rows = [[x[:, :0] for x in row] for row in run.rows]


_STEPS: dict[str, Callable[..., None]] = {
    step.__name__[1:]: step for step in (_append, _trim, _reorder, _share, _reset)
}


def _poison(cache: Cache) -> None:
    """Fill every position without a token with NaN."""
    lens = cache.kv_lens.tolist()
    size = cache.k.shape[2]
    live = torch.zeros(cache.k.shape[0], size, dtype=torch.bool)
    for row, length in enumerate(lens):
        if cache.page_table is None:
            live[row, :length] = True
            continue
        for number, first in enumerate(range(0, length, size)):
            live[int(cache.page_table[row, number]), : min(size, length - first)] = True
    dead = ~live.to(cache.k.device)[:, None]
    for buffer in cache.buffers:
        slots = dead if buffer.dim() == 3 else dead[..., None]
        if buffer.dtype in _NAN:
            buffer.view(torch.uint8).masked_fill_(slots, _NAN[buffer.dtype])
        else:
            buffer.masked_fill_(slots, torch.nan)
