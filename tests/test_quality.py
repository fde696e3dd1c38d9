"""The study of quality, tiny and on a CPU: text, arms, measurements and report."""

import doctest
import itertools
import json
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("tokenizers")

from benchmarks.quality import __main__ as commands
from benchmarks.quality import arms, checks, data, measures, plan, report, retrieval, tokens, train
from benchmarks.quality.settings import FULL, QUICK

CPU = torch.device("cpu")
SHORT = QUICK.shortened(6)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def corpus(work):
    return tokens.prepare(QUICK, work)


@pytest.fixture(scope="module")
def packages():
    return data.find_packages(QUICK)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def new_training(corpus, name="msa", settings=SHORT):
    return train.Training(settings, arms.find_arm(settings, name), 0, corpus, CPU)


def finish(training):
    return list(training.train(1e9))[-1]


def test_a_study_from_text_to_report(work, corpus, tmp_path, capsys):
    """All commands, and what their files say."""
    shared = ["--quick", "--out", str(tmp_path), "--work", str(work), "--steps", "6", "--device", "cpu"]
    for name in ("dense", "msa", "convert", "random"):
        assert commands.main(["train", "--arm", name, *shared]) == 0
    assert commands.main(["prepare", *shared]) == commands.main(["report", *shared]) == 0
    study = report.load(tmp_path)
    assert list(study.runs) == ["dense", "msa", "convert", "random"]
    budget = QUICK.topk * QUICK.block_size
    assert [report.keys_read(seeds[0]) for seeds in study.runs.values()] == [QUICK.context, budget, budget, budget]
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.split("\n\n")[0].splitlines() if "MSA by conversion" in line]
    assert f"{budget}" in rows[0] and f"{report.mean_loss(study.runs['convert'][0]):.3f}" in rows[0]
    assert json.loads((tmp_path / "text.json").read_text())["digest"] == study.any_run["text"]
    assert "wrote" in capsys.readouterr().out


FAKE_PYTHON = """#!/bin/sh
echo "GPU $CUDA_VISIBLE_DEVICES runs $*"
sleep 0.1
test "$5" != few
"""


def test_several_arms_side_by_side(work, corpus, tmp_path, monkeypatch, capsys):
    """One on each GPU, with the same options, and the exit code of one that fails."""
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shared = ["--quick", f"--out={tmp_path}", f"--work={work}", "--device=cpu", "--seconds=7", "--long-steps=12"]
    assert commands.main(["train", "--arm", "msa", "few", "cold", "--seed", "0", "1", *shared]) == 1
    logs = {path.stem: path.read_text() for path in tmp_path.glob("*.log")}
    assert sorted(logs) == ["cold-0", "cold-1", "few-0", "few-1", "msa-0", "msa-1"]
    assert {log[4] for log in logs.values()} == {"0", "1"}
    assert "train --arm cold --seed 1 --seconds=7.0 --long-steps=12" in logs["cold-1"] and "--quick" in logs["cold-1"]
    assert capsys.readouterr().out.count("exit code 1; GPU") == 2


@pytest.mark.parametrize("module", [checks, data, measures, report])
def test_the_examples_in_docstrings(module):
    assert doctest.testmod(module).failed == 0 and doctest.testmod(module).attempted


def test_an_arm_that_does_not_exist_is_refused(corpus):
    with pytest.raises(ValueError, match="expected one of dense, msa"):
        arms.find_arm(QUICK, "sliding")


def test_the_speeds(corpus, monkeypatch):
    from benchmarks.quality.speed import KINDS, speeds

    shapes = []
    monkeypatch.setattr(train, "labels_of", lambda ids, labels=train.labels_of: shapes.append(ids.shape) or labels(ids))
    rows = list(speeds(replace(QUICK, speed_lengths=(128, 256)), corpus, CPU))
    assert [row["kind"] for row in rows[::2]] == list(KINDS) and all(row["seconds"] > 0 for row in rows)
    assert set(shapes) == {(1, 128), (1, 256)}


def test_more_steps_on_long_rows_are_a_study_of_their_own():
    longer = QUICK.lengthened(20)
    assert longer.steps == 20 and longer.key() != QUICK.key() and longer.text_key() == QUICK.text_key()
    assert arms.find_arm(longer, "msa").steps == QUICK.short_steps + 20
    with pytest.raises(ValueError, match="expected at least 7, got 6"):
        QUICK.lengthened(QUICK.convert_at)


def test_arms_differ_in_the_attention_only(corpus):
    """The same weights at the start, the same batches, as many steps of the base model."""
    trained = [new_training(corpus, name) for name in arms.make_arms(SHORT)]
    first = {name: weight.clone() for name, weight in trained[0].model.state_dict().items()}
    for training in trained:
        for name, weight in training.model.state_dict().items():
            if weight.is_floating_point() and "index_loss_value" not in name:
                assert torch.equal(weight, first[name]), name
        finish(training)
    assert len({training.batches for training in trained}) == 1
    steps = SHORT.short_steps + SHORT.steps
    assert all(sum(p.steps for p in training.arm.phases if not p.index_only) == steps for training in trained)
    losses = {training.log[-1]["loss"] for training in trained}
    assert len(losses) == len(trained), losses


def test_the_first_phase_of_a_conversion_changes_the_index_branches_alone(corpus):
    training = new_training(corpus, "convert")
    short, long, index = (phase.steps for phase in training.arm.phases[:3])
    dense = short + long
    steps = training.train(1e9)
    while next(steps) < dense:
        pass
    before = {name: weight.clone() for name, weight in training.model.named_parameters()}
    batches = training.batches
    while next(steps) < dense + index:
        pass
    changed = {name for name, weight in training.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if ".index_" in name} and batches == training.batches


@pytest.mark.parametrize("name", ["random", "convert"])
def test_a_run_in_several_calls_is_one_run(corpus, tmp_path, name):
    whole, part = new_training(corpus, name), new_training(corpus, name)
    finish(whole)
    calls = 0
    while part.done < part.arm.steps:
        # No time: each call makes one entry of the log.
        list(part.train(0.0))
        part.save(tmp_path / "x.pt")
        part = new_training(corpus, name)
        part.load(tmp_path / "x.pt")
        calls += 1
    assert calls > 3 and part.batches == whole.batches
    for own, other in zip(part.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(own, other)
    assert [entry["loss"] for entry in part.log] == [entry["loss"] for entry in whole.log]


def test_a_trained_arm_is_measured_as_it_attends_in_a_later_call_too(corpus, tmp_path):
    first, second = new_training(corpus, "window"), new_training(corpus, "window")
    finish(first)
    first.save(tmp_path / "run.pt")
    checks.check(second)
    second.load(tmp_path / "run.pt")
    found = [measures.measure(training)["heldout"] for training in (first, second)]
    assert found[0] == found[1]


def test_a_checkpoint_of_another_arm_is_taken_in_the_short_phase_alone(corpus, tmp_path):
    training, other = new_training(corpus), new_training(corpus, "cold")
    for done in training.train(1e9):
        training.save(tmp_path / "x.pt")
        if done == SHORT.short_steps:
            other.load(tmp_path / "x.pt")
            assert other.done == done
    with pytest.raises(ValueError, match="expected a run of these settings"):
        other.load(tmp_path / "x.pt")


def test_arms_go_on_from_the_shared_phase(corpus, work, tmp_path, capsys):
    """With the same results as if each trained it by itself."""
    given = ["--quick", "--device", "cpu", "--steps", "6", "--out", str(tmp_path), "--work", str(work), "--seed", "5"]
    assert commands.main(["short", *given]) == commands.main(["train", "--arm", "window", *given]) == 0
    assert f"continuing after step {SHORT.short_steps}" in capsys.readouterr().out
    found = json.loads((tmp_path / "window-5.json").read_text())
    whole = train.Training(SHORT, arms.find_arm(SHORT, "window"), 5, corpus, CPU)
    finish(whole)
    assert found["batches"] == whole.batches
    assert [entry["loss"] for entry in found["log"]] == [float(f"{entry['loss']:.6g}") for entry in whole.log]


def test_arms_that_end_the_shared_phase_at_one_time_save_it(corpus, tmp_path, monkeypatch):
    first, second = new_training(corpus), new_training(corpus, "cold")
    write, processes = torch.save, itertools.count()
    monkeypatch.setattr(os, "getpid", lambda: next(processes))

    def save_both(state, path):
        write(state, path)
        monkeypatch.setattr(torch, "save", write)
        second.save(tmp_path / "short.pt")

    monkeypatch.setattr(torch, "save", save_both)
    first.save(tmp_path / "short.pt")
    second.load(tmp_path / "short.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["short.pt"]


def test_a_run_without_time_continues_in_the_next_call(work, corpus, tmp_path):
    arguments = ["--quick", "--device", "cpu", "--seconds", "0", "--out", str(tmp_path), "--work", str(work)]
    arguments += ["--steps", "5"]
    assert [commands.main(["short", *arguments]) for _ in range(3)] == [commands.UNFINISHED, 0, 0]
    assert commands.main(["train", *arguments]) == commands.UNFINISHED
    found = json.loads((tmp_path / "msa-0.json").read_text())
    assert not found["finished"] and "heldout" not in found
    with pytest.raises(FileNotFoundError, match="finished arm"):
        report.load(tmp_path)
    calls = [commands.main(["train", *arguments]) for _ in range(5)]
    assert calls == [commands.UNFINISHED] * 3 + [0, 0]
    found = report.load(tmp_path).any_run
    assert [entry["step"] for entry in found["log"]] == [1, 2, 3, 4, 5, 6, 7] and "recalls" in found["log"][0]


@pytest.mark.parametrize("name", ["window", "random"])
def test_an_arm_that_loses_a_block_is_found(corpus, monkeypatch, name):
    checks.check(new_training(corpus, name))
    right = arms.ArmAttention.given_blocks

    def fewer(self, x):
        ids = right(self, x)
        return None if ids is None else ids[..., 1:]

    monkeypatch.setattr(arms.ArmAttention, "given_blocks", fewer)
    with pytest.raises(ValueError, match="expected the way"):
        checks.check(new_training(corpus, name))


@pytest.mark.parametrize("topk", [None, QUICK.topk - 1, QUICK.topk + 1])
def test_an_arm_of_another_budget_is_found(corpus, monkeypatch, topk):
    right = arms.ArmAttention.choose

    def wrong(self, way, kl):
        right(self, way, kl)
        self.topk = None if way == "dense" else topk

    monkeypatch.setattr(arms.ArmAttention, "choose", wrong)
    with pytest.raises(ValueError, match="expected the way 'select'"):
        checks.check(new_training(corpus))


def test_wrong_first_weights_are_found(corpus):
    training = new_training(corpus)
    training.model.head.weight.data *= 50
    with pytest.raises(ValueError, match="first loss: expected about"):
        checks.check(training)


def test_every_block_within_the_budget_is_dense_attention(corpus):
    """In the whole model and with its gradients."""
    found = {}
    for way in ("dense", "select", "window", "random"):
        model = arms.make_model(QUICK, arms.find_arm(QUICK, "msa"), 0)
        arms.choose(model, way)
        ids = train.batch(corpus, QUICK, 0, 0)[:, : QUICK.topk * QUICK.block_size]
        model(ids, train.labels_of(ids))[0].backward()
        found[way] = model.embedding.weight.grad
    for way, gradient in found.items():
        torch.testing.assert_close(gradient, found["dense"], rtol=1e-4, atol=1e-5, msg=way)


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, num_heads=8, mlp_size=80, vocabulary=600)])
def test_the_parameters_of_the_plan_are_the_models(settings):
    model = arms.make_model(settings, arms.find_arm(settings, "msa"), 0)
    base, index = (sum(p.numel() for p in branch) for branch in train.branches(model))
    found = plan.parameters(settings)
    assert (found.base, found.index) == (base, index)


def test_the_plan_of_the_full_study():
    """Of the size that docs/quality.md names, and dense attention costs most."""
    assert 90e6 < plan.parameters(FULL).base < 120e6
    flops = {name: sum(plan.arm_flops(FULL, arm)) for name, arm in arms.make_arms(FULL).items()}
    assert max(flops, key=flops.get) == "dense" and min(flops, key=flops.get) == "cold"
    by_hand = 0
    long = FULL.steps * FULL.batch_rows, FULL.context
    for rows, context in ((FULL.short_steps * FULL.short_rows, FULL.short_context), long):
        keys = (context + 1) / 2
        each = 6 * plan.parameters(FULL).multiplied + 14 * FULL.num_layers * FULL.num_heads * FULL.head_dim * keys
        by_hand += rows * context * each
    assert flops["dense"] == pytest.approx(by_hand)


def test_no_held_out_file_is_in_the_training_text(packages):
    hashes = {heldout: [h for p in packages if p.heldout == heldout for h in p.hashes.values()] for heldout in (0, 1)}
    assert not set(hashes[0]) & set(hashes[1])
    every = hashes[0] + hashes[1]
    assert len(set(every)) == len(every)


def test_files_follow_those_that_they_import():
    files = {
        "p/__init__.py": "from p.b import f\n",
        "p/a.py": "import p.c\nfrom . import (b, d)\n",
        "p/b.py": "from .sub.e import g as h\nimport p.a\n",
        "p/c.py": "from os import path\n",
        "p/d.py": "",
        "p/sub/e.py": "from ..c import x\n    from .. import d\n",
        "p/README.md": "import p.a",
    }
    order = data.in_import_order(files)
    assert sorted(order) == sorted(files)
    place = {name: number for number, name in enumerate(order)}
    for before, after in (("c", "a"), ("sub/e", "b"), ("c", "sub/e"), ("d", "sub/e"), ("d", "a")):
        assert place[f"p/{before}.py"] < place[f"p/{after}.py"], (before, after)
    assert place["p/b.py"] < place["p/__init__.py"]


def test_rows_hold_the_text(corpus, packages):
    """The tokens of held-out rows are the bytes of a package's files, each behind its name."""
    text = b"".join(corpus.token_bytes[number] for number in corpus.heldout[0]).decode()
    package = next(p for p in packages if p.name == corpus.packages[0])
    assert "".join(package.documents()).startswith(text)
    assert (
        corpus.heldout.min() >= tokens.FIRST_LETTER + tokens.ALPHABETS * QUICK.letters
        and corpus.heldout.max() < QUICK.vocabulary
    )


def test_batches_depend_on_their_number_and_seed_alone(corpus):
    first = train.batch(corpus, QUICK, 0, 5)
    assert torch.equal(first, train.batch(corpus, QUICK, 0, 5))
    assert not torch.equal(first, train.batch(corpus, QUICK, 0, 6))
    assert not torch.equal(first, train.batch(corpus, QUICK, 1, 5))


def test_an_epoch_has_every_row_once(corpus):
    few = replace(corpus, train=corpus.train[:5])
    settings = replace(QUICK, statements=1)
    rows = torch.cat([train.batch(few, settings, 0, settings.short_steps + number) for number in range(5)])
    for epoch in rows.split(5):
        # A statement overwrites a few tokens.
        same = (epoch[:, None] == torch.from_numpy(few.train.astype(np.int64))).float().mean(-1) > 0.9
        assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * 5


def test_each_planted_question_has_its_statement_before(corpus):
    ids = np.full(QUICK.context, 2)
    retrieval.plant(ids, QUICK, np.random.default_rng(3))
    facts, questions = {}, 0
    for place in range(0, len(ids), retrieval.SLOT):
        mark, *fact = ids[place : place + retrieval.LENGTH].tolist()
        if mark == tokens.STATEMENT:
            facts[tuple(fact[:2])] = fact[2:]
        elif mark == tokens.QUESTION:
            questions += 1
            assert facts[tuple(fact[:2])] == fact[2:]
    assert facts and questions


def test_retrieval_counts_right_answers(corpus):
    """A model that looks the key up is always right; one that is wrong in an answer's second letter never is."""

    def look_up(ids, count, error=0):
        likeliest = torch.zeros(count, dtype=torch.int64)
        for place in range(len(ids) - count, len(ids)):
            if ids[place] == tokens.QUESTION:
                key = ids[place + 1 : place + 3]
                starts = [
                    s for s in range(place) if ids[s] == tokens.STATEMENT and torch.equal(ids[s + 1 : s + 3], key)
                ]
                value = ids[starts[0] + 3 : starts[0] + 5] + torch.tensor([0, error])
                likeliest[place - len(ids) + count + 3 :][:2] = value
        scores = torch.full((count, QUICK.vocabulary), -9.0)
        return scores.scatter(1, likeliest[:, None], -1.0)

    rows = retrieval.needles(corpus, QUICK, look_up, CPU)
    assert {(row["right"], row["nats"]) for row in rows} == {(1.0, 1.0)}
    assert {row["length"] for row in rows} == set(QUICK.needle_lengths)
    found = retrieval.associative_recall(corpus, QUICK, look_up, CPU)
    assert found["right"] == found["nats"] == [1.0] * QUICK.needle_samples
    rows = retrieval.needles(corpus, QUICK, lambda ids, count: look_up(ids, count, error=1), CPU)
    assert {(row["right"], row["nats"]) for row in rows} == {(0.0, 5.0)}


def test_longer_rows_turn_slower(corpus):
    model = arms.make_model(QUICK, arms.find_arm(QUICK, "msa"), 0)
    base = model.blocks[0].attention.config.rope_theta
    for length, longer in ((QUICK.context, False), (4 * QUICK.context, True)):
        with measures.longer_positions(model, QUICK, length):
            assert (model.blocks[1].attention.config.rope_theta > base) == longer
    assert model.blocks[1].attention.config.rope_theta == base


def test_identifiers_known_from_far_away():
    words = [
        b"class",
        b" Area",
        b":",
        b"\n",
        b"width_of",
        b" =",
        b" 1",
        b"\n",
        b"Ar",
        b"ea",
        b"(",
        b"width",
        b"_of",
        b")",
    ]
    found = list(measures.identifiers(np.arange(len(words)), words))
    assert found == [(8, 10, 7), (11, 13, 7)]
    assert not list(measures.identifiers(np.arange(3), [b"area", b"(1);", b" area"]))


def test_recalls_are_of_the_model_that_selects(corpus):
    """An index branch that is the main branch finds more than an untrained one."""
    training = new_training(corpus, settings=replace(SHORT, num_heads=2))
    for block in training.model.blocks:
        layer = block.attention
        layer.index_q_proj.weight.data = layer.q_proj.weight.data.clone() * 1
        layer.index_k_proj.weight.data = layer.k_proj.weight.data[: layer.config.index_head_dim].clone()
    found = measures.layer_recalls(training, 2)
    assert set(found) == {"index", "untrained", "window", "random"}
    for layer in range(QUICK.num_layers):
        assert found["index"][layer][1] > found["untrained"][layer][1]


def run_of(arm, losses, seed=0, **changes):
    """What a run writes, as far as differences need it; losses: (package, loss) of each row."""
    rows = [{"package": package, "loss": loss} for package, loss in losses]
    common = {"key": "k", "text": "t", "batches": "b", "finished": True}
    return {**common, "arm": arm, "seed": seed, "heldout": {"rows": rows}, **changes}


def save(folder, *runs):
    for run in runs:
        (folder / f"{run['arm']}-{run['seed']}.json").write_text(json.dumps(run))


def test_differences_are_of_the_same_rows_and_packages_are_the_observations(tmp_path):
    dense = run_of("dense", [("a", 2.0), ("a", 3.0), ("b", 1.0)])
    save(tmp_path, dense, run_of("msa", [("a", 2.1), ("a", 3.1), ("b", 1.4)]))
    found = report.load(tmp_path).from_dense("msa", lambda row: (row["loss"], 1.0))
    assert found.mean == pytest.approx(0.2)
    # The packages' deviations are -0.2 and 0.2.
    assert found.error == pytest.approx((2 * 0.08) ** 0.5 / 3)


@pytest.mark.parametrize("name", ["key", "text", "batches"])
def test_runs_of_several_studies_are_refused(tmp_path, name):
    save(tmp_path, run_of("dense", []), run_of("msa", [], **{name: "other"}))
    with pytest.raises(ValueError, match=f"expected .*{name}"):
        report.load(tmp_path)
