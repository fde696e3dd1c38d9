"""The pages of each row of a paged cache, tracked on the host."""

from copy import copy
from typing import Self

__all__ = ["Pages"]


class Pages:
    """The pages of each row, in order, and how many rows use each page; a page that no row uses is free.

    A method that raises may have made part of its changes: change a `copy`, and keep it if no method raised.

    >>> pages = Pages(num_pages=5, num_rows=2)
    >>> pages.extend(0, 3)
    >>> pages.share(0, 1, 2)
    >>> pages.rows, pages.num_free, pages.is_shared(0, 2)
    ([[0, 1, 2], [0, 1]], 2, False)
    """

    def __init__(self, num_pages: int, num_rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self._uses = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    def copy(self) -> Self:
        """Return an independent copy."""
        other = copy(self)
        other.rows = [list(pages) for pages in self.rows]
        other._uses, other._free = list(self._uses), list(self._free)
        return other

    @property
    def num_free(self) -> int:
        """The number of pages that no row uses."""
        return len(self._free)

    def is_shared(self, row: int, first: int = 0) -> bool:
        """Return whether another row uses any of the row's pages from number `first` on."""
        return any(self._uses[page] > 1 for page in self.rows[row][first:])

    def extend(self, row: int, length: int) -> None:
        """Give the row free pages until it has `length`.

        Raises:
            ValueError: too few pages are free.
        """
        pages = self.rows[row]
        if length - len(pages) > len(self._free):
            raise ValueError(
                f"cache: expected to need at most the {len(self._free)} pages that are free, got "
                f"{length - len(pages)} more for row {row}; make the cache with more pages, or reset finished rows"
            )
        while len(pages) < length:
            page = self._free.pop()
            self._uses[page] = 1
            pages.append(page)

    def extend_each(self, lengths: list[int]) -> None:
        """Give each row r free pages until it has lengths[r], as `extend` does."""
        for row, length in enumerate(lengths):
            self.extend(row, length)

    def truncate(self, row: int, length: int) -> None:
        """Remove the pages after the first `length` from the row."""
        self._assign({row: self.rows[row][:length]})

    def share(self, source: int, target: int, length: int) -> None:
        """Replace the target's pages by the first `length` pages of the source."""
        self._assign({target: self.rows[source][:length]})

    def own(self, row: int, length: int) -> tuple[int, int]:
        """Replace the last of the row's `length` pages by a free page; return (old page, new page)."""
        old = self.rows[row][length - 1]
        self.truncate(row, length - 1)
        self.extend(row, length)
        return old, self.rows[row][-1]

    def reorder(self, parents: list[int], lens: list[int], page_size: int) -> list[tuple[int, int]]:
        """Give row b the pages of row parents[b]; rows share full pages, and get a free page for a partly filled one.

        Args:
            lens: the number of tokens in each row before.

        Returns:
            (page to copy from, page to copy to) for each partly filled page.
        """
        # One child keeps all pages of its parent: the parent's own row if it is a child, else the first child.
        heirs = {parent: child for child, parent in reversed(list(enumerate(parents)))}
        heirs.update({row: row for row, parent in enumerate(parents) if row == parent})
        old = [list(pages) for pages in self.rows]
        others = [(child, parent) for child, parent in enumerate(parents) if heirs[parent] != child]
        rows = {child: old[parent] for parent, child in heirs.items()}
        rows.update({child: old[parent][: lens[parent] // page_size] for child, parent in others})
        self._assign(rows)
        copies = []
        for child, parent in others:
            full, rest = divmod(lens[parent], page_size)
            if rest:
                self.extend(child, full + 1)
                copies.append((old[parent][full], self.rows[child][full]))
        return copies

    def _assign(self, rows: dict[int, list[int]]) -> None:
        before = [page for row in rows for page in self.rows[row]]
        for row, pages in rows.items():
            self.rows[row] = list(pages)
            for page in pages:
                self._uses[page] += 1
        for page in before:
            self._uses[page] -= 1
            if self._uses[page] == 0:
                self._free.append(page)
