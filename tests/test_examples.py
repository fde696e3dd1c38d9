"""The scripts in docs/examples run, and say what they should."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
SAYS = {
    "own_gpt": "layer 1, index branch",
    "packed_training": "gradients of 5 documents, packed and alone, differ by",
    "server_loop": "each request got the text that it gets alone",
    "custom_selection": "gradient of the sinks",
    "conversion": "generated: [",
}


@pytest.mark.parametrize("name", SAYS)
def test_an_example_runs(name, monkeypatch, capsys):
    if name == "conversion":
        pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", [name, *(["--steps", "2"] if name == "own_gpt" else [])])
    with torch.random.fork_rng():
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert SAYS[name] in capsys.readouterr().out


def test_every_example_is_run():
    assert set(SAYS) == {path.stem for path in EXAMPLES.glob("*.py")}
