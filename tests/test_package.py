"""What is published: the source distribution, the wheel made from it, and what both say of themselves."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from pathlib import Path

import pytest

import flexmsa

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_PUBLISHED = shutil.ignore_patterns(
    ".*_cache", ".git", ".venv", ".hypothesis", "__pycache__", "build", "dist", "out"
)


def run(*command, cwd):
    """What a command prints; it sees neither this checkout nor what this process was told of it."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST", "PIP"))
    }
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder of the unpacked source distribution."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=NOT_PUBLISHED)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=folder / "checkout")
    shutil.rmtree(folder / "checkout")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def installed(unpacked, tmp_path_factory):
    """The folder of an environment that has the wheel and, besides it, only what flexmsa depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(unpacked), cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "environment", with_pip=False)
    python = folder / "environment" / "bin" / "python"
    run(*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel), cwd=folder)
    (site,) = (folder / "environment" / "lib").glob("python*/site-packages")
    # Of this environment's packages, those in its folder: not the checkout, to which a file there leads.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "environment"


def first_example(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)[0]


def test_the_wheel_runs_the_first_example(installed, unpacked, tmp_path):
    where = run(installed / "bin" / "python", "-c", "import flexmsa; print(flexmsa.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed)
    (tmp_path / "example.py").write_text(first_example(unpacked / "README.md"))
    assert "tensor([" in run(installed / "bin" / "python", "example.py", cwd=tmp_path)


def test_the_wheel_has_a_command(installed, tmp_path):
    assert run(installed / "bin" / "flexmsa", "--version", cwd=tmp_path) == f"flexmsa {PROJECT['version']}\n"


def test_the_wheel_has_every_module_and_nothing_else(installed):
    (site,) = (installed / "lib").glob("python*/site-packages")
    published = {str(path.relative_to(site / "flexmsa")) for path in (site / "flexmsa").rglob("*.py")}
    package = ROOT / "flexmsa"
    sources = {Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names}
    assert published == {str(path.relative_to(package)) for path in sources if path.suffix == ".py"}
    (metadata,) = site.glob("flexmsa-*.dist-info")
    assert (metadata / "top_level.txt").read_text().split() == ["flexmsa"]


def test_the_tests_of_the_source_distribution_run(unpacked):
    said = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, cwd=unpacked)
    assert re.search(r"[1-9]\d*%\]", said)
    where = run(sys.executable, "-c", "import flexmsa; print(flexmsa.__file__)", cwd=unpacked)
    assert Path(where.strip()).is_relative_to(unpacked)


# Of the tests: those that read the sources, the documents and the figures, and those of a kernel.
TESTS = ["tests/test_house.py", "tests/test_torch_softmax.py", "-k", "not examples and not top_level"]


def test_pypi_shows_links_that_lead_somewhere(installed):
    (site,) = (installed / "lib").glob("python*/site-packages")
    (found,) = importlib.metadata.distributions(name="flexmsa", path=[str(site)])
    described = found.metadata.get_payload()
    links = re.findall(r"\]\(([^)]*)\)", described)
    repository = PROJECT["urls"]["Repository"]
    assert found.metadata["Description-Content-Type"] == "text/markdown"
    assert links and all(link.startswith(("http", "#")) for link in links)
    assert f"{repository}/blob/HEAD/docs/api.md#training" in links
    assert f"{repository}/raw/HEAD/docs/images/gpu.png" in links
    inside = [link for link in links if link.startswith(repository)]
    assert all((ROOT / re.sub(r"^.*?/(blob|raw)/HEAD/|#.*", "", link)).exists() for link in inside)


def test_one_version_and_one_address():
    cited = dict(re.findall(r"^([\w-]+): (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE))
    assert PROJECT["version"] == flexmsa.__version__ == cited["version"]
    assert PROJECT["urls"]["Repository"] == cited["repository-code"]
    assert PROJECT["license"] == cited["license"]
    assert all(url.startswith(PROJECT["urls"]["Repository"]) for url in PROJECT["urls"].values())
