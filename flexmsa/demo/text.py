"""The training text: the source code of the Python standard library, which comes with every Python."""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Installed packages are not part of the standard library, tests are missing from some installations, and the last two
# folders contain tables and prose rather than code.
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"})
# Every tenth file is held out.
VALIDATION_STRIDE = 10


@dataclass(frozen=True)
class Text:
    """Bytes for training and held-out bytes, from different files.

    Attributes:
        source: the folder of the files.
        num_files: the number of files.
        train, validation: [bytes] uint8.
    """

    source: Path
    num_files: int
    train: Tensor
    validation: Tensor


def read_standard_library(folder: Path | None = None) -> Text:
    """Read the .py files under `folder` (default: this Python's standard library) in the order of their names.

    Raises:
        FileNotFoundError: there are too few files, for example because the library is in a zip archive.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    paths = [path for path in folder.rglob("*.py") if SKIPPED_FOLDERS.isdisjoint(path.relative_to(folder).parts)]
    paths.sort(key=lambda path: path.relative_to(folder).as_posix())
    if len(paths) < VALIDATION_STRIDE:
        raise FileNotFoundError(
            f"{folder}: expected at least {VALIDATION_STRIDE} .py files, got {len(paths)}; "
            "the demo needs a Python whose standard library is installed as source files"
        )
    files = [path.read_bytes() for path in paths]
    held_out = files[VALIDATION_STRIDE - 1 :: VALIDATION_STRIDE]
    del files[VALIDATION_STRIDE - 1 :: VALIDATION_STRIDE]
    return Text(folder, len(paths), _as_tensor(files), _as_tensor(held_out))


def _as_tensor(files: list[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(files)), dtype=torch.uint8)


def windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return [len(starts), length] int64: the bytes of `text` from each start on."""
    return text[starts[:, None] + torch.arange(length)].long()


def random_batch(text: Tensor, batch_size: int, length: int, generator: torch.Generator) -> Tensor:
    """Return [batch_size, length] int64 from random places of `text`."""
    starts = torch.randint(len(text) - length + 1, (batch_size,), generator=generator)
    return windows(text, starts, length)


def spread_windows(text: Tensor, count: int, length: int) -> Tensor:
    """Return [count, length] int64 from evenly spaced places of `text`."""
    starts = torch.linspace(0, len(text) - length, count, dtype=torch.float64).long()
    return windows(text, starts, length)
