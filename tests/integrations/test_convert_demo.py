"""convert-demo from end to end on its quick settings, Ctrl-C included."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from integrations.device import DEVICE

from flexmsa import __main__
from flexmsa._progress import Progress
from flexmsa.demo.text import Text
from flexmsa.integrations.transformers import demo
from flexmsa.integrations.transformers.demo.retrieval import (
    FIRST_LETTER,
    KEY_LENGTH,
    MARK,
    STATEMENT,
    answered,
    plant_early_keys,
    plant_keys,
)
from flexmsa.integrations.transformers.demo.train import WAYS, Demo, Settings

QUICK = ["--quick", "--device", DEVICE.type]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("convert-demo")
    assert __main__.main(["convert-demo", *QUICK, "--out", str(out)]) == 0
    return out, json.loads((out / "convert.json").read_text())


def test_the_models_learn_and_are_compared(quick_run):
    _, results = quick_run
    settings = results["settings"]
    assert results["retrained"]["dense"]["loss"] < 0.97 * results["unigram_loss"]
    assert set(results["retrained"]) == set(results["not_retrained"]) == {"dense", "MSA", "window", "random"}
    assert abs(results["retrained"]["MSA"]["loss"] / results["retrained"]["dense"]["loss"] - 1) < 0.02
    for way in results["retrained"]:
        assert len(results["losses"][way]) == settings["sparse_steps"]
    assert results["losses"]["phase 1"][0] == pytest.approx(results["losses"]["dense training"][-1], rel=0.2)


def test_the_index_branch_learns_where_an_untrained_one_does_not(quick_run):
    entries = quick_run[1]["index_branch"]
    first, last = entries[0], [entry for entry in entries if entry["warm_up"]][-1]
    assert last["kl"] < 0.7 * first["kl"]
    assert last["score_recall"] > last["score_recall_untrained"] + 0.05
    assert not entries[-1]["warm_up"]


def test_it_leaves_whole_files_only(quick_run):
    pytest.importorskip("matplotlib")
    out, results = quick_run
    assert sorted(path.name for path in out.iterdir()) == [
        *("convert-index.png", "convert-ways.png"),
        *("convert.json", "convert.md"),
    ]
    rows = (out / "convert.md").read_text().splitlines()
    assert rows[3].split("|")[2:6] == [
        " 24 ",
        *(f" {results[kind]['MSA'][what]:{form}} " for kind, what, form in CELLS),
    ]


CELLS = [("not_retrained", "loss", ".3f"), ("not_retrained", "answers", ".0%"), ("retrained", "loss", ".3f")]


@pytest.mark.parametrize("interrupted_at", [1, 3])
def test_ctrl_c_leaves_results(interrupted_at, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    started = []
    update = Progress.update

    def interrupt(self, step, text):
        update(self, step, text)
        started.append(step)
        if started.count(1) == interrupted_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    steps = ["--dense-steps", "1", "--warm-up-steps", "1", "--sparse-steps", "2"]
    assert demo.main([*QUICK, *steps, "--out", str(tmp_path)]) == 130
    results = json.loads((tmp_path / "convert.json").read_text())
    assert results["interrupted"]
    assert list(results["retrained"]) == ([] if interrupted_at == 1 else ["dense"])
    said = capsys.readouterr().out
    assert "saving the results so far" in said
    assert "pip install flexmsa[plot]" in said


def test_bad_options_are_named(capsys):
    for options in (["--sparse-steps", "0"], ["--device", "abacus"]):
        with pytest.raises(SystemExit):
            demo.main([*QUICK, *options])
        assert f"{options[0]}: " in capsys.readouterr().err


def test_without_transformers_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("flexmsa.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    assert __main__.main(["convert-demo", *QUICK]) == 1
    assert "pip install 'flexmsa[transformers]'" in capsys.readouterr().err


def test_the_keys_of_the_retrieval_task():
    generator = torch.Generator().manual_seed(0)
    text = torch.full((40, 97), 65)
    early = plant_early_keys(text, 8, generator)
    assert torch.equal(text, torch.full((40, 97), 65))
    said = (early == MARK).nonzero()[:, 1].view(40, 2)
    assert (said[:, 0] >= 8).all()
    assert (said[:, 0] + STATEMENT <= 48).all()
    assert (said[:, 1] == 97 - STATEMENT).all()
    keys = torch.stack([row[at : at + STATEMENT] for row, (at, _) in zip(early, said.tolist(), strict=True)])
    assert torch.equal(keys, early[:, -STATEMENT:])
    assert (early >= FIRST_LETTER).sum(1).eq(2 * KEY_LENGTH).all()
    often = (plant_keys(text, 5, generator) == MARK).sum(1)
    assert often.unique().tolist() == [2, 3, 4, 5, 6]
    logits = torch.nn.functional.one_hot(early[:, 1:], 256).float()
    assert answered(logits, early).all()
    logits[0, -1] = 0
    assert answered(logits, early).sum() == 39


def test_every_way_goes_on_from_the_same_model():
    settings = Settings(**{**demo.QUICK, "warm_up_steps": 1, "sparse_steps": 1, "context": 48, "test_windows": 8})
    text = torch.randint(256, (4000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    run = Demo(settings, Text(Path(), 1, text, text))
    run.warm_up(Progress(1))
    before = copy.deepcopy(run.converted.state_dict())
    for way in WAYS:
        run.train_way(way, Progress(1))
    assert all(torch.equal(x, before[name]) for name, x in run.converted.state_dict().items())
    assert all(torch.equal(before[name], x) for name, x in run.dense.state_dict().items())
    assert run.losses["window"][0] != run.losses["dense"][0]
