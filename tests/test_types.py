"""A user's file passes a strict type checker: README's examples, and `user_types.py`."""

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flexmsa

ROOT = Path(__file__).parents[1]


def test_a_users_file_is_strictly_typed(tmp_path):
    pytest.importorskip("mypy")
    assert (Path(flexmsa.__file__).parent / "py.typed").exists()
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    files = [tmp_path / f"example_{n}.py" for n in range(2)]
    for file, example in zip(files, examples, strict=False):
        file.write_text(example)
    files.append(tmp_path / "user_types.py")
    files[-1].write_text((ROOT / "tests" / "user_types.py").read_text())
    # PyTorch's own `Tensor.backward` has no types. Errors within packages are not the user's.
    options = ("--strict", "--untyped-calls-exclude=torch", "--follow-imports=silent", "--config-file=")
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'user'}"
    environment = {**os.environ, "MYPYPATH": str(Path(flexmsa.__file__).parents[1])}
    command = [sys.executable, "-m", "mypy", *options, cache, *map(str, files)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_typed_call_has_the_arguments_of_the_forward():
    tree = ast.parse((Path(flexmsa.__file__).parent / "_layer.py").read_text())
    (call,) = [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "__call__"]
    typed = [argument.arg for argument in (*call.args.args, *call.args.kwonlyargs)]
    assert typed == list(inspect.signature(flexmsa.MSAttention.forward).parameters)
