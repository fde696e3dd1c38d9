"""`python -m flexmsa` without a command, and how its names lead to it."""

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import flexmsa
from flexmsa import __main__

ROOT = Path(__file__).parents[1]


def test_alone_it_prints_the_help(capsys):
    assert __main__.main([]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage:") and all(command in printed for command in __main__.COMMANDS)


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"flexmsa {flexmsa.__version__}\n"


@pytest.mark.parametrize("arguments", [["--bold"], ["fly"]])
def test_what_is_no_command_is_a_usage_error(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_script_runs_what_the_module_runs(monkeypatch, capsys):
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert list(scripts) == ["flexmsa"]
    module, function = scripts["flexmsa"].split(":")
    monkeypatch.setattr(sys, "argv", ["flexmsa", "--version"])
    with pytest.raises(SystemExit) as stopped:
        getattr(import_module(module), function)()
    assert stopped.value.code == 0
    by_module = subprocess.run(
        [sys.executable, "-m", "flexmsa", "--version"], capture_output=True, text=True, check=True
    )
    assert capsys.readouterr().out == by_module.stdout
