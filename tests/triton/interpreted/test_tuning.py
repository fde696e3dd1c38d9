"""Tuned changes reach the launches, and change no result but by rounding."""

import contextlib
import importlib
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from triton.runtime.errors import OutOfResources

import flexmsa
from flexmsa import tuning
from flexmsa.kernels.problem import Problem
from flexmsa.kernels.triton.common.target import Target
from flexmsa.kernels.triton.tuning import tasks
from flexmsa.kernels.tuning import MARGIN, register, tune
from flexmsa.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SIZES = {"num_kv_heads": 2, "head_dim": 16, "index_head_dim": 16, "block_size": 16, "topk": 2, "dtype": torch.float32}
PROBLEM = Problem(**SIZES, group_size=2)
SEQLEN = 40
TASKS = {task.name: task for task in tasks.TASKS}
CHANGES = {
    "selection": {"rows": 64, "period": 4},
    "forward": {"rows": 32, "length": 32, "query_major_rows": 32, "longest_union": 2},
    "backward": {"rows": 32, "length": 16, "swap": False},
    "loss": {"rows": 32, "length": 20},
}
# The function that turns a task's configuration, its first argument, into the constants of a launch.
LAUNCHES = {
    "selection": ("selection.launch", "selection_constants"),
    "forward": ("forward.key_major", "key_major_constants"),
    "backward": ("backward.gradient", "gradient_constants"),
    "loss": ("loss.launch", "loss_constants"),
}


@pytest.fixture(autouse=True)
def nothing_tuned():
    yield
    flexmsa.clear_tuning()


@pytest.fixture
def launched(monkeypatch):
    """The configurations of each kernel, as they are launched."""
    found = {kernel: [] for kernel in LAUNCHES}

    def spy(kernel, launch):
        def wrapped(config, *args):
            found[kernel].append(config)
            return launch(config, *args)

        return wrapped

    for kernel, (name, function) in LAUNCHES.items():
        module = importlib.import_module(f"flexmsa.kernels.triton.{name}")
        monkeypatch.setattr(module, function, spy(kernel, getattr(module, function)))
    return found


def inputs_of(seqlen=SEQLEN):
    return tasks.make_inputs(PROBLEM, seqlen, torch.device("cpu"))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("seqlen", [SEQLEN, 55])
def test_changes_hold_for_every_length(launched, task, seqlen):
    inputs, launches = inputs_of(seqlen), launched[task.name]
    shipped = task.choose(inputs)
    launches.clear()
    expected = task.run(inputs, None)
    assert set(launches) == {shipped}
    register(task.key(inputs_of()), CHANGES[task.name])
    launches.clear()
    torch.testing.assert_close(task.run(inputs, None), expected)
    assert set(launches) == {replace(shipped, **CHANGES[task.name])} != {shipped}
    flexmsa.clear_tuning()
    launches.clear()
    assert all(map(torch.equal, task.run(inputs, None), expected))
    assert set(launches) == {shipped}


def test_a_selection_of_few_queries_stays_as_it_is(launched):
    task = TASKS["selection"]
    register(task.key(inputs_of()), CHANGES["selection"])
    task.run(inputs_of(5), None)
    assert [config.rows for config in launched["selection"]] == [16]


def test_changes_reach_a_compiled_function(launched):
    inputs = Case(num_kv_heads=2, group_size=2, seqlen_q=40, seqlen_k=40).inputs("cpu")[0]
    inputs = [x.requires_grad_() for x in inputs]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss_of(*inputs):
        aux = flexmsa.AuxRequest(index_loss=True)
        out, aux = flexmsa.attention(*inputs, block_size=16, topk=2, backend="triton", return_aux=aux)
        return out.square().sum() + aux.index_loss

    expected = torch.autograd.grad(loss_of(*inputs), inputs)
    like = inputs_of()
    for task in TASKS.values():
        register(task.key(like), CHANGES[task.name])
        launched[task.name].clear()
    torch.testing.assert_close(torch.autograd.grad(loss_of(*inputs), inputs), expected)
    for kernel, configs in launched.items():
        assert {config.rows for config in configs} == {CHANGES[kernel]["rows"]}


TIMES = {"num_warps": {4: 1.0, 8: 0.9, 2: 0.8}, "num_stages": {4: 1.0, 3: 1 - MARGIN / 2, 2: 0.5}}


def time_by_table(call):
    (config,) = call.args
    return TIMES["num_warps"][config.num_warps] * TIMES["num_stages"][config.num_stages]


def test_the_fastest_that_runs_and_is_right_is_found():
    task, inputs = TASKS["selection"], inputs_of()

    def run(config):
        if config.num_warps == 2:
            raise OutOfResources(1, 0, "shared memory")
        return tuple(x + (config.num_stages == 2) for x in task.run(inputs, config))

    lines = []
    candidates = [{"num_warps": 2}, {"num_stages": 3}, {"num_stages": 2}, {"num_warps": 8}, {"num_warps": 8}]
    found = tune(task.choose(inputs), candidates, run, time_by_table, lines.append)
    assert found == ({"num_warps": 8}, 1.0, 0.9)
    assert lines == [
        "as shipped: 1.000 ms",
        "num_warps=2: cannot be launched (OutOfResources)",
        "num_stages=3: 0.985 ms",
        "num_stages=2: other results",
        "num_warps=8: 0.900 ms",
    ]


def test_what_wins_must_win_once_more():
    times = iter([1.0, 0.9, 1.0, 0.99])
    task, inputs = TASKS["selection"], inputs_of()
    found = tune(task.choose(inputs), [{"num_warps": 8}], partial(task.run, inputs), lambda call: next(times))
    assert found == ({}, 1.0, 1.0)


@pytest.fixture
def gpu(monkeypatch):
    """The interpreter stands in for a GPU, on which 8 warps are best for each kernel."""
    monkeypatch.setattr(tuning, "_target_of", lambda device: Target("cuda", 80, 2))
    monkeypatch.setattr(tuning, "_environment", lambda device: {"gpu": "the interpreter"})
    monkeypatch.setattr(tuning, "event_time", lambda call: 1.0 if call.args[0].num_warps == 8 else 2.0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    warps = [{"num_warps": 16}, {"num_warps": 8}]
    for task in tasks.TASKS:
        monkeypatch.setattr(task.config, "candidates", lambda *given: warps)


ARGUMENTS = {**SIZES, "num_heads": 4, "seqlen": 20, "device": "cpu"}
SHELL = ["--num-heads=4", "--num-kv-heads=2", "--head-dim=16", "--block-size=16", "--topk=2", "--seqlen=20"]
SHELL += ["--dtype=float32", "--device=cpu"]


def test_a_file_brings_back_what_was_found(gpu, launched, tmp_path):
    path = tmp_path / "tuned.json"
    found = flexmsa.autotune(**ARGUMENTS, path=path)
    assert set(found) == set(LAUNCHES)
    # The backward ships with 8 warps.
    assert {kernel: entry["changes"] for kernel, entry in found.items()} == {
        **{kernel: {"num_warps": 8} for kernel in LAUNCHES},
        "backward": {},
    }
    flexmsa.clear_tuning()
    flexmsa.load_tuning(path)
    inputs = inputs_of(40)
    for task in TASKS.values():
        launched[task.name].clear()
        task.run(inputs, None)
        assert {config.num_warps for config in launched[task.name]} == {8}


def test_a_file_keeps_other_shapes(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", tasks.TASKS[:1])
    path = tmp_path / "tuned.json"
    for topk in (2, 3, 2):
        flexmsa.autotune(**{**ARGUMENTS, "topk": topk}, path=path)
    stored = json.loads(path.read_text())
    shapes = [entry["shape"]["topk"] for entry in stored["kernels"] if entry["kernel"] == "selection"]
    assert (stored["arch"], sorted(shapes)) == (80, [2, 3])


def test_the_command_stopped_leaves_what_was_found(gpu, tmp_path, monkeypatch, capsys):
    def stop(inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "TASKS", (tasks.TASKS[0], tasks.TASKS[1]._replace(choose=stop)))
    path = tmp_path / "tuned.json"
    assert tuning.main([*SHELL, f"--out={path}"]) == 0
    assert [entry["kernel"] for entry in json.loads(path.read_text())["kernels"]] == ["selection"]
    table = capsys.readouterr().out.splitlines()[-1]
    assert table.split() == ["selection", "2.000", "ms", "1.000", "ms", "num_warps=8"]


BAD_FILES = {
    "no json": "{",
    "no object": "[]",
    "no kernels": '{"arch": 80}',
    "unknown kernel": '{"arch": 80, "kernels": [{"kernel": "merge", "shape": {}, "changes": {}}]}',
    "unknown field": '{"arch": 80, "kernels": [{"kernel": "loss", "shape": {}, "changes": {"kept": 1}}]}',
    "a field that depends on the length": (
        '{"arch": 80, "kernels": [{"kernel": "selection", "shape": {}, "changes": {"num_splits": 1}}]}'
    ),
    "no number": '{"arch": 80, "kernels": [{"kernel": "loss", "shape": {}, "changes": {"rows": 1.5}}]}',
}


@pytest.mark.parametrize("text", BAD_FILES.values(), ids=BAD_FILES)
def test_a_malformed_file_is_refused(gpu, tmp_path, text):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"path: expected a file that flexmsa\.autotune wrote, got"):
        flexmsa.load_tuning(path)


def test_a_file_for_another_architecture_is_refused(gpu, tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text('{"arch": 90, "gpu": "another", "kernels": []}')
    with pytest.raises(ValueError, match=r"this GPU's architecture, 80, got .* for 90 \(another\)"):
        flexmsa.load_tuning(path)
    with pytest.raises(ValueError, match="this GPU's architecture"):
        flexmsa.autotune(**ARGUMENTS, path=path)
