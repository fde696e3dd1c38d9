"""The rules of the house: which way imports run, what is public, and that every example works."""

import ast
import doctest
import importlib
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import flexmsa

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels": {"flexmsa.kernels"},
    "ops": {"flexmsa.kernels", "flexmsa.ops"},
}


def _imports(path: Path) -> set[str]:
    package = ".".join(["flexmsa", *path.relative_to(ROOT).parent.parts])
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).strip(".")
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "flexmsa" else {base}
    return found


@pytest.mark.parametrize("room", ["kernels", "ops"])
def test_arrows_run_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        own = {name for name in _imports(path) if name.split(".")[0] == "flexmsa"}
        assert all(any(name.startswith(allowed) for allowed in ALLOWED[room]) for name in own), (path, own)


def test_nothing_imports_the_integrations():
    for path in (ROOT / "flexmsa").rglob("*.py"):
        if "integrations" not in path.parts:
            assert not any(name.startswith("flexmsa.integrations") for name in _imports(path)), path


def test_kernels_import_torch_and_triton_only_and_numpy_on_a_cpu():
    kernels = ROOT / "kernels"
    for path in kernels.rglob("*.py"):
        outside = {name.split(".")[0] for name in _imports(path)} - {"flexmsa"} - set(sys.stdlib_module_names)
        allowed = {"torch", "numpy"} if path.is_relative_to(kernels / "torch") else {"torch", "triton"}
        assert outside <= allowed, (path, outside)


def test_the_reference_imports_no_kernel():
    assert not any("kernels" in name or "ops" in name for name in _imports(ROOT / "flexmsa" / "reference.py"))


def test_run_time_needs_torch_triton_and_numpy_only():
    optional = ("hypothesis", "matplotlib", "pytest", "transformers", "flexmsa.integrations")
    code = f"import sys, flexmsa; print(' '.join(m for m in {optional} if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_the_folders_are_not_top_level_packages():
    code = "import importlib.util as u; print([n for n in ('ops', 'kernels') if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_public_names_exist_and_are_documented():
    for name in flexmsa.__all__:
        assert getattr(flexmsa, name).__doc__, name
    readme = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in flexmsa.__all__ if name not in readme] == []


MODULES = [
    module.name
    for module in pkgutil.walk_packages(flexmsa.__path__, "flexmsa.")
    if not module.name.endswith(("__main__", "testing.compiled")) and ".kernels.triton" not in module.name
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings(name):
    if name.startswith("flexmsa.integrations."):
        pytest.importorskip("transformers")
    module = importlib.import_module(name)
    public = {item: getattr(flexmsa, item) for item in flexmsa.__all__}
    torch.manual_seed(0)
    assert doctest.testmod(module, globs={"torch": torch, **public, **vars(module)}).failed == 0


PAGES = sorted(str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")))


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
