"""Tokens of the text: a byte-level BPE, and rows of one package each, kept on disk."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality.data import Package, find_packages
from benchmarks.quality.settings import Settings, digest

__all__ = ["Corpus", "prepare"]

# Tokens of the retrieval task, which text never has: before a statement, before a question, and from here on letters.
STATEMENT, QUESTION, FIRST_LETTER = 0, 1, 2
ALPHABETS = 4
FILES_AT_ONCE = 2000


@dataclass(frozen=True)
class Corpus:
    """The text as tokens.

    Attributes:
        train: [rows, context] uint16. A row is of one package; the last rows hold the ends of all packages.
        heldout: [rows, context] uint16, rows of one package one after another, without packages' ends.
        packages: of each held-out row.
        token_bytes: the bytes of each token, for the identifiers.
        facts: what was found, for the results: packages, files, bytes, tokens, seconds, and a digest of all hashes.
    """

    train: np.ndarray
    heldout: np.ndarray
    packages: list[str]
    token_bytes: list[bytes]
    facts: dict[str, Any]

    def test_rows(self, settings: Settings) -> list[int]:
        """Which held-out rows are measured: a few of each package, spread evenly, and of those the first in turn."""
        by_package: dict[str, list[int]] = {}
        for row, package in enumerate(self.packages):
            by_package.setdefault(package, []).append(row)
        most = settings.rows_per_package
        chosen = [rows[:: max(1, len(rows) // most)][:most] for rows in by_package.values()]
        in_turn = [rows[place] for place in range(most) for rows in chosen if place < len(rows)]
        return sorted(in_turn[: settings.heldout_rows])

    def stream(self, start: int, length: int) -> Tensor:
        """Held-out tokens [length] int64 from the row `start` on, beginning again at the end."""
        flat = self.heldout.reshape(-1)
        places = (start * self.heldout.shape[1] + np.arange(length)) % len(flat)
        return torch.from_numpy(flat[places].astype(np.int64))


def prepare(settings: Settings, work: Path) -> Corpus:
    """Return the text of these settings, made once in the folder `work`."""
    folder = work / f"text-{settings.text_key()}"
    if not (folder / "facts.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        _make(settings, folder)
    facts = json.loads((folder / "facts.json").read_text())
    train, heldout = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("train", "heldout"))
    tokenizer = _tokenizers().Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    alphabet, reserved = _byte_alphabet(), set(_reserved(settings))
    token_bytes = [b"" if name in reserved else bytes(alphabet[letter] for letter in name) for name in names]
    return Corpus(train, heldout, facts.pop("heldout_rows"), token_bytes, facts)


def _make(settings: Settings, folder: Path) -> None:
    started = time.monotonic()
    packages = find_packages(settings)
    read = time.monotonic()
    tokenizer = _train_tokenizer(settings, packages)
    tokenizer.save(str(folder / "tokenizer.json"))
    trained = time.monotonic()
    tokens = _encode(tokenizer, packages)
    context = settings.context
    rows: dict[bool, list[np.ndarray]] = {False: [], True: []}
    ends, owners = [], []
    for package in packages:
        found = tokens[package.name]
        whole = len(found) // context
        rows[package.heldout].append(found[: whole * context])
        if package.heldout:
            owners += [package.name] * whole
        else:
            ends.append(found[whole * context :])
    rest = np.concatenate(ends)
    rows[False].append(rest[: len(rest) // context * context])
    for name, heldout in (("train", False), ("heldout", True)):
        found = np.concatenate(rows[heldout]).reshape(-1, context)
        if not len(found):
            raise FileNotFoundError(f"text: expected a row of {context} tokens in each part, got none for {name}")
        np.save(folder / f"{name}.npy", found)
    files = {package.name: package.hashes for package in packages}
    (folder / "files.json").write_text(json.dumps(files, indent=0))
    facts = {
        "digest": digest({"files": files, "tokenizer": tokenizer.to_str()}),
        "packages": {p.name: [len(p.files), p.size, len(tokens[p.name]), p.heldout] for p in packages},
        "train_rows": sum(map(len, rows[False])) // context,
        "heldout_rows": owners,
        "seconds": {"read": read - started, "tokenizer": trained - read, "encode": time.monotonic() - trained},
    }
    (folder / "facts.json").write_text(json.dumps(facts))


def _reserved(settings: Settings) -> list[str]:
    """The first tokens of the vocabulary."""
    return [f"<|reserved {number}|>" for number in range(FIRST_LETTER + ALPHABETS * settings.letters)]


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise SystemExit("the study needs the package tokenizers: pip install tokenizers") from error
    return tokenizers


def _train_tokenizer(settings: Settings, packages: list[Package]) -> Any:
    tokenizers = _tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=_reserved(settings),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(packages, settings.tokenizer_bytes), trainer)
    return tokenizer


def _sample(packages: list[Package], most: int) -> Iterator[str]:
    """Files for training, spread evenly, of at most so many characters together."""
    files = [text for package in packages if not package.heldout for text in package.documents()]
    step = max(1, round(sum(map(len, files)) / most))
    total = 0
    for text in files[::step]:
        total += len(text)
        if total > most:
            return
        yield text


def _encode(tokenizer: Any, packages: list[Package]) -> dict[str, np.ndarray]:
    """The tokens of each package; many files at once, whichever package they are of, on all cores."""
    documents = [(package.name, text) for package in packages for text in package.documents()]
    found: dict[str, list[np.ndarray]] = {package.name: [] for package in packages}
    for first in range(0, len(documents), FILES_AT_ONCE):
        names, texts = zip(*documents[first : first + FILES_AT_ONCE], strict=True)
        for name, encoding in zip(names, tokenizer.encode_batch_fast(list(texts)), strict=True):
            found[name].append(np.array(encoding.ids, dtype=np.uint16))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level BPE stands for: printable ones for themselves, the rest from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
