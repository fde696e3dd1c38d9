"""The trainer: on several processes, resumed on others, or stopped by a signal, it does what one process does."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.tensor import DTensor

from flexmsa.recipes.pretrain import Trainer, main, process_group
from flexmsa.recipes.settings import Settings, parse, read
from flexmsa.recipes.text import IGNORED, PackedText

from .processes import run

MESHES = {
    2: {
        "fsdp": {"fsdp": 2},
        "tp": {"tp": 2, "activation_checkpointing": True},
        "cp": {"cp": 2, "activation_checkpointing": True},
    },
    4: {"replicate, cp": {"replicate": 2, "cp": 2}, "tp, cp": {"tp": 2, "cp": 2}},
}
# Documents of all lengths, longer and shorter than a row.
LENGTHS = (150, 3, 1, 40, 9, 64, 0, 31)


def write_text(folder):
    (folder / "deeper").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for number, length in enumerate(LENGTHS):
        found = torch.randint(97, 123, (length,), generator=generator, dtype=torch.uint8)
        (folder / ("deeper" if number % 2 else ".") / f"{number}.txt").write_bytes(bytes(found.tolist()))


def new_settings(folder, name, **changes):
    sizes = {"num_layers": 2, "hidden_size": 16, "mlp_size": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    sizes |= {"index_head_dim": 8, "block_size": 4, "topk": 2, "context": 48, "batch_size": 2, "steps": 3}
    how = {"warm_up": 1, "log_every": 1, "dtype": "float64", "device": "cpu", "max_norm": 0.1, "fsdp": 0}
    return Settings(**{"data": str(folder / "text"), "out": str(folder / name), **sizes, **how, **changes})


def result(trainer):
    """What each step's losses were, and the sums of the weights' squares, apart for base and index branch."""
    losses = [[entry["loss"], *entry["kl"], *entry["block_recall"], *entry["score_recall"]] for entry in trainer.log]
    norms = [[entry["grad_norm"], entry["index_grad_norm"]] for entry in trainer.log]
    squares = []
    for branch in trainer.branches:
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in (x.detach() for x in branch)]
        squares.append(sum(x.square().sum().item() for x in whole))
    return {"losses": losses, "norms": norms, "squares": squares}


def train(settings, stop_after=None):
    """The result of a run, which a signal to the last process stops during this step."""
    trainer = Trainer(settings)
    rows = trainer._rows

    def rows_and_signal(number):
        if number + 1 == stop_after and dist.get_rank() == dist.get_world_size() - 1:
            signal.raise_signal(signal.SIGTERM)
        return rows(number)

    trainer._rows = rows_and_signal
    trainer.train()
    assert trainer.stop_asked == (stop_after is not None)
    return result(trainer)


def train_all(folder, world):
    # float64 needs CPUs, and with GPUs these would be the processes' default devices, of FSDP's tensors too.
    torch.set_default_device(None)
    found = {name: train(new_settings(folder, name, **mesh)) for name, mesh in MESHES[world].items()}
    return found if world == 4 else {**found, **resume_all(folder)}


def resume_all(folder):
    """Runs that a signal stops, and that resume, each on another mesh than before."""
    found, meshes = {}, MESHES[2]
    found["stopped"] = train(new_settings(folder, "fsdp then tp", fsdp=2), stop_after=3)
    found["fsdp then tp"] = train(new_settings(folder, "fsdp then tp", resume=True, **meshes["tp"]))
    found["one then cp"] = train(new_settings(folder, "one then cp", resume=True, **meshes["cp"]))
    found["cp then one"] = train(new_settings(folder, "cp then one", **meshes["cp"]), stop_after=2)
    return found


def train_alone(folder):
    write_text(folder / "text")
    with process_group():
        return train(new_settings(folder, "one"))


def assert_same(found, expected, first=0):
    """The KL and the recalls are kept in float32."""
    assert len(found["losses"]) == len(expected["losses"]) - first
    for values, wanted in zip(found["losses"], expected["losses"][first:], strict=True):
        assert values[0] == pytest.approx(wanted[0], rel=1e-10)
        assert values[1:] == pytest.approx(wanted[1:], rel=1e-6)
    for values, wanted in zip(found["norms"], expected["norms"][first:], strict=True):
        assert values == pytest.approx(wanted, rel=1e-10)
    assert found["squares"] == pytest.approx(expected["squares"], rel=1e-10)


def test_two_processes_do_what_one_does(tmp_path):
    """Also after resuming: all in one start of the processes, which takes longer than a run."""
    alone = train_alone(tmp_path)
    with process_group():
        stopped = train(new_settings(tmp_path, "one then cp"), stop_after=3)
    assert stopped["losses"] == alone["losses"][:2]
    for found in run(2, train_all, tmp_path, 2):
        for mesh in MESHES[2]:
            assert_same(found[mesh], alone)
        assert_same(found["fsdp then tp"], alone, first=2)
        assert_same(found["one then cp"], alone, first=2)
        assert found["cp then one"]["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-6)
    with process_group():
        assert_same(train(new_settings(tmp_path, "cp then one", resume=True)), alone, first=1)


def test_four_processes_do_what_one_does(tmp_path):
    alone = train_alone(tmp_path)
    for found in run(4, train_all, tmp_path, 4):
        for mesh in MESHES[4]:
            assert_same(found[mesh], alone)


def test_blocks_are_compiled_once_per_phase(tmp_path, monkeypatch):
    alone, graphs = train_alone(tmp_path), []
    losses = torch.tensor(alone["losses"])
    assert losses[-1, 0] < losses[0, 0] and (losses[:, 3:] < 1).any()

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with process_group():
        found = train(new_settings(tmp_path, "compiled", compile=True, activation_checkpointing=True))
    assert_same(found, alone)
    assert len(graphs) == 2


def test_ctrl_c_leaves_a_checkpoint(tmp_path):
    write_text(tmp_path / "text")
    out = tmp_path / "out"
    options = "--context 64 --batch-size 1 --num-layers 1 --hidden-size 32 --log-every 1 --steps 100000 --device cpu"
    command = [sys.executable, "-m", "flexmsa.recipes.pretrain", "--data", str(tmp_path / "text"), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*command, *options.split()], stdout=subprocess.PIPE, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("step 2/"):
                process.send_signal(signal.SIGINT)
                break
        rest, code = process.stdout.read(), process.wait(60)
    assert code == 130
    assert "continue with --resume" in rest
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    (folder,) = out.glob("step-*")
    assert folder.name == f"step-{steps[-1]:08d}" and (folder / ".metadata").exists()


def test_a_run_that_ends_early_leaves_nothing_wrong(tmp_path):
    """A run stopped before its first step has no checkpoint, and one that died before its first has no log to keep."""
    alone, settings = train_alone(tmp_path), new_settings(tmp_path, "again")
    with process_group():
        assert train(settings, stop_after=1)["losses"] == []
        assert not list((tmp_path / "again").glob("step-*"))
        (tmp_path / "again").mkdir(exist_ok=True)
        (tmp_path / "again/metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
        assert_same(train(replace(settings, resume=True)), alone)
    steps = [json.loads(line)["step"] for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]


def test_rows_hold_whole_files_and_parts(tmp_path):
    write_text(tmp_path)
    text = PackedText(str(tmp_path), "*.txt", 48, seed=1, outside=tmp_path / "out")
    files = {path.read_bytes() for path in tmp_path.rglob("*.txt")} - {b""}
    rows = [text.row(number) for number in range(2 * text.num_bytes // 48)]
    documents, targets = [b""], 0
    for row in rows:
        assert len(row.ids) == len(row.labels) == 48 and row.cu_seqlens[-1] == 48
        for start, stop in zip(row.cu_seqlens[:-1].tolist(), row.cu_seqlens[1:].tolist(), strict=True):
            if start == stop:
                continue
            documents[-1] += bytes(row.ids[start:stop].tolist())
            labels = row.labels[start:stop].tolist()
            assert labels[:-1] == row.ids[start + 1 : stop].tolist()
            if labels[-1] == IGNORED:
                documents.append(b"")
        targets += int((row.labels != IGNORED).sum())
    # An epoch has each file once.
    assert set(documents[: len(files)]) == files and len(documents) >= 2 * len(files) - 1
    assert targets == sum(len(row.ids) for row in rows) - (len(documents) - 1)
    assert torch.equal(text.row(5).ids, rows[5].ids)


def test_wrong_settings_raise(tmp_path, capsys):
    write_text(tmp_path / "text")
    settings = new_settings(tmp_path, "out")
    for changes, message in (
        ({"tp": 4, "cp": 2}, "num_kv_heads: expected at least tp = 4 with context parallel, got 2"),
        ({"tp": 5}, "context: expected a multiple of tp, got 48 and 5"),
        ({"warm_up": 9}, "warm_up: expected at most the 3 steps, got 9"),
        ({"dtype": "float8"}, "dtype: expected one of auto, bfloat16"),
        ({"topk": 0}, "topk: expected at least 1, got 0"),
        ({"data": ""}, "data: expected a folder"),
        ({"num_kv_heads": 3}, "num_heads: expected a multiple of num_kv_heads=3"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(settings, **changes)
    with pytest.raises(ValueError, match="expected a product of 4, the number of processes, got 1 x 3 x 1 x 1"):
        replace(settings, fsdp=3).mesh_sizes(4)
    with pytest.raises(ValueError, match=r"batch_size: expected a multiple of replicate x fsdp = 4, got 2"):
        settings.mesh_sizes(4)
    with pytest.raises(SystemExit):
        parse(["--steps", "3"])
    assert "data: expected a folder of text files" in capsys.readouterr().err
    assert main(["--data", str(tmp_path / "none")]) == 1
    assert "expected text files *" in capsys.readouterr().err
    with process_group():
        trainer = Trainer(replace(settings, steps=1, warm_up=0))
        trainer.train()
        with pytest.raises(FileExistsError, match="expected a folder without checkpoints"):
            Trainer(settings)
        with pytest.raises(ValueError, match="topk is 2 there and 3 here"):
            Trainer(replace(settings, resume=True, topk=3, warm_up=0))


def test_a_run_resumes_with_its_text_its_steps_and_its_log(tmp_path):
    write_text(tmp_path / "text")
    # Its results, in the folder of the text, are no text.
    settings = new_settings(tmp_path, "text/out", steps=4, save_every=2, dtype="auto")
    with process_group():
        Trainer(settings).train()
        out = tmp_path / "text/out"
        assert json.loads((out / "step-00000004/settings.json").read_text())["dtype"] == "float32"
        with pytest.raises(ValueError, match=r"steps: expected at least those of .*step-00000004, got 3"):
            Trainer(replace(settings, resume=True, steps=3))
        # As after a crash in step 4.
        shutil.rmtree(out / "step-00000004")
        resumed = Trainer(replace(settings, resume=True))
        resumed.train()
        assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
        (tmp_path / "text/more.txt").write_text("more")
        with pytest.raises(ValueError, match=r"expected the settings and text of .*, but files is"):
            Trainer(replace(settings, resume=True))
        with pytest.raises(ValueError, match="by default warm_up is a quarter of the steps"):
            Trainer(replace(settings, resume=True, warm_up=2))


def differ(folder):
    """What a process says whose text is another one's."""
    try:
        Trainer(new_settings(folder / str(dist.get_rank()), "out", fsdp=2))
    except ValueError as error:
        return str(error)


def test_processes_that_see_other_files_raise_together(tmp_path):
    for rank in range(2):
        write_text(tmp_path / str(rank) / "text")
    (tmp_path / "1/text/more.txt").write_text("more")
    for message in run(2, differ, tmp_path):
        assert message.startswith("data, out: expected the same files and the same newest checkpoint on every process")


def test_several_processes_without_torchrun_raise(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="WORLD_SIZE: expected torchrun"), process_group():
        pass


def test_settings_from_a_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('data = "text"\nsteps = 8\nlearning_rate = 1\n')
    found = parse(["--config", str(path), "--steps", "9", "--no-compile"])
    assert (found.data, found.steps, found.learning_rate, found.compile) == ("text", 9, 1, False)
    assert read(path) == {"data": "text", "steps": 8, "learning_rate": 1}
    for text, message in (("layers = 3", "expected settings, got layers"), ('steps = "3"', "expected steps to be int")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(path)
