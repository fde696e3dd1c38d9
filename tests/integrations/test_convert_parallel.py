"""Two processes that each train on half of a batch get the gradients of the whole."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integrations.converted import assert_same, tokens
from integrations.parallel import PHASES, WAYS, make_model, step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    command = [sys.executable, str(Path(__file__).with_name("parallel.py"))]
    runs = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in range(2)]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    return folder


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", WAYS)
def test_the_mean_of_both_halves_is_the_whole(way, phase, folder):
    (first, gradients), (second, same) = (torch.load(folder / f"{way}-{phase}-{rank}.pt") for rank in range(2))
    model = make_model()
    PHASES[phase](model)
    losses, expected = step(model, model, tokens(4, 40).cpu())
    torch.testing.assert_close((first + second) / 2, losses)
    assert not first.equal(second)
    assert_same(gradients, expected)
    assert_same(gradients, same)
