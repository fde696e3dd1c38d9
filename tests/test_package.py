"""What is published: the source distribution, the wheel made from it, and what both say of themselves."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import flexmsa

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOT_COPIED = shutil.ignore_patterns(".*_cache", ".git", ".venv*", ".hypothesis", "__pycache__", "build", "dist", "out")


def run(*command, cwd):
    """What a command prints; it sees neither this checkout nor what this process was told of it."""
    hidden = ("PYTHON", "PYTEST", "PIP", "TRITON")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder of the unpacked source distribution."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "checkout", symlinks=True, ignore=NOT_COPIED)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=folder / "checkout")
    shutil.rmtree(folder / "checkout")
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
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
    # Of this environment's packages, those in its folder: not the checkout, to which a file there leads.
    (site_of(folder / "environment") / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "environment"


def test_the_wheel(installed, unpacked, tmp_path):
    check_files(installed)
    check_description(installed)
    assert run(installed / "bin" / "flexmsa", "--version", cwd=tmp_path) == f"flexmsa {PROJECT['version']}\n"
    example = re.findall(r"```python\n(.*?)```", (unpacked / "README.md").read_text(), flags=re.DOTALL)[0]
    (tmp_path / "example.py").write_text(example + "print(flexmsa.__file__)")
    *printed, where = run(installed / "bin" / "python", "example.py", cwd=tmp_path).splitlines()
    assert printed[0].startswith("tensor([")
    assert Path(where).is_relative_to(installed)


def site_of(environment):
    (site,) = (environment / "lib").glob("python*/site-packages")
    return site


def check_files(installed):
    """It has every module, and nothing else."""
    site, package = site_of(installed), ROOT / "flexmsa"
    published = {str(path.relative_to(site / "flexmsa")) for path in (site / "flexmsa").rglob("*.py")}
    sources = {Path(folder, name) for folder, _, names in os.walk(package, followlinks=True) for name in names}
    assert published == {str(path.relative_to(package)) for path in sources if path.suffix == ".py"}
    (metadata,) = site.glob("flexmsa-*.dist-info")
    assert (metadata / "top_level.txt").read_text().split() == ["flexmsa"]


def check_description(installed):
    """Where PyPI shows README.md, its links lead to files of the repository."""
    (found,) = importlib.metadata.distributions(name="flexmsa", path=[str(site_of(installed))])
    links = re.findall(r"\]\(([^)]*)\)", found.metadata.get_payload())
    repository = PROJECT["urls"]["Repository"]
    assert found.metadata["Description-Content-Type"] == "text/markdown"
    assert links and all(link.startswith(("http", "#")) for link in links)
    assert f"{repository}/blob/HEAD/docs/api.md#training" in links
    assert f"{repository}/raw/HEAD/docs/images/gpu.png" in links
    inside = [link for link in links if link.startswith(repository)]
    assert all((ROOT / re.sub(r"^.*?/(blob|raw)/HEAD/|#.*", "", link)).exists() for link in inside)


def test_the_tests_of_the_source_distribution_run(unpacked):
    """Those of a kernel, and those that read the sources, the documents and the figures."""
    chosen = "softmax or floors or arrows or words or documents_are_those or every_table or functions_fit"
    options = ["tests/test_house.py", "tests/test_torch_softmax.py", "-k", chosen, "-p", "no:cacheprovider"]
    code = f"import sys, pytest, flexmsa; print(flexmsa.__file__); sys.exit(pytest.main({options}))"
    printed = run(sys.executable, "-c", code, cwd=unpacked)
    assert Path(printed.splitlines()[0]).is_relative_to(unpacked)
    assert "[100%]" in printed


def test_one_version_and_one_address():
    cited = dict(re.findall(r"^([\w-]+): (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE))
    assert PROJECT["version"] == flexmsa.__version__ == cited["version"]
    assert PROJECT["urls"]["Repository"] == cited["repository-code"]
    assert PROJECT["license"] == cited["license"]
    assert all(url.startswith(PROJECT["urls"]["Repository"]) for url in PROJECT["urls"].values())
