"""PagedMSACache: keys, values and index keys in pages of one block; rows get pages as they grow, and can share them."""

from collections.abc import Callable
from typing import NoReturn, Self

import torch
from torch import Tensor

from flexmsa import validation
from flexmsa._buffers import as_bits, dequantised, is_recorded
from flexmsa.cache import Cache
from flexmsa.pages import Pages

__all__ = ["PagedMSACache"]

# Pages to copy: (source, target).
Copies = list[tuple[int, int]]


class PagedMSACache(Cache):
    """Keys, values and index keys of one layer in pages: k, v [num_pages, Hkv, page_size, D], index_k
    [num_pages, 1, page_size, Di]; block b of row r is page page_table[r, b].

    An append gives rows the free pages that they need. It cannot in compiled code and CUDA graphs: `reserve` first.

    >>> cache = PagedMSACache(2, num_kv_heads=1, head_dim=16, index_head_dim=8, num_pages=6, max_pages=4, page_size=4)
    >>> cache.append(torch.ones(2, 1, 6, 16), torch.ones(2, 1, 6, 16), torch.ones(2, 1, 6, 8))
    >>> cache.page_table.tolist()
    [[0, 1, -1, -1], [2, 3, -1, -1]]
    >>> cache.share(0, [1], tokens=5)
    >>> cache.page_table.tolist(), cache.kv_lens.tolist()
    ([[0, 1, -1, -1], [0, 3, -1, -1]], [6, 5])
    """

    page_table: Tensor

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        index_head_dim: int,
        *,
        num_pages: int,
        max_pages: int,
        page_size: int = 128,
        dtype: torch.dtype = torch.float32,
        index_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate an empty cache.

        Args:
            num_pages: the number of pages for all rows together.
            max_pages: the most pages that one row can have.
            page_size: tokens per page; the attention's block_size.
            dtype, index_dtype: as for `MSACache`.
        """
        pages = {"num_pages": num_pages, "max_pages": max_pages, "page_size": page_size}
        validation.check_cache_sizes(batch_size, num_kv_heads, head_dim, index_head_dim, **pages)
        index_dtype = dtype if index_dtype is None else index_dtype
        validation.check_cache_dtypes(dtype, index_dtype, index_head_dim)
        k = torch.zeros(num_pages, num_kv_heads, page_size, head_dim, dtype=dtype, device=device)
        index_k = torch.zeros(num_pages, 1, page_size, index_head_dim, dtype=index_dtype, device=device)
        self.page_table = torch.full((batch_size, max_pages), -1, dtype=torch.int32, device=k.device)
        self._pages: Pages | None = Pages(num_pages, batch_size)
        self._reserved = [0] * batch_size
        super().__init__(k, torch.zeros_like(k), index_k, batch_size)

    @classmethod
    def wrap(
        cls,
        k: Tensor,
        v: Tensor,
        index_k: Tensor,
        page_table: Tensor,
        kv_lens: Tensor,
        *,
        k_scale: Tensor | None = None,
        v_scale: Tensor | None = None,
        index_k_scale: Tensor | None = None,
    ) -> Self:
        """Return a cache on the buffers of a server that assigns pages itself.

        The server writes page_table (before an append, with the pages that the append needs) and may write kv_lens.
        `append` also writes kv_lens, so each layer needs its own. If the server writes kv_lens and then decodes without
        an append, call `trim(0)` first. `reserve`, `share` and `reorder` raise: the server does their work. On a GPU,
        an append leaves a full row unchanged, and `check` raises afterwards, as in compiled code.

        Args:
            k, v: [num_pages, Hkv, page_size, D]; index_k: [num_pages, 1, page_size, Di].
            page_table: [B, max_pages] int32; kv_lens: [B] int32; both contiguous.
            k_scale, v_scale, index_k_scale: for e4m3 pools, uint8 of the pool's shape without D; for index keys in
                int8, float32 of that shape. None: new scales, for empty pools.

        Raises:
            ValueError, TypeError: shapes, dtypes or devices do not match.
        """
        scales = {"k_scale": k_scale, "v_scale": v_scale, "index_k_scale": index_k_scale}
        validation.check_pools({"k": k, "v": v, "index_k": index_k}, scales)
        validation.check_page_table(page_table, kv_lens, k.device)
        cache = cls.__new__(cls)
        Cache.__init__(cache, k, v, index_k, page_table.shape[0], (k_scale, v_scale, index_k_scale))
        cache.page_table, cache.kv_lens, cache._pages = page_table, kv_lens, None
        cache._reserved = [0] * cache.batch_size
        return cache

    def _own_sizes(self) -> dict[str, int]:
        return {"num_pages": self.k.shape[0], "max_pages": self.page_table.shape[1], "page_size": self.page_size}

    @property
    def page_size(self) -> int:
        """The number of tokens per page."""
        return self.k.shape[2]

    @property
    def capacity(self) -> int:  # type: ignore[override]
        """The number of tokens that a row can hold."""
        return self.page_table.shape[1] * self.page_size

    @property
    def num_free_pages(self) -> int:
        """The number of pages that no row uses."""
        return self._own_pages().num_free

    def reserve(self, tokens: int | list[int]) -> None:
        """Give every row enough pages for `tokens` tokens, or row b for tokens[b]; a row never loses pages by this.

        Raises:
            ValueError: a row cannot hold so many, or too few pages are free. The cache is then unchanged.
        """
        wanted = tokens if isinstance(tokens, list) else [tokens] * self.batch_size
        if len(wanted) != self.batch_size:
            raise ValueError(f"tokens: expected a number for each of {self.batch_size} rows, got {len(wanted)}")
        for count in wanted:
            validation.check_int("tokens", count, 0)
        if max(wanted) > self.capacity:
            raise ValueError(f"tokens: expected at most max_pages * page_size = {self.capacity}, got {max(wanted)}")
        reserved = [max(has, self._pages_for(count)) for has, count in zip(self._reserved, wanted, strict=True)]
        self._keep(*self._changed(lambda pages: pages.extend_each(reserved)))
        self._reserved = reserved

    def share(self, source: int, rows: list[int], tokens: int) -> None:
        """Replace the tokens of `rows` by the first `tokens` tokens of row `source`.

        The rows share full pages, and copy the tokens after the last full page. Reserved pages stay reserved.

        Raises:
            ValueError: the source is shorter, or too few pages are free. The cache is then unchanged.
        """
        validation.check_rows("source", [source], self.batch_size)
        validation.check_rows("rows", rows, self.batch_size)
        validation.check_int("tokens", tokens, 0)
        held = int(self.kv_lens[source])
        if tokens > held:
            raise ValueError(f"tokens: expected 0 to {held}, the tokens of row {source}, got {tokens}")
        if source in rows or len(set(rows)) < len(rows):
            raise ValueError(f"rows: expected distinct rows other than the source {source}, got {rows}")
        full = tokens // self.page_size

        def share(pages: Pages) -> Copies:
            copies: Copies = []
            for row in rows:
                pages.share(source, row, full)
            for row in rows if tokens % self.page_size else []:
                pages.extend(row, full + 1)
                copies.append((pages.rows[source][full], pages.rows[row][full]))
            pages.extend_each(self._reserved)
            return copies

        self._keep(*self._changed(share))
        self._set_lens(rows, tokens)

    def reorder(self, rows: Tensor) -> Self:
        """Copy row rows[b] to row b for each b at once, for beam search; return the cache.

        The rows share full pages, and copy partly filled ones. Pages reserved for a row stay reserved. Waits for the
        device, to read the lengths.

        Args:
            rows: [B] int.

        Raises:
            ValueError: too few pages are free. The cache is then unchanged.
        """
        validation.check_row_counts("rows", rows, self.kv_lens)
        parents, lens = rows.tolist(), self.kv_lens.tolist()
        validation.check_rows("rows", parents, self.batch_size)
        # Exact lengths free all pages of tokens that have been trimmed.
        self._bounds = lens
        pages = self._pages_in_use()
        copies = pages.reorder(parents, lens, self.page_size)
        pages.extend_each(self._reserved)
        self._keep(pages, copies)
        self.kv_lens.copy_(self.kv_lens[rows])
        self._bounds = [lens[parent] for parent in parents]
        self._newest = None
        return self

    def trim(self, counts: int | Tensor) -> None:
        """Remove tokens as `Cache.trim` does.

        If rows share pages, this waits for the device, and a row that then ends within a shared page gets a copy of
        it. Compiled code and CUDA graphs make no such copies, so there no row may end within a shared page.

        Raises:
            ValueError: too few pages are free for the copies. The cache is then unchanged.
        """
        if self._pages is None or is_recorded(self.k) or not any(map(self._pages.is_shared, range(self.batch_size))):
            super().trim(counts)
            return
        before = self.kv_lens.clone(), self._bounds, self._newest
        super().trim(counts)
        try:
            self._leave_shared_pages()
        except ValueError:
            self.kv_lens.copy_(before[0])
            self._bounds, self._newest = before[1:]
            raise

    def _leave_shared_pages(self) -> None:
        """Give each row that ends within a shared page a copy of that page."""
        self._bounds = self.kv_lens.tolist()
        pages, copies = self._pages_in_use(), []
        for row, length in enumerate(self._bounds):
            if pages.is_shared(row, length // self.page_size):
                pages.truncate(row, self._pages_for(length))
                if length % self.page_size:
                    copies.append(pages.own(row, self._pages_for(length)))
        pages.extend_each(self._reserved)
        self._keep(pages, copies)

    def reset(self, rows: list[int] | None = None) -> None:
        """Remove all tokens of the given rows, or of all rows, and free their pages."""
        rows = list(range(self.batch_size)) if rows is None else rows
        validation.check_rows("rows", rows, self.batch_size)
        if self._pages is not None:
            for row in rows:
                self._pages.truncate(row, 0)
                self._reserved[row] = 0
            self._keep(self._pages)
        self._set_lens(rows, 0)

    def _gather(self, buffer: Tensor, scale: Tensor | None) -> Tensor:
        pages = buffer if scale is None else dequantised(buffer, scale)
        rows = pages[self.page_table.clamp(0, len(pages) - 1).long()]
        return rows.transpose(1, 2).flatten(2, 3)

    def _known_counts(self, count: int, lens: Tensor | None) -> list[int]:
        # Pages are assigned by exact lengths: bounds grow faster than lengths and would use up the pages.
        return super()._known_counts(count, lens) if lens is None else lens.clamp(0, count).tolist()

    def _make_room(self, lengths: list[int]) -> bool:
        if max(lengths) > self.capacity:
            return False
        if self._pages is None or all(
            self._pages_for(length) <= len(self._pages.rows[row]) for row, length in enumerate(lengths)
        ):
            return True
        pages = self._pages_in_use()
        try:
            pages.extend_each([self._pages_for(length) for length in lengths])
        except ValueError:
            return False
        self._keep(pages)
        return True

    def _refuse(self, counts: list[int]) -> NoReturn:
        if max(length + more for length, more in zip(self._bounds, counts, strict=True)) > self.capacity:
            super()._refuse(counts)
        pages = self._own_pages()
        needed = sum(
            max(0, self._pages_for(self._bounds[row] + more) - len(pages.rows[row])) for row, more in enumerate(counts)
        )
        raise ValueError(
            f"cache: expected to need at most the {pages.num_free} pages that are free, got {needed}; make the "
            "cache with more pages, or reset finished rows"
        )

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _pages_in_use(self) -> Pages:
        """Return a copy of the pages, without those of tokens that have been trimmed."""
        pages = self._own_pages().copy()
        for row, bound in enumerate(self._bounds):
            pages.truncate(row, max(self._pages_for(bound), self._reserved[row]))
        return pages

    def _changed(self, change: Callable[[Pages], Copies | None]) -> tuple[Pages, Copies | None]:
        """Return a copy of the pages that `change` was applied to, and what it returned.

        Raises:
            ValueError: too few pages are free.
        """
        pages = self._pages_in_use()
        try:
            return pages, change(pages)
        except ValueError:
            # Tokens that a trim with a tensor removed may still hold pages. Reading the lengths waits for the device.
            self._bounds = self.kv_lens.tolist()
        pages = self._pages_in_use()
        return pages, change(pages)

    def _own_pages(self) -> Pages:
        if self._pages is None:
            raise ValueError("cache: expected a cache that assigns its own pages, got one made by `wrap`")
        return self._pages

    def _set_lens(self, rows: list[int], length: int) -> None:
        self.kv_lens[torch.tensor(rows, device=self.kv_lens.device, dtype=torch.int64)] = length
        for row in rows:
            self._bounds[row] = length
        self._newest = None

    def _keep(self, pages: Pages, copies: Copies | None = None) -> None:
        """Use `pages` from now on, write the page table on the device, and copy the given pages."""
        self._pages = pages
        width = self.page_table.shape[1]
        table = [row + [-1] * (width - len(row)) for row in pages.rows]
        self.page_table.copy_(torch.tensor(table, dtype=torch.int32))
        if copies:
            source, target = torch.tensor(copies, device=self.k.device).unbind(1)
            for buffer in self.buffers:
                raw = as_bits(buffer)
                raw.index_copy_(0, target, raw.index_select(0, source))
