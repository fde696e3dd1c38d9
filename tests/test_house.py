"""The rules of the house that a program can hold: imports, launches, records, sizes, words, and working examples."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import flexmsa

ROOT = Path(__file__).parents[1]
TRITON = ROOT / "kernels" / "triton"
# Each floor may import those before it.
FLOORS = [{"common"}, {"schedule"}, {"selection", "forward", "loss"}, {"backward", "serving"}, {"tuning"}]
SOURCES = [path for room in ("kernels", "ops", "flexmsa", "benchmarks") for path in sorted((ROOT / room).rglob("*.py"))]
# Links in a checkout, copies in a source distribution.
COPIES = (ROOT / "flexmsa" / "kernels", ROOT / "flexmsa" / "ops")
SOURCES = [path for path in SOURCES if not any(path.is_relative_to(folder) for folder in COPIES)]
KERNELS = [path for path in SOURCES if path.is_relative_to(TRITON)]
MOST_PARAMETERS = 15
# Public functions of keyword arguments, and operators, whose schema is their parameter list.
FREE_LISTS = {
    *("flexmsa/functional.py", "flexmsa/_loss.py", "flexmsa/distributed/context_parallel.py", "flexmsa/tuning.py"),
    "flexmsa/testing/oracle.py",
    *("ops/cache.py", "ops/attention.py", "ops/index_loss.py"),
}
# What the glossary calls otherwise.
FORBIDDEN = (
    r"walk(s|ed|er|ing)?|by_block|pieces?|sieve|tickets?|trials?|reckon(s|ed)?|turns? round|hopper(?=_)|"
    r"(?<=_)hopper|chunk_origin|reverse_index|ranking|lacks|slots_lse"
)
PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


each_source = pytest.mark.parametrize("path", SOURCES, ids=short)
each_kernel = pytest.mark.parametrize("path", KERNELS, ids=short)


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef)]


def is_kernel(function: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def in_room(path: Path, *rooms: str) -> bool:
    return path.relative_to(ROOT).parts[0] in rooms


@cache
def names_imported(path: Path) -> set[str]:
    """The full names of what a file imports, wherever in it."""
    package = path.relative_to(ROOT).parent.parts
    package = package if package[:1] == ("flexmsa",) else ("flexmsa", *package)
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = (*package[: len(package) - node.level + 1], node.module) if node.level else (node.module,)
            found |= {".".join(filter(None, (*base, alias.name))) for alias in node.names}
    return found


@cache
def imports(path: Path) -> set[Path]:
    """The files of the project that a file imports."""
    found = set()
    for name in names_imported(path):
        first, *rest = name.split(".")
        if first == "flexmsa":
            place = (ROOT if rest[:1] in (["kernels"], ["ops"]) else ROOT / "flexmsa").joinpath(*rest)
            files = (file for at in (place, place.parent) for file in (at.with_suffix(".py"), at / "__init__.py"))
            found |= {next(file for file in files if file.exists())}
    return found - {path}


def test_arrows_run_one_way():
    for path in SOURCES:
        own = {name for name in names_imported(path) if name.split(".")[0] == "flexmsa"}
        if in_room(path, "kernels", "ops"):
            allowed = ("flexmsa.kernels", "flexmsa.ops")[: 1 + in_room(path, "ops")]
            assert all(name.startswith(allowed) for name in own), (short(path), own)
        if in_room(path, "flexmsa") and "integrations" not in path.parts:
            assert not any(name.startswith("flexmsa.integrations") for name in own), short(path)


def test_kernels_import_torch_and_triton_only_and_numpy_on_a_cpu():
    for path in SOURCES:
        if in_room(path, "kernels"):
            outside = {name.split(".")[0] for name in names_imported(path)} - {"flexmsa", *sys.stdlib_module_names}
            assert outside <= {"torch", "numpy" if "torch" in path.parent.parts else "triton"}, (short(path), outside)


def test_the_reference_imports_no_kernel():
    names = names_imported(ROOT / "flexmsa" / "reference.py")
    assert not any("kernels" in name or "ops" in name for name in names)


def test_floors():
    floor = {folder: level for level, folders in enumerate(FLOORS) for folder in folders}
    for path in KERNELS:
        if path.parent == TRITON:
            continue
        for other in imports(path):
            if other.is_relative_to(TRITON):
                own, used = (x.relative_to(TRITON).parts[0] for x in (path, other))
                assert own == used or floor[used] < floor[own], (short(path), short(other))


def test_no_circle_of_imports():
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(map(short, (*trail[trail.index(path) :], path)))
        if path not in done:
            for other in sorted(imports(path)):
                visit(other, (*trail, path))
            done.add(path)

    for path in SOURCES:
        if in_room(path, "kernels", "ops"):
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
                launchers = "kernels/triton/common/launch.py", "kernels/triton/common/compiled.py"
                assert short(path) in launchers, (short(path), node.lineno)


@each_source
def test_parameter_lists_are_short(path):
    for function in functions(path):
        arguments = function.args
        count = len(arguments.args) + len(arguments.posonlyargs) + len(arguments.kwonlyargs)
        if short(path) not in FREE_LISTS or is_kernel(function):
            assert count <= MOST_PARAMETERS, (function.name, count)


@each_kernel
def test_records_are_not_unpacked_by_position(path):
    """More than three values that a call returns, or a tuple holds, are read by name."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            value = node.value
            by_name = isinstance(value, ast.Tuple) or ast.unparse(value).endswith((".shape", ".stride()"))
            assert len(node.targets[0].elts) <= 3 or by_name, f"{short(path)}:{node.lineno}"


@each_kernel
def test_records_in_memory_have_one_loader_and_one_storer(path):
    """A field's place in a record, a number added to a pointer, stands in a function named for loading or storing."""
    for function in functions(path):
        if is_kernel(function) and not re.match(r"(load|store)_|tile_ends_kernel$", function.name):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("tl.load", "tl.store", "gl.load"):
                    place = node.args[0]
                    is_raw = isinstance(place, ast.BinOp) and isinstance(place.right, ast.Constant)
                    assert not is_raw or place.right.value == 1, f"{short(path)}:{node.lineno}"


def test_kernels_raise_no_error_of_a_user():
    checked = ("kernels/workspace.py", "kernels/tuning.py", "kernels/torch/packing.py")
    for path in (path for path in SOURCES if in_room(path, "kernels") and short(path) not in checked):
        raised = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Raise)]
        assert not raised, (short(path), raised)


@each_source
def test_files_and_functions_fit(path):
    assert len(path.read_text().splitlines()) <= 350
    for function in functions(path):
        docstring = ast.get_docstring(function, clean=False) or ""
        lines = function.end_lineno - function.lineno - docstring.count("\n")
        assert lines <= 75, (function.name, lines)


@pytest.mark.parametrize("path", [*SOURCES, *(ROOT / page for page in PAGES if page != "CHANGELOG.md")], ids=short)
def test_words_of_the_glossary(path):
    found = re.search(rf"\b({FORBIDDEN})\b", path.read_text(), re.IGNORECASE)
    assert not found, found


def test_run_time_needs_torch_triton_and_numpy_only():
    optional = ("hypothesis", "matplotlib", "pytest", "transformers", "flexmsa.integrations")
    code = f"import sys, flexmsa; print(' '.join(m for m in {optional} if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_the_folders_are_not_top_level_packages():
    code = "import importlib.util as u; print([n for n in ('ops', 'kernels') if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_public_names_exist_and_are_documented():
    api = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in flexmsa.__all__ if name not in api] == []
    modules = flexmsa, flexmsa.metrics
    public = [getattr(module, name) for module in modules for name in module.__all__]
    assert [x for x in public if not inspect.ismodule(x) and ">>> " not in (inspect.getdoc(x) or "")] == []


MODULES = [
    module.name
    for module in pkgutil.walk_packages(flexmsa.__path__, "flexmsa.")
    if not module.name.endswith(("__main__", "testing.compiled")) and ".kernels.triton" not in module.name
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings(name):
    if name.startswith("flexmsa.integrations."):
        pytest.importorskip("transformers")
    if name.startswith("flexmsa.integrations.vllm."):
        pytest.importorskip("vllm")
    if name.endswith("vllm.m3"):
        # vLLM's own model imports it.
        pytest.importorskip("torchvision")
    module = importlib.import_module(name)
    public = {item: getattr(flexmsa, item) for item in flexmsa.__all__}
    assert doctest.testmod(module, globs={"torch": torch, **public, **vars(module)}).failed == 0


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_in_the_documents(page):
    """Run the blocks marked `python`; blocks marked `py` are fragments. Links to files exist."""
    text = (ROOT / page).read_text()
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        if "transformers" in block:
            pytest.importorskip("transformers")
        exec(compile(block, page, "exec"), names)
    for link in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES)
def test_the_figures_in_the_documents_are_those_of_the_results(page):
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    text = (ROOT / page).read_text()
    assert tables["fill"](text) == text


def test_every_table_is_on_a_page_once_it_has_figures():
    tables = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))
    assert set(tables["PAGES"]) == {page for page in PAGES if "<!-- end " in (ROOT / page).read_text()}
    text = "".join((ROOT / page).read_text() for page in tables["PAGES"])
    shown = {name for name in tables["TABLES"] if f"<!-- {name} -->" in text}
    assert shown == {name for name, make in tables["TABLES"].items() if make()}
