"""The benchmarks, as far as they need no GPU."""

import json
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu, gpu_peers, tables
from benchmarks.gpu_results import Results


def _run(path, parts, gpu, row_names):
    results = Results(path)
    for part in parts:
        results.begin(part, {"gpu": gpu})
        for name in row_names:
            results.add(part, {"name": name})
    return json.loads(path.read_text())


def test_a_part_replaces_its_own_rows_only(tmp_path):
    path = tmp_path / "gpu.json"
    _run(path, ["selection", "decode"], "first", ["a", "b"])
    found = _run(path, ["selection"], "second", ["c"])
    rows = [(row["part"], row["name"]) for row in found["rows"]]
    assert rows == [("decode", "a"), ("decode", "b"), ("selection", "c")]
    assert found["parts"] == {"selection": {"gpu": "second"}, "decode": {"gpu": "first"}}


def test_a_part_keeps_its_rows_until_there_is_a_new_one(tmp_path):
    path = tmp_path / "gpu.json"
    before = _run(path, ["selection"], "first", ["a"])
    Results(path).begin("selection", {"gpu": "second"})
    assert json.loads(path.read_text()) == before


def test_rows_of_unknown_parts_are_refused(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"gpu": "old", "rows": [{"name": "a"}]}')
    with pytest.raises(SystemExit, match="move this older file away"):
        Results(path)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], list(gpu.PARTS)),
        (["--quick"], list(gpu.QUICK)),
        (["--only", "flex", "decode", "flex"], ["decode", "flex"]),
        (["--quick", "--only", "prefill"], ["prefill"]),
    ],
)
def test_which_parts_run(arguments, parts):
    assert gpu.parse(arguments)[1] == parts


def test_an_unknown_part_is_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parse(["--only", "sorting"])
    said = capsys.readouterr().err
    assert all(part in said for part in gpu.PARTS)


def test_only_what_a_part_times_is_checked_and_each_check_once(monkeypatch):
    ran = []

    def errors():
        ran.append("decode")
        return iter(())

    parts = {"decode": (None, (errors,)), "chunks": (None, (errors,)), "flex": (None, (None,))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.check(["decode", "chunks"])
    assert ran == ["decode"]


def test_nothing_is_timed_where_a_check_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PARTS", {"decode": (None, (lambda: iter(["off by one"]),))})
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert not (tmp_path / "gpu.json").exists()


def test_a_peer_that_is_not_installed_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fla", None)
    assert gpu_peers.parallel_nsa() is None
    assert "pip install flash-linear-attention" in capsys.readouterr().out


def test_one_wrong_head_of_a_token_shows_and_rounding_does_not():
    exact = torch.randn(1, 64, 50, 128)
    exact[:, :, 0] *= 1e-6
    assert gpu_peers.relative_error(exact.bfloat16(), exact) < 2e-2
    wrong = exact.bfloat16()
    wrong[0, 5, 7] = 0
    assert gpu_peers.relative_error(wrong, exact) > 2e-2
    wrong[0, 5, 7] = torch.nan
    assert not gpu_peers.relative_error(wrong, exact) < 2e-2


def test_a_peer_that_fails_says_so_and_the_others_go_on():
    def attend(q, k, v):
        raise ValueError("no such shape")

    inputs = tuple(torch.zeros(1, 1, 2, 4) for _ in range(3))
    found = dict(gpu_peers.times(attend, inputs, inputs[0], lambda call: call()))
    assert found == dict.fromkeys(("forward", "backward"), "ValueError: no such shape")


def test_the_table_of_peers(monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.gpu_peers() == ""
    results = Results(tmp_path / "gpu-peers.json")
    results.begin("peers", {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3"})
    measured = [(8192, "forward", 1.25), (8192, "backward", "OutOfMemoryError"), (32768, "forward", 4.0)]
    for seqlen, direction, ms in measured:
        results.add("peers", {"name": f"peers {seqlen}: dense flash, every block, {direction}", "ms": ms})
    machine, _, head, _, row = tables.gpu_peers().splitlines()
    assert machine == "a GPU, driver 1, torch 2, triton 3."
    assert head == "| forward / backward, ms | attends to | 8K | 32K |"
    assert row == "| dense flash | every block | 1.2 / - | 4.0 / - |"
