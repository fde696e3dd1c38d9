"""Two processes that share a batch, or the heads, get the losses and gradients of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from integrations import m3
from integrations.converted import SETTINGS, assert_same, make_dense, tokens
from integrations.parallel import (
    CONVERTED,
    EVEN,
    M3,
    PHASES,
    SHARDED,
    SHARDS,
    TRAINERS,
    documents,
    generate,
    gradients_of,
    make_m3,
    make_model,
    measured_step,
    packed,
    padded,
    step,
    step_m3,
)
from integrations.parallel_trainer import documented_trainer, run_trainer

from flexmsa.integrations.transformers import begin_sparse, begin_warm_up, clip_gradients, convert, from_pretrained


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    make_model(**EVEN).save_pretrained(folder / "converted")
    make_dense(**EVEN).save_pretrained(folder / "dense")
    m3.make_m3("flexmsa", vocab_size=98).save_pretrained(folder / "m3")
    command = [sys.executable, str(Path(__file__).with_name("parallel.py"))]
    runs = [subprocess.Popen([*command, str(rank), str(folder)]) for rank in range(2)]
    try:
        assert [run.wait(timeout=300) for run in runs] == [0, 0]
    finally:
        for run in runs:
            run.kill()
    return folder


def results(folder, way):
    """What both processes found."""
    found = [torch.load(folder / f"{way}-{rank}.pt") for rank in range(2)]
    for result in found:
        assert not isinstance(result, str) or not result.startswith("Traceback"), result
    return found


def assert_halves(both, losses, gradients):
    """The mean of the halves' losses is that of the whole; the gradients are averaged, on both processes."""
    (first, mine), (second, theirs) = both
    torch.testing.assert_close((first + second) / 2, losses)
    assert not first.equal(second)
    assert_same(mine, gradients)
    assert_same(theirs, gradients)


@pytest.mark.parametrize("way", CONVERTED)
def test_the_mean_of_both_halves_is_the_whole(way, folder):
    model = make_model()
    PHASES["warm-up" if way.endswith("warm-up") else "sparse"](model)
    assert_halves(results(folder, way), *step(model, model, tokens(4, 40).cpu()))


@pytest.mark.parametrize("way", M3)
def test_minimax_m3_too(way, folder):
    phase = way.split("-")[-1]
    model = make_m3(phase)
    losses, gradients = step_m3(model, model, m3.tokens(4, 60).cpu(), phase)
    assert all((".indexer." in name) or phase == "sparse" for name in gradients)
    assert_halves(results(folder, way), losses, gradients)


def test_rows_of_unequal_lengths_have_a_common_mean(folder):
    """Each process has its part of the mean, times the number of processes."""
    model = make_model()
    begin_warm_up(model)
    ids, mask = padded(slice(None))
    assert_halves(results(folder, "unequal"), *step(model, model, ids, attention_mask=mask))


def test_a_log_takes_what_some_processes_have(folder):
    (logged, first), (same, second) = results(folder, "log")
    assert logged == same and logged["lm_loss"] == first["lm_loss"] and "lm_loss" not in second
    assert logged["kl"] == pytest.approx((first["kl"] + second["kl"]) / 2)


@pytest.mark.parametrize(
    "way, message",
    [
        ("thawed", "expected the 8 weights that it averages, got 33 that train"),
        ("frozen", "pass find_unused_parameters=True"),
        ("context-parallel", "it would take this process's part as the whole sequence"),
        ("tp-plain-columns", "they are sharded without their index branch"),
    ],
)
def test_what_would_be_silently_wrong_raises(way, message, folder):
    for error in results(folder, way):
        assert message in error


def test_gradients_keep_their_dtype_when_fsdp_sees_the_base_thaw(folder):
    found, _ = results(folder, "bfloat16")
    assert found.keys() == dict(make_model().named_parameters()).keys()
    assert set(found.values()) == {"torch.float32"}


def test_sharded_gradients_are_clipped_by_the_norms_of_whole_ones(folder):
    model = make_model()
    step(model, model, tokens(4, 40).cpu())
    norms = clip_gradients(model, max_norm=0.1)
    for found, clipped in results(folder, "clip"):
        torch.testing.assert_close(found, norms)
        assert_same(clipped, gradients_of(model))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("way", SHARDED)
def test_sharded_heads(way, phase, folder):
    expected = measured_step(make_model(**EVEN), phase, SHARDED[way])
    for found in results(folder, f"{way}-{phase}"):
        assert found.keys() == expected.keys()
        assert found["log"].keys() == expected["log"].keys()
        for name, x in expected.items():
            if isinstance(x, dict) and name != "log":
                assert_same(found[name], x)
            else:
                torch.testing.assert_close(found[name], x, atol=1e-5, rtol=1e-5)


def test_generation_with_sharded_heads(folder):
    model = make_model(**EVEN)
    text = generate(model)
    for found in results(folder, "tp-generation"):
        assert found.equal(text)
    assert_same(from_pretrained(folder / "saved").state_dict(), model.state_dict())


def test_a_model_that_is_converted_when_its_heads_are_sharded(folder):
    (losses, gradients, weights), other = results(folder, "tp-converted")
    assert_same(weights, other[2])
    model = convert(make_dense(**EVEN).cpu(), SETTINGS)
    model.load_state_dict(weights, strict=False)
    begin_sparse(model.train())
    expected_losses, expected = step(model, model, tokens(2, 40).cpu())
    torch.testing.assert_close(losses, expected_losses)
    assert_same(gradients, expected)
    assert_same(other[1], expected)


def test_minimax_m3_with_sharded_heads(folder):
    model = m3.make_m3("flexmsa", vocab_size=98).cpu().train()
    step_m3(model, model, m3.tokens(2, 60).cpu())
    losses, gradients = step_m3(model, model, m3.tokens(2, 60).cpu())
    for found, theirs, shape in results(folder, "tp-m3"):
        torch.testing.assert_close(found, losses)
        assert_same(theirs, gradients)
        assert shape == (16, 32)


@pytest.mark.parametrize("way", SHARDS)
def test_sharded_tokens(way, folder):
    make, phase = SHARDS[way]
    ids, *others = documents()
    assert_halves(results(folder, way), *make(phase, ids, packed(ids, *others)))


def test_both_phases_in_a_trainer(folder, tmp_path):
    _, _, weights = run_trainer(make_model(), tmp_path, steps=2, accumulate=2)
    for way in TRAINERS:
        (log, own, mine, with_fsdp), (same_log, others, theirs, _) = results(folder, way)
        assert with_fsdp == (way == "trainer-fsdp")
        assert_same(mine, weights)
        assert_same(theirs, weights)
        assert [entry["grad_norm/base"] > 0 for entry in log] == [False, True]
        for entry, same, first, second in zip(log, same_log, own, others, strict=True):
            for name in first:
                assert entry[name] == same[name] == pytest.approx((first[name] + second[name]) / 2)
            assert first["kl"] != second["kl"]


def test_the_trainer_of_the_documents(folder, tmp_path):
    weights = documented_trainer(make_m3("sparse"), tmp_path, batch=4, accumulate=1)
    for found in results(folder, "m3-trainer"):
        assert_same(found, weights)
