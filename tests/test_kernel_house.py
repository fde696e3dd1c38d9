"""The rules of the kernels' house that a program can hold: floors, launches, records, sizes and words."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TRITON = ROOT / "kernels" / "triton"
# Each floor may import those before it.
FLOORS = [{"common"}, {"schedule"}, {"selection", "forward", "backward", "loss"}, {"serving"}, {"tuning"}]
SOURCES = [path for room in ("kernels", "ops", "flexmsa", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
SOURCES = [path for path in SOURCES if not any(part.is_symlink() for part in path.parents)]
KERNELS = [path for path in SOURCES if path.is_relative_to(TRITON)]
MOST_PARAMETERS = 15
# Public functions of keyword arguments, and operators, whose schema is their parameter list.
FREE_LISTS = {"flexmsa/functional.py", "flexmsa/tuning.py", "ops/cache.py", "ops/attention.py", "ops/index_loss.py"}
# What the glossary calls otherwise.
FORBIDDEN = (
    r"walk(s|ed|er|ing)?|by_block|pieces?|sieve|tickets?|trials?|reckon(s|ed)?|turns? round|hopper(?=_)|"
    r"(?<=_)hopper|chunk_origin|reverse_index|ranking|lacks|slots_lse"
)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def imports(path: Path) -> set[Path]:
    """The files of the project that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.ImportFrom):
            continue
        names = [alias.name for alias in node.names]
        if node.level:
            base = path.parents[node.level - 1] / (node.module or "").replace(".", "/")
        elif (node.module or "").startswith("flexmsa"):
            inner = node.module.removeprefix("flexmsa").strip(".").replace(".", "/")
            base = (ROOT if inner.split("/")[0] in ("kernels", "ops") else ROOT / "flexmsa") / inner
        else:
            continue
        files = [base.with_suffix(".py"), *(base / f"{name}.py" for name in names)]
        found |= {file for file in files if file.exists()} or {base / "__init__.py"}
    return {file for file in found if file.exists()} - {path}


def test_floors():
    floor = {folder: level for level, folders in enumerate(FLOORS) for folder in folders}
    for path in KERNELS:
        if path.parent == TRITON:
            continue
        for other in imports(path):
            if other.is_relative_to(TRITON) and other.parent != path.parent:
                assert floor[other.parent.name] < floor[path.parent.name], (short(path), short(other))


def test_no_circle_of_imports():
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(map(short, (*trail[trail.index(path) :], path)))
        if path not in done:
            for other in sorted(imports(path)):
                visit(other, (*trail, path))
            done.add(path)

    for path in SOURCES:
        if path.is_relative_to(ROOT / "kernels") or path.is_relative_to(ROOT / "ops"):
            visit(path, ())


def test_implementations_do_not_import_each_other():
    """A kernel's other form, for one architecture, is imported by the folder's launch.py alone."""
    for path in KERNELS:
        for other in imports(path):
            if re.search(r"_sm\d+$", other.stem) and other.parent.name != "common":
                assert path.stem == "launch", (short(path), short(other))
        if re.search(r"_sm\d+$", path.stem) and path.parent.name != "common":
            twin = path.with_name(re.sub(r"_sm\d+$", "", path.stem) + ".py")
            assert twin not in imports(path), short(path)
            assert "supports" in {function.name for function in functions(path)}, short(path)


def test_every_launch_is_a_launch():
    for path in KERNELS:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert short(path) == "kernels/triton/common/launch.py", (short(path), node.lineno)


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_parameter_lists_are_short(path):
    for function in functions(path):
        arguments = function.args
        count = len(arguments.args) + len(arguments.posonlyargs) + len(arguments.kwonlyargs)
        if short(path) not in FREE_LISTS or is_kernel(function):
            assert count <= MOST_PARAMETERS, (function.name, count)


@pytest.mark.parametrize("path", KERNELS, ids=short)
def test_records_are_not_unpacked_by_position(path):
    """More than three values that a call returns, or a tuple holds, are read by name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            value = node.value
            by_name = isinstance(value, ast.Tuple) or ast.unparse(value).endswith((".shape", ".stride()"))
            assert len(node.targets[0].elts) <= 3 or by_name, f"{short(path)}:{node.lineno}"


@pytest.mark.parametrize("path", KERNELS, ids=short)
def test_records_in_memory_have_one_loader_and_one_storer(path):
    """A field's place in a record, a number added to a pointer, stands in a function named for loading or storing."""
    for function in functions(path):
        if is_kernel(function) and not re.match(r"(load|store)_|tile_ends_kernel$", function.name):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store", "gl.load"):
                    place = node.args[0]
                    is_raw = isinstance(place, ast.BinOp) and isinstance(place.right, ast.Constant)
                    assert not is_raw or place.right.value == 1, f"{short(path)}:{node.lineno}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.is_relative_to(ROOT / "kernels")], ids=short)
def test_kernels_raise_no_error_of_a_user(path):
    if short(path) not in ("kernels/workspace.py", "kernels/tuning.py", "kernels/torch/packing.py"):
        raised = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Raise)]
        assert not raised, (short(path), raised)


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_files_and_functions_fit(path):
    assert len(path.read_text().splitlines()) <= 350
    for function in functions(path):
        docstring = ast.get_docstring(function, clean=False) or ""
        lines = function.end_lineno - function.lineno - docstring.count("\n")
        assert lines <= 75, (function.name, lines)


WRITTEN = [*SOURCES, *sorted(ROOT.glob("docs/**/*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("path", WRITTEN, ids=short)
def test_words_of_the_glossary(path):
    found = re.search(rf"\b({FORBIDDEN})\b", path.read_text(), re.IGNORECASE)
    assert not found, found
