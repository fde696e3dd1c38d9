"""The parts of the benchmarks that need no GPU."""

import doctest
import json
import sys
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

import flexmsa
from benchmarks import (
    cpu_plot,
    distributed_plot,
    gpu,
    gpu_model,
    gpu_peer_steps,
    gpu_peers,
    gpu_plot,
    gpu_sanitize,
    gpu_shares,
    gpu_tables,
    pictures,
    sanitizer_reports,
)
from benchmarks.distributed import Heads, share
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


def test_a_part_keeps_its_rows_until_the_first_new_one(tmp_path):
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


def test_only_the_checks_of_the_parts_run_and_each_once(monkeypatch):
    ran = []

    def errors():
        ran.append("decode")
        return iter(())

    parts = {"decode": (None, (errors,)), "chunks": (None, (errors,)), "flex": (None, (None,))}
    monkeypatch.setattr(gpu, "PARTS", parts)
    assert gpu.check(["decode", "chunks"])
    assert ran == ["decode"]


def test_nothing_is_timed_if_a_check_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "PARTS", {"decode": (None, (lambda: iter(["off by one"]),))})
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path)])
    assert not (tmp_path / "gpu.json").exists()


def test_each_part_keeps_the_ceilings_of_its_run(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "environment", lambda: {"gpu": "GPU"})
    for part, flops in (("decode", 1e12), ("flex", 2e12), ("decode", 3e12)):
        times = {name: (lambda run: run.report("a step", 1.5, 1e12 / run.flops), ()) for name in gpu.PARTS}
        monkeypatch.setattr(gpu, "PARTS", times)
        monkeypatch.setattr(gpu, "ceilings", lambda flops=flops: (flops, 1e12))
        gpu.main(["--out", str(tmp_path), "--only", part])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: run["flops"] for name, run in found["parts"].items()} == {"decode": 3e12, "flex": 2e12}
    floors = [(row["part"], row["floor_ms"]) for row in found["rows"]]
    assert floors == [("flex", 0.5), ("decode", pytest.approx(1 / 3))]


def test_a_peer_that_is_not_installed_is_skipped(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fla", None)
    assert gpu_peers.parallel_nsa() is None
    assert "pip install flash-linear-attention" in capsys.readouterr().out


def test_relative_error_finds_one_wrong_head_but_ignores_rounding():
    exact = torch.randn(1, 64, 50, 128)
    exact[:, :, 0] *= 1e-6
    assert gpu_peers.relative_error(exact.bfloat16(), exact) < 2e-2
    wrong = exact.bfloat16()
    wrong[0, 5, 7] = 0
    assert gpu_peers.relative_error(wrong, exact) > 2e-2
    wrong[0, 5, 7] = torch.nan
    assert not gpu_peers.relative_error(wrong, exact) < 2e-2


def test_the_error_of_a_peer_replaces_its_times():
    def attend(q, k, v):
        raise ValueError("no such shape")

    inputs = tuple(torch.zeros(1, 1, 2, 4) for _ in range(3))
    found = dict(gpu_peers.times(attend, inputs, inputs[0], lambda call: call()))
    assert found == dict.fromkeys(("forward", "backward"), "ValueError: no such shape")


def test_the_table_of_peers(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    results = Results(tmp_path / "gpu-h200.json")
    results.begin("peers", {"gpu": "a GPU", "driver": "1", "torch": "2", "triton": "3"})
    measured = [(8192, "forward", 1.25), (8192, "backward", "OutOfMemoryError"), (32768, "forward", 4.0)]
    for seqlen, direction, ms in measured:
        results.add("peers", {"name": f"peers {seqlen}: dense flash, every block, {direction}", "ms": ms})
    head, _, row = gpu_tables.gpu_peers().splitlines()
    assert head == "| forward / backward, ms | attends to | 8K | 32K |"
    assert row == "| dense flash | every block | 1.2 / - | 4.0 / - |"


def small_layer():
    """q, k, v, index_q, index_k of 2/1 heads and 384 tokens."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, 384, 128, generator=generator) for heads in (2, 1, 1, 1, 1))


@pytest.fixture
def fake_flash_msa(monkeypatch):
    """A package with the peer's functions, made of ours."""
    package, selecting = ModuleType("flash_msa"), ModuleType("flash_msa.msa_select_cutedsl")

    def flash_msa_func(index_q, index_k, q, k, v, topk, scale):
        aux = flexmsa.AuxRequest(index_loss=True)
        sizes = {"block_size": 128, "topk": topk // 128, "scale": scale}
        out, found = flexmsa.attention(q, k, v, index_q, index_k, **sizes, return_aux=aux)
        return out.transpose(1, 2).flatten(2), found.index_loss

    def select_blocks(index_q, index_k, scale, num_blocks, top_k_blocks):
        ids = flexmsa.select_blocks(index_q, index_k, block_size=128, topk=top_k_blocks)
        return ids.where(ids >= 0, num_blocks).flip(-1)

    package.flash_msa_func, selecting.select_blocks = flash_msa_func, select_blocks
    monkeypatch.setitem(sys.modules, "flash_msa", package)
    monkeypatch.setitem(sys.modules, "flash_msa.msa_select_cutedsl", selecting)
    monkeypatch.setattr(gpu_peer_steps, "version", lambda name: "0.1.1")
    return package


def test_flash_msa_is_compared_before_it_is_timed(monkeypatch, fake_flash_msa, capsys):
    monkeypatch.setattr(gpu_peer_steps, "layer_inputs", lambda *sizes: small_layer())
    ticks = iter((2.0, 30.0))

    def timer(step):
        step()
        return next(ticks)

    rows = list(gpu_peer_steps.step_times(lambda seqlen: timer, {(2, 1): (384,)}))
    assert rows == [("step 2/1, 384: flexmsa", 2.0, {}), ("step 2/1, 384: flash-msa 0.1.1", 30.0, {"ratio": 15.0})]
    assert capsys.readouterr().out == ""


def test_flash_msa_with_a_wrong_gradient_is_not_timed(monkeypatch, fake_flash_msa, capsys):
    right = fake_flash_msa.flash_msa_func

    def wrong(index_q, index_k, q, k, v, *numbers):
        return right(index_q, index_k, q, k, 1.01 * v, *numbers)

    monkeypatch.setattr(fake_flash_msa, "flash_msa_func", wrong)
    monkeypatch.setattr(gpu_peer_steps, "layer_inputs", lambda *sizes: small_layer())
    rows = list(gpu_peer_steps.step_times(lambda seqlen: lambda step: 2.0, {(2, 1): (384,)}))
    assert [name for name, _, _ in rows] == ["step 2/1, 384: flexmsa"]
    assert "does not agree with ours: out is off by 1.0e-02" in capsys.readouterr().out


def test_flash_msa_with_another_selection_is_reported(fake_flash_msa):
    peer = gpu_peer_steps.flash_msa()
    wrong = peer._replace(select=lambda *index: peer.select(*index).clamp(max=1))
    assert "of the blocks are the same" in next(gpu_peer_steps.disagreements(wrong, small_layer()))


def test_without_flash_msa_its_row_is_skipped(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flash_msa", None)
    monkeypatch.setattr(gpu_peer_steps, "layer_inputs", lambda *sizes: small_layer())
    rows = list(gpu_peer_steps.step_times(lambda seqlen: lambda step: 2.0, {(2, 1): (384,)}))
    assert [name for name, _, _ in rows] == ["step 2/1, 384: flexmsa"]
    assert "pip install flash-msa" in capsys.readouterr().out


def test_the_table_of_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    results = Results(tmp_path / "gpu-h200.json")
    results.add("peers", {"name": "peers 8192: dense flash, every block, forward", "ms": 1.0})
    assert gpu_tables.gpu_peer_steps() == ""
    for name, ms in (("64/4, 8192: flexmsa", 2.0), ("64/4, 8192: flash-msa", 30.0), ("32/8, 32768: flexmsa", 4.0)):
        results.add("peers", {"name": f"step {name}", "ms": ms})
    assert gpu_tables.gpu_peer_steps().splitlines()[2:] == [
        "| 64/4 | 8K | 2.0 | 30.0 (15.0x) |",
        "| 32/8 | 32K | 4.0 | - |",
    ]


SUMMARIES = {
    "memcheck": ("========= ERROR SUMMARY: 0 errors", "========= ERROR SUMMARY: 2 errors"),
    "racecheck": (
        "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
        "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)",
    ),
}


@pytest.mark.parametrize("tool", SUMMARIES)
def test_what_a_sanitizer_says(tool):
    clean, dirty = SUMMARIES[tool]
    assert gpu_sanitize.verdict(0, clean, tool) == ""
    assert gpu_sanitize.verdict(0, dirty, tool) == dirty.partition("SUMMARY: ")[2]
    assert gpu_sanitize.verdict(1, clean, tool) == "exit code 1"
    assert gpu_sanitize.verdict(0, "no kernel ran", tool) == "the tool printed no summary"
    assert gpu_sanitize.verdict(0, "", gpu_sanitize.NONE) == ""


RACE = "========= Error: Race reported between Read access at k+0x10 in {}:{}\n=========     and Write access at k\n"
END = "========= \n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"


def test_reports_of_what_a_sanitizer_does_not_track_are_set_aside():
    """Only where the tool reports the control, and only if all places of a report are such."""
    known, other = (RACE.format(*at) for at in (min(sanitizer_reports.UNTRACKED["racecheck"]), ("other.py", 7)))
    assert gpu_sanitize.verdict(9, known + END, "racecheck", blind=True) == ""
    assert gpu_sanitize.verdict(9, known + END, "racecheck").startswith("1 reports: Error: Race")
    both = f"{known}========= \n{other}"
    assert gpu_sanitize.verdict(9, both + END, "racecheck", blind=True).startswith("1 reports: Error: Race")
    both = known.replace("and Write access at k", "and Write access at k in other.py:7")
    assert "1 reports" in gpu_sanitize.verdict(9, both + END, "racecheck", blind=True)


def test_reports_of_code_that_triton_makes_are_set_aside():
    made = RACE.format(*min(sanitizer_reports.GENERATED["racecheck"]))
    assert gpu_sanitize.verdict(9, made + END, "racecheck") == ""
    assert gpu_sanitize.verdict(9, made + RACE.format("other.py", 7) + END, "racecheck").startswith("1 reports")
    assert gpu_sanitize.verdict(9, made + END, "initcheck").startswith("1 reports")


def test_the_first_report_counts():
    """It follows the tool's own line."""
    start = "========= COMPUTE-SANITIZER\n"
    made = RACE.format(*min(sanitizer_reports.GENERATED["racecheck"]))
    assert gpu_sanitize.verdict(9, start + made + END, "racecheck") == ""
    assert gpu_sanitize.verdict(9, start + RACE.format("other.py", 7) + END, "racecheck").startswith("1 reports")


def test_reports_that_a_sanitizer_dropped():
    """They count, unless reports that are set aside filled its memory."""
    read = "========= Uninitialized __global__ memory read\n=========     at k+0x10 in {}:{}\n========= \n"
    known, other = (read.format(*at) for at in (min(sanitizer_reports.UNTRACKED["initcheck"]), ("other.py", 7)))
    dropped = (
        "========= Warning: Error buffer overflow has been detected.\n========= \n========= ERROR SUMMARY: 9 errors"
    )
    assert gpu_sanitize.verdict(9, known + dropped, "initcheck", blind=True) == ""
    assert "2 reports" in gpu_sanitize.verdict(9, known + dropped, "initcheck")
    assert "2 reports" in gpu_sanitize.verdict(9, known + other + dropped, "initcheck", blind=True)
    assert "1 reports" in gpu_sanitize.verdict(9, dropped, "initcheck", blind=True)


FAKE_TOOL = """#!/bin/sh
while [ "$1" != "-m" ]; do test "$1" = --tool && tool=$2; shift; done
test -n "$PYTORCH_NO_CUDA_MEMORY_CACHING" || exit 3
test "$tool-$4" = "racecheck-forward, few queries" && echo No attachable process found && exec sleep 100
test "$tool-$4" = "racecheck-forward" && echo "==== RACECHECK SUMMARY: 1 hazard displayed" && exit 9
echo "==== ERROR SUMMARY: 0 errors"
"""


@pytest.mark.parametrize(("tool", "code"), [("memcheck", 0), ("racecheck", 1)])
def test_a_report_of_a_sanitizer_fails_the_run(monkeypatch, tmp_path, capsys, tool, code):
    (tmp_path / "compute-sanitizer").write_text(FAKE_TOOL)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "executable", "/bin/true")
    assert gpu_sanitize.main(["--tools", tool, "--paths", "selection", "forward"]) == code
    printed = capsys.readouterr().out
    assert f"{tool:10} selection                clean" in printed
    assert ("racecheck  forward                  1 hazard displayed" in printed) == bool(code)


def test_a_sanitizer_that_does_not_reach_its_process_is_started_again(monkeypatch, tmp_path):
    (tmp_path / "compute-sanitizer").write_text(FAKE_TOOL)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    report = gpu_sanitize.run("forward, few queries", "racecheck", 0.5)
    assert report.wrong == "not finished after 0.5 s" and report.seconds > 0.5 * gpu_sanitize.ATTEMPTS


def test_a_path_that_fails_runs_under_no_tool(monkeypatch, tmp_path, capsys):
    (tmp_path / "compute-sanitizer").write_text(FAKE_TOOL)
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert gpu_sanitize.main(["--paths", "forward"]) == 1
    printed = capsys.readouterr().out
    assert "exit code 1" in printed and "memcheck" not in printed


def test_a_sanitizer_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", "")
    assert gpu_sanitize.main([]) == 2
    assert "compute-sanitizer of the CUDA toolkit" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_sanitize.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_the_table_of_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    results = Results(tmp_path / "gpu-h200.json")
    results.begin("model", {"gpu": "a GPU"})
    results.add("model", {"name": "model 32768: dense flash", "ms": "OutOfMemoryError", "gib": 8.0})
    results.add("model", {"name": "model 32768: dense cuDNN", "ms": 300.0, "gib": 9.0})
    assert gpu_tables.gpu_model() == ""
    ours = {"ms": 150.0, "gib": 9.5, "ratio": 2.0, "ratio_bar": 1.6, "gib_bar": 12.0}
    results.add("model", {"name": "model 32768: flexmsa", **ours})
    saved = {"ms": 100.0, "gib": 11.0, "ratio": 3.0, "ratio_bar": 1.6, "gib_bar": 12.0}
    results.add("model", {"name": "model 32768: flexmsa, attention saved", **saved})
    assert gpu_tables.gpu_model().splitlines()[2:] == [
        "| 32K | selection | - | 300 ms | 150 ms | 2.00x | 1.6 | 9.0 GiB | 9.5 GiB | 12 GiB |",
        "| 32K | attention | - | 300 ms | 100 ms | 3.00x | 1.6 | 9.0 GiB | 11.0 GiB | 12 GiB |",
    ]


def test_the_table_of_shares(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_tables, "RESULTS", tmp_path)
    results = Results(tmp_path / "gpu-h200.json")
    results.begin("shares", {"gpu": "a GPU"})
    results.add("training", {"name": "layer 8192: forward", "ms": 1.0})
    assert gpu_tables.gpu_shares() == ""
    results.add("shares", {"name": "shares 64/4/128, 1048576, plain: 1", "ms": 100.0, "gib": 40.0})
    half = {"name": "shares 64/4/128, 1048576, plain: 2", "ms": 52.0, "gib": 30.0, "ratio": 1.04, "ratio_bar": 1.05}
    results.add("shares", half)
    assert gpu_tables.gpu_shares().splitlines() == [
        "| heads | tokens | documents | 1 process, ms | 2 processes |",
        "| --- | --- | --- | --- | --- |",
        "| 64/4/128 | 1024K | plain | 100, 40 GiB | 52 (1.04), 30 GiB |",
    ]


def test_shares_are_checked_and_timed(monkeypatch):
    monkeypatch.setattr(gpu_shares, "PROCESSES", (2,))
    monkeypatch.setattr(gpu_shares, "LENGTHS", (30, 80))
    heads = Heads(4, 2, 16)
    assert list(gpu_shares.share_errors(heads, 60, world=2)) == []
    rows = {}
    gpu_shares.share_times(
        lambda name, ms, **more: rows.update({name: more}), lambda call: bool(call()), (20, 200), (heads,)
    )
    # 20 tokens are less than the first document.
    steps = "20, plain", "200, plain", "200, packed"
    assert list(rows) == [f"shares 4/2/16, {step}: {world}" for step in steps for world in (1, 2)]


def test_a_share_without_its_keys_is_found(monkeypatch):
    whole = gpu_shares.packed(200000)
    assert whole.tolist() == [0, 177404, 196608, 200000]
    monkeypatch.setattr(
        gpu_shares, "share", lambda tensors, shards: share([*tensors[:2], -tensors[2], *tensors[3:]], shards)
    )
    errors = "\n".join(gpu_shares.share_errors(Heads(4, 2, 16), 60))
    assert "shares, plain, out: off by" in errors and "shares, packed, grad q: off by" in errors


def test_crossover():
    dense = {1000: 1.0, 2000: 4.0, 4000: 16.0, 8000: 64.0}
    tokens, milliseconds = gpu_plot.crossover({n: 3.0 * n / 1000 for n in dense}, dense)
    assert (tokens, milliseconds) == (pytest.approx(3000), pytest.approx(9))
    assert gpu_plot.crossover({n: 4.0 * n / 1000 for n in dense}, dense) == (pytest.approx(4000), pytest.approx(16))
    assert gpu_plot.crossover({n: 0.5 * n / 1000 for n in dense}, dense) is None
    assert gpu_plot.crossover({n: 20.0 * n / 1000 for n in dense}, dense) is None


TINY = gpu_model.Shape(2, 32, 48, 4, 2, head_dim=8, block_size=8, topk=2, vocabulary=20, device="cpu")


def test_a_model_is_checked_and_timed(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(gpu_model, "BARS", {40: (1.5, 2.0)})
    rows = {}
    dense = {"flash": torch.nn.attention.SDPBackend.FLASH_ATTENTION}
    assert list(gpu_model.model_errors(TINY, layers=2, seqlen=60)) == []
    gpu_model.model_times(lambda name, ms, **more: rows.update({name: (ms, more)}), [40], TINY, dense)
    (dense_ms, _), (ms, more) = rows["model 40: dense flash"], rows["model 40: flexmsa"]
    assert more == {"gib": 0.0, "ratio": pytest.approx(dense_ms / ms), "ratio_bar": 1.5, "gib_bar": 2.0}
    lines = list(gpu_model.profile_lines(40, TINY, rows=1000))
    assert lines[0].startswith("one layer, 40 tokens: ")
    assert any("flexmsa::attention_and_index_loss_backward" in line for line in lines)


def test_a_wrong_gradient_of_a_model_is_found():
    pytest.importorskip("transformers")

    def wrong(shape):
        model = gpu_model.make_sparse(shape)
        model.lm_head.weight.requires_grad_(False)
        q_proj = model.model.layers[0].self_attn.q_proj.weight
        q_proj.register_hook(lambda grad: grad * (1.0 if model.flexmsa.loss_in_backward else 1.05))
        return model

    errors = "\n".join(gpu_model.model_errors(TINY, layers=1, seqlen=40, make=wrong))
    assert "lm_head.weight: no gradient" in errors
    assert "model, model.layers.0.self_attn.q_proj.weight: is off by" in errors


def test_a_model_is_skipped_without_transformers(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert list(gpu_model.model_errors(TINY)) == []
    gpu.time_model(gpu.Run(lambda *args, **more: pytest.fail("a row"), 1.0, 1.0, False, False))
    assert capsys.readouterr().out.count("pip install flexmsa[transformers]") == 2


def test_the_lines_are_the_sums_of_the_table():
    lines = gpu_plot.panel_lines(gpu_tables.gpu_rows().values())
    training, prefill = lines.values()
    assert list(training["random"]) == gpu_tables.layer_lengths()
    for pattern in gpu_plot.SPARSE:
        layer = gpu_tables.layer_times(32768, pattern)
        assert prefill[pattern][32768] == pytest.approx(layer["selection"] + layer["forward"])
        assert training["dense cuDNN"][32768] == pytest.approx(layer.pop("dense"))
        assert training[pattern][32768] == pytest.approx(sum(layer.values()))


def test_a_length_that_was_not_finished_is_not_drawn():
    rows = list(gpu_tables.gpu_rows().values())
    rows = [row for row in rows if row["name"] != "layer 524288: neighbours share, KL value and gradient"]
    training, prefill = gpu_plot.panel_lines(rows).values()
    assert max(training["random"]) == 131072
    assert max(prefill["random"]) == 524288


def test_the_picture_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    gpu_plot.draw(gpu_tables.gpu_rows().values(), "GPU", tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 10_000


def test_what_one_gpu_cannot_hold_has_a_dash(monkeypatch, tmp_path):
    found = gpu_tables.load_result("distributed-h200.json")
    for part in ("attention", "model"):
        found[part][0] |= {"one_ms": None, "efficiency": None}
    del found["decode"][0]["heads_us"]
    monkeypatch.setattr(gpu_tables, "load_result", lambda name: found)
    assert "| 2 | - |" in gpu_tables.gpu_processes() and "- ms on one GPU" in gpu_tables.gpu_processes()
    assert " | - | " in gpu_tables.gpu_processes_decode().splitlines()[2]
    pytest.importorskip("matplotlib")
    distributed_plot.draw(found, tmp_path / "processes.png")


def test_the_pictures_of_the_documents_are_drawn_from_the_results(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("transformers")
    pictures.main(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    quality = {f"quality-{name}.png" for name in ("positions", "retrieval", "recalls", "budgets")}
    others = {"gpu.png", "gpu-processes.png", "cpu.png", "conversion-ways.png", "conversion-index.png"}
    assert drawn == quality | others
    assert drawn <= {path.name for path in (gpu_tables.ROOT / "docs" / "images").iterdir()}
    assert doctest.testmod(cpu_plot) == (0, 1)


@pytest.mark.parametrize(
    ("lengths", "hidden", "said"),
    [(1, "nothing", "two lengths or more"), (5, "matplotlib.figure", "pip install flexmsa[plot]")],
)
def test_why_there_is_no_picture(lengths, hidden, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, hidden, None)
    drawn = tuple(f"layer {n}: " for n in gpu_tables.layer_lengths()[:lengths])
    rows = [row for name, row in gpu_tables.gpu_rows().items() if name.startswith(drawn)]
    gpu_plot.draw_if_possible(rows, "GPU", tmp_path / "gpu.png")
    assert said in capsys.readouterr().out
    assert not (tmp_path / "gpu.png").exists()
