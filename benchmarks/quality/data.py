"""The text: sources and documentation of the packages that Python finds, each package in the order of its imports."""

import hashlib
import posixpath
import re
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.quality.settings import Settings

__all__ = ["Package", "find_packages", "in_import_order"]

ENDINGS = {".py", ".pyi", ".md", ".rst"}
# Shorter files are mostly empty modules, longer ones and those of long lines mostly data.
SHORTEST, LONGEST, LONGEST_LINES = 200, 1_000_000, 200
IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]+\(?[ \t]*([\w, \t]*)|import[ \t]+([\w.]+))", re.MULTILINE
)
# A package with a larger share of all text is never held out.
LARGEST_HELDOUT = 0.05


@dataclass(frozen=True)
class Package:
    """The files of a package that are in no other: text by name, in the order in which they are read."""

    name: str
    heldout: bool
    files: dict[str, str]
    hashes: dict[str, str]

    @property
    def size(self) -> int:
        """In characters."""
        return sum(map(len, self.files.values()))

    def documents(self) -> Iterator[str]:
        """Each file behind a line with its name, which imports refer to."""
        for name, text in self.files.items():
            yield f"# {name}\n{text}\n"


def installed() -> dict[str, list[tuple[str, Path]]]:
    """Names and places of the files of each package, and of Python's standard library."""
    found: dict[str, list[tuple[str, Path]]] = {}
    for distribution in metadata.distributions():
        files = [(str(file), Path(str(distribution.locate_file(file)))) for file in distribution.files or ()]
        name = str(distribution.metadata["Name"]).lower().replace("_", "-")
        found.setdefault(name, []).extend(files)
    library = Path(sysconfig.get_path("stdlib"))
    own = (path for path in library.rglob("*.py") if not {"site-packages", "__pycache__"} & set(path.parts))
    found["python"] = [(path.relative_to(library).as_posix(), path) for path in own]
    return found


def find_packages(settings: Settings) -> list[Package]:
    """Read the packages, up to the most bytes of text, in an order that depends on their names alone.

    A file that several packages have is in the first of them. Packages for training come first, so that no held-out
    file is in a package for training.

    Raises:
        FileNotFoundError: too few packages for both.
    """
    files_of = installed()
    sizes = {name: sum(map(_bytes, files)) for name, files in files_of.items()}
    sizes = {name: size for name, size in sizes.items() if 0 < size <= settings.package_bytes}
    names, total = [], 0
    for name in sorted(sizes, key=_number):
        if total + sizes[name] <= settings.text_bytes:
            names.append(name)
            total += sizes[name]
    with ThreadPoolExecutor() as threads:
        found = threads.map(lambda name: dict(_read(files_of[name])), names)
        texts = dict(zip(names, found, strict=True))
    heldout = {
        name
        for name in names
        if _number(name) % 100 < settings.heldout_percent and sizes[name] <= LARGEST_HELDOUT * total
    }
    seen: set[str] = set()
    packages = []
    for name in sorted(names, key=lambda name: (name in heldout, _number(name))):
        hashes = {file: hashlib.sha256(text.encode()).hexdigest()[:16] for file, text in texts[name].items()}
        files = {}
        for file, text in texts[name].items():
            if hashes[file] not in seen:
                files[file] = text
                seen.add(hashes[file])
        ordered = {file: files[file] for file in in_import_order(files)}
        if ordered:
            packages.append(Package(name, name in heldout, ordered, {file: hashes[file] for file in ordered}))
    if len({package.heldout for package in packages}) < 2:
        raise FileNotFoundError(
            f"text: expected packages for training and some to hold out, got {len(packages)} with text; install more"
        )
    return packages


def _number(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)


def _bytes(file: tuple[str, Path]) -> int:
    try:
        return file[1].stat().st_size if _is_text(*file) else 0
    except OSError:
        return 0


def _is_text(name: str, path: Path) -> bool:
    return path.suffix in ENDINGS and ".." not in name


def _read(files: list[tuple[str, Path]]) -> Iterator[tuple[str, str]]:
    for name, path in sorted(files):
        if not _is_text(name, path):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if SHORTEST <= len(text) <= LONGEST and len(text) <= LONGEST_LINES * (1 + text.count("\n")):
            yield name, text


def in_import_order(files: dict[str, str]) -> list[str]:
    """The names of a package's files, each behind those that it imports, so that far context says what is used.

    >>> in_import_order({"a/x.py": "from a.y import f", "a/y.py": "from . import z", "a/z.py": "import sys"})
    ['a/z.py', 'a/y.py', 'a/x.py']
    """
    modules: dict[str, str] = {}
    for name in sorted(files, reverse=True):
        module, ending = posixpath.splitext(name)
        if ending == ".py":
            modules[module.removesuffix("/__init__").replace("/", ".")] = name
    order: dict[str, None] = {}
    entered = set()
    for start in sorted(files):
        stack: list[tuple[str, bool]] = [(start, False)]
        while stack:
            name, done = stack.pop()
            if done:
                order[name] = None
            elif name not in entered:
                entered.add(name)
                stack.append((name, True))
                stack.extend((other, False) for other in reversed(list(_imported(name, files[name], modules))))
    return list(order)


def _imported(name: str, text: str, modules: dict[str, str]) -> Iterator[str]:
    """The files of the package that a file imports."""
    if not name.endswith(".py"):
        return
    parents = name.split("/")[:-1]
    for base, names, whole in IMPORT.findall(text):
        dots = len(base) - len(base.lstrip("."))
        inner = ".".join([*parents[: len(parents) - dots + 1], base[dots:]]).rstrip(".") if dots else base or whole
        for module in (*(f"{inner}.{item.split()[0]}" for item in names.split(",") if item.strip()), inner):
            if module in modules:
                yield modules[module]
