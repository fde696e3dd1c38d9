"""The demo from end to end with its quick settings, and after Ctrl-C."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from flexmsa import MSAConfig, __main__, demo
from flexmsa._command import write_whole
from flexmsa._progress import Progress
from flexmsa.demo.generate import generate
from flexmsa.demo.model import GPT, dense_twin
from flexmsa.demo.text import read_standard_library

CONFIG = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8, index_head_dim=8, block_size=4, topk=3)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert __main__.main(["demo", "--quick", "--device", "cpu", "--out", str(out)]) == 0
    return out, json.loads((out / "metrics.json").read_text())


def test_both_models_learn_and_end_near_each_other(quick_run):
    _, metrics = quick_run
    steps, found = metrics["steps"], metrics["validation"]
    assert len(steps) == metrics["settings"]["steps"]
    for name in ("msa_loss", "dense_loss"):
        assert steps[0][name] > 5
        assert found[name] < 3.5
    assert abs(found["difference"]) < 0.1
    assert found["difference"] == pytest.approx(found["msa_loss"] - found["dense_loss"])
    assert steps[-1]["index_loss"] < steps[0]["index_loss"] / 2


def test_the_warm_up_does_not_change_the_main_branch(quick_run):
    _, metrics = quick_run
    warmup = [step for step in metrics["steps"] if not step["sparse"]]
    assert len(warmup) == metrics["settings"]["warmup"]
    assert all(step["msa_loss"] == pytest.approx(step["dense_loss"], abs=1e-2) for step in warmup)


def test_the_recalls_rise(quick_run):
    first, *_, last = quick_run[1]["probes"]
    for name in ("block_recall", "score_recall"):
        assert all(after > before for before, after in zip(first[name], last[name], strict=True))


def test_it_writes_complete_files_only(quick_run):
    pytest.importorskip("matplotlib")
    out, _ = quick_run
    assert sorted(path.name for path in out.iterdir()) == ["curves.png", "metrics.json", "selection.png"]


def test_cached_logits_equal_the_uncached_ones(quick_run):
    generation = quick_run[1]["generation"]
    assert generation["largest_logit_difference"] < 1e-4 * generation["largest_logit"]


@pytest.mark.parametrize("last_step", [1, 3])
def test_ctrl_c_saves_the_results_so_far(last_step, tmp_path, monkeypatch, capsys):
    update = Progress.update

    def interrupt(self, step, text):
        update(self, step, text)
        if step == last_step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "update", interrupt)
    assert demo.main(["--quick", "--warmup", "2", "--device", "cpu", "--out", str(tmp_path)]) == 130
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["interrupted"]
    assert len(metrics["steps"]) == last_step
    assert metrics["validation"]["msa_loss"] > 0
    said = capsys.readouterr().out
    assert f"Stopped after {last_step} of" in said
    assert ("not yet sparse" in said) == (last_step == 1)


def test_each_demo_has_a_folder_of_its_own():
    from flexmsa.recipes.settings import Settings as Pretraining

    folders = [demo.parse([]).out, Path(Pretraining.out)]
    if importlib.util.find_spec("transformers"):
        from flexmsa.integrations.transformers.demo import parse

        folders.append(parse([]).out)
    assert len(set(folders)) == len(folders)
    assert {folder.parent for folder in folders} == {Path("out")}


def test_it_says_what_it_overwrites(tmp_path, capsys):
    command = ["--quick", "--steps", "1", "--warmup", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert demo.main(command) == 0
    assert "overwrites" not in capsys.readouterr().out
    (tmp_path / "curves.png").unlink(missing_ok=True)
    (tmp_path / "selection.png").unlink(missing_ok=True)
    (tmp_path / "notes.txt").touch()
    assert demo.main(command) == 0
    printed = capsys.readouterr().out.splitlines()[0]
    assert printed == f"{tmp_path} has the results of an earlier run, which this run overwrites: metrics.json."


def test_without_matplotlib_there_are_no_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    options = ["--quick", "--steps", "2", "--warmup", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert demo.main(options) == 0
    assert "pip install flexmsa[plot]" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]


@pytest.mark.parametrize("options", [["--steps", "0"], ["--warmup", "99"], ["--context", "1"], ["--device", "abacus"]])
def test_bad_options_are_named(options, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--quick", *options])
    assert f"{options[0]}: " in capsys.readouterr().err


def test_the_twin_is_the_warm_up():
    model = GPT(CONFIG, num_layers=2)
    ids = torch.randint(256, (2, 30))
    model.set_topk(None)
    torch.testing.assert_close(dense_twin(model)(ids)[0], model(ids)[0])
    model.set_topk(CONFIG.topk)
    assert not torch.allclose(dense_twin(model)(ids)[0], model(ids)[0])


@pytest.mark.parametrize(("length", "compiled"), [(0, False), (1, False), (20, False), (20, True)])
def test_generation_with_a_cache_equals_one_forward_pass(length, compiled):
    model = GPT(CONFIG, num_layers=2).eval()
    prompts = [b"d", b"def a_longer_prompt(than, a_few, tokens):", b"import"]
    result = generate(model, prompts, length, compiled=compiled)
    for prompt, text, logits in zip(prompts, result.texts, result.logits, strict=True):
        assert text.startswith(prompt) and len(text) == len(prompt) + length
        whole = model(torch.tensor([list(text)]))[0][0, :-1].detach()
        torch.testing.assert_close(logits, whole)
        assert text[len(prompt) :] == bytes(whole[len(prompt) - 1 :].argmax(-1).tolist())


def test_a_step_of_generation_is_compiled_once():
    model = GPT(CONFIG, num_layers=2).eval()
    counter = CompileCounter()
    with torch.no_grad():
        caches = model.new_caches(2, 40)
        model.read(torch.zeros(2, 10, dtype=torch.int64), caches, torch.tensor([10, 3]))
        step = torch.compile(lambda new: model.read(new, caches), backend=counter, fullgraph=True)
        for _ in range(10):
            step(torch.zeros(2, 1, dtype=torch.int64))
    assert counter.frame_count == 1
    assert caches[0].kv_lens.tolist() == [20, 13]


def test_layers_reuse_a_selection_when_asked():
    model = GPT(CONFIG, num_layers=2).eval()
    ids = torch.randint(256, (1, 60))
    with torch.no_grad():
        apart, reused = (model.read(ids, model.new_caches(1, 60), select_every=every) for every in (1, 2))
    assert not torch.allclose(apart, reused)


def test_the_text_is_split_by_file(tmp_path):
    for number in range(20):
        (tmp_path / f"{number:02d}.py").write_text(f"{number:02d}")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "skipped.py").write_text("no")
    text = read_standard_library(tmp_path)
    assert bytes(text.validation.tolist()) == b"0919"
    assert (text.num_files, len(text.train)) == (20, 36)
    with pytest.raises(FileNotFoundError, match="installed as source files"):
        read_standard_library(tmp_path / "test")


def test_an_unfinished_file_does_not_replace_a_complete_one(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text("whole")

    def fail(unfinished):
        unfinished.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, fail)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("metrics.json", "whole")]
