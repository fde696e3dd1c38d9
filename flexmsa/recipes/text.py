"""Rows of bytes from text files, in which whole documents and parts of documents are packed."""

import hashlib
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["IGNORED", "PackedText", "Row"]

# The label of a document's last byte: no byte follows.
IGNORED = -100
# The number of offsets is a multiple of it, so that few shapes are compiled.
OFFSETS = 16


class Row(NamedTuple):
    """ids [context] int64, labels [context] int64, and cu_seqlens [documents + 1] int32; on the CPU.

    The last documents may be empty.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor

    @property
    def longest(self) -> tuple[int, int]:
        """Where the row's longest document starts and stops."""
        return max(pairwise(self.cu_seqlens.tolist()), key=lambda bounds: bounds[1] - bounds[0])


class PackedText:
    """An endless sequence of rows: all files one after another, in another order in each epoch.

    A row depends on its number alone. So a run that resumes, on other processes too, needs no state of the data. The
    end of a row cuts a document; the rest is a document of the next row.

    Args:
        folder: of the files that match `pattern`, at any depth.
        context: bytes of a row.
        outside: a folder whose files are no text, such as that of the run's own results.

    Attributes:
        digest: of the files' names and sizes: runs with the same one have the same rows.

    Raises:
        FileNotFoundError: no file has a byte.
    """

    def __init__(self, folder: str, pattern: str, context: int, seed: int, outside: Path) -> None:
        found = (path for path in Path(folder).rglob(pattern) if path.is_file())
        paths = sorted(path for path in found if not path.resolve().is_relative_to(outside.resolve()))
        sizes = [path.stat().st_size for path in paths]
        self.files = [(path, size) for path, size in zip(paths, sizes, strict=True) if size]
        if not self.files:
            raise FileNotFoundError(f"data: expected text files {pattern} in {folder}, got none with a byte")
        self.context, self.seed, self.num_bytes = context, seed, sum(sizes)
        names = [(path.relative_to(folder).as_posix(), size) for path, size in self.files]
        self.digest = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
        self._order = lru_cache(maxsize=2)(self._new_order)

    def __repr__(self) -> str:
        return f"{len(self.files):,} files, {self.num_bytes:,} bytes"

    def _new_order(self, epoch: int) -> tuple[list[int], Tensor]:
        """The files in an epoch's order, and where each of them ends."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(self.files), generator=generator).tolist()
        return order, torch.tensor(list(accumulate(self.files[number][1] for number in order)))

    def row(self, number: int) -> Row:
        """The row of this number, from 0."""
        ids, labels, offsets = bytearray(), [], [0]
        while len(ids) < self.context:
            epoch, place = divmod(number * self.context + len(ids), self.num_bytes)
            order, ends = self._order(epoch)
            position = int(torch.searchsorted(ends, place, right=True))
            path, size = self.files[order[position]]
            start = place - (int(ends[position]) - size)
            count = min(size - start, self.context - len(ids))
            with path.open("rb") as file:
                file.seek(start)
                found = file.read(count + 1)
            following = torch.full((count,), IGNORED)
            following[: len(found) - 1] = torch.frombuffer(bytearray(found), dtype=torch.uint8)[1:]
            ids += found[:count]
            labels.append(following)
            offsets.append(len(ids))
        offsets += [self.context] * (-len(offsets) % OFFSETS)
        whole = torch.frombuffer(ids, dtype=torch.uint8).long()
        return Row(whole, torch.cat(labels), torch.tensor(offsets, dtype=torch.int32))
