"""The testing tools for users find errors and report them."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flexmsa import __main__, ops, reference
from flexmsa.testing import Case, assert_close, check_case, fuzz
from flexmsa.testing.check import teacher_term


def test_assert_close_reports_an_error_and_its_index():
    exact = torch.zeros(2, 3, dtype=torch.float64)
    wrong = torch.zeros(2, 3)
    wrong[1, 2] = 0.5
    with pytest.raises(AssertionError, match=r"out: got 0.5 for 0 at \(1, 2\)"):
        assert_close("out", wrong, exact, exact.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_assert_close_requires_finite_numbers(bad):
    exact = torch.ones(3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="1 such elements"):
        assert_close("x", torch.tensor([1.0, bad, 1.0]), exact, exact.float())


def test_assert_close_requires_the_same_infinity():
    exact = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert_close("lse", exact.float(), exact, exact.float())
    with pytest.raises(AssertionError):
        assert_close("lse", torch.tensor([0.0, 1.0]), exact, exact.float())


def test_check_finds_a_bug_and_prints_it_as_code(monkeypatch, capsys):
    from flexmsa.kernels import torch as torch_kernels

    forward = torch_kernels.attend_blocks

    def broken(q, k, v, block_indices, sequences, block_size, scale, *cache):
        out, lse = forward(q, k, v, block_indices, sequences, block_size, scale, *cache)
        if q.shape[1] // k.shape[1] == 3 and not cache:
            out = out * 1.001
        return out, lse

    monkeypatch.setattr(torch_kernels, "attend_blocks", broken)
    assert fuzz.main(["--device", "cpu", "--seconds", "60"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED: AssertionError: out: got" in printed
    code = printed[printed.index("check_case(Case(") :].strip()
    with pytest.raises(AssertionError, match="out: got"):
        eval(code, {"Case": Case, "check_case": check_case})


def test_check_prints_the_cases_it_tried(capsys):
    assert fuzz.main(["--device", "cpu", "--seconds", "2", "--dtype", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "every case agreed with the oracle" in printed and "bfloat16" in printed
    assert "\r" not in printed


def test_check_says_nothing_of_cases_that_it_did_not_try(monkeypatch, capsys):
    monkeypatch.setattr(fuzz._Progress, "seconds_left", 0.0)
    assert fuzz.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "no case was compared to its end" in printed and "agreed" not in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seconds", "0"], "--seconds: expected more than 0, got 0"),
        (["--seconds", "nan"], "--seconds: expected more than 0, got nan"),
        (["--device", "meta"], "--device: expected a device of this machine, got meta"),
        pytest.param(
            ["--device", "cuda"],
            "--device: expected a device of this machine, got cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU"),
        ),
        (["--device", "cpu", "--backend", "abacus"], "--backend: expected None or one of"),
        (["--device", "cpu", "--backend", "flex"], "--backend: FlexAttention on a CPU computes no gradient"),
        pytest.param(
            ["--device", "cpu", "--backend", "triton"],
            "--backend='triton' runs on CUDA tensors, got cpu",
            marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs it"),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_check_cannot_do_is_a_usage_error_of_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        fuzz.main(options)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith(f"python -m flexmsa check: {message}")


def test_check_prints_a_summary_when_interrupted(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(fuzz, "check_case", interrupted)
    assert fuzz.main(["--device", "cpu", "--seconds", "60"]) == 1
    printed = capsys.readouterr().out
    assert "stopped" in printed and "1 cases of 1 shapes" in printed and "agreed" not in printed


class TwoShapes:
    """In place of the processes that compile."""

    keys = ("compiled",)

    def __init__(self, shapes, target, processes):
        self.ready = []
        self._shapes = [next(shapes), replace(next(shapes), dtype="float32"), replace(next(shapes), topk=3)]

    def advance(self):
        pass

    def wait(self, seconds):
        self.ready = self._shapes

    def stop(self):
        self.ready = None


def test_many_cases_share_the_shapes_that_are_compiled(monkeypatch, capsys):
    pytest.importorskip("triton")
    from flexmsa.kernels.triton.common import launch, target
    from flexmsa.testing import ahead

    def kernel():
        pass

    monkeypatch.setattr(fuzz, "_describe", lambda *arguments: True)
    monkeypatch.setattr(fuzz, "GPU_LENGTHS", {"max_tokens": 20})
    monkeypatch.setattr(fuzz, "_ROUND", 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(target, "target_of", lambda device: target.Target("cuda", 90, 132))
    monkeypatch.setattr(launch, "compiled_keys", lambda: {"compiled", (kernel, 1)})
    monkeypatch.setattr(ahead, "Ahead", TwoShapes)
    tried = []
    monkeypatch.setattr(fuzz, "check_case", lambda case, **options: tried.append(case))
    assert fuzz.main(["--device", "cpu", "--seconds", "2"]) == 0
    rounds = {shape: sum(case.shape == shape for case in tried) for shape in {case.shape for case in tried}}
    assert len(rounds) == 3 and max(rounds.values()) - min(rounds.values()) <= 4
    printed = capsys.readouterr().out
    assert f"{len(tried)} cases of 3 shapes" in printed
    assert "1 kernels compiled ahead; 1 when they were launched: kernel" in printed


def test_after_an_illegal_access_the_first_failing_case_is_printed(monkeypatch, capsys):
    tried = []

    def broken(case, **options):
        tried.append(case)
        if len(tried) > 3:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(fuzz, "check_case", broken)
    monkeypatch.setattr(fuzz, "_is_lost", lambda device: True)
    assert fuzz.main(["--device", "cpu", "--seconds", "60"]) == 1
    assert len(tried) == 4
    assert repr(tried[3]) in capsys.readouterr().out


def test_on_a_gpu_the_numpy_oracle_checks_some_small_cases():
    options = SimpleNamespace(device="cuda", backend=None)
    small, large = Case(seqlen_q=20, seqlen_k=20), Case(seqlen_q=500, seqlen_k=500)
    chosen = [fuzz._arguments(replace(small, seed=seed), options)["numpy_oracle"] for seed in range(80)]
    assert sum(chosen) == 10
    assert not fuzz._arguments(large, options)["numpy_oracle"]
    assert fuzz._arguments(replace(small, topk=None), options)["backend"] == "triton"


CASES = {
    "given": Case(ids="given", seqlen_q=40, seqlen_k=40, num_kv_heads=2, topk=3),
    "in the backward": Case(deferred=True, seqlen_q=40, seqlen_k=40),
    "NaN": Case(values="unseen NaN", seqlen_q=9, seqlen_k=40, kv_starts=(3,), kv_lens=(30,)),
    "infinities": Case(values="odd scores", seqlen_q=40, seqlen_k=40, topk=1),
    "huge": Case(values="huge", seqlen_q=40, seqlen_k=40, group_size=3),
    "shifted": Case(offset=1, strided=True, seqlen_q=40, seqlen_k=40, scale=-0.3, index_scale=0.3),
    "without the lse": Case(lse_gradient=False, values="zeros", seqlen_q=40, seqlen_k=40, topk=None),
}


@pytest.mark.parametrize("numpy_oracle", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_cases_of_every_kind_pass(case, numpy_oracle):
    check_case(case, numpy_oracle=numpy_oracle)


def test_the_reference_finds_a_wrong_selection(monkeypatch):
    case = Case(seqlen_q=60, seqlen_k=60, topk=1, num_init_blocks=0)
    select = ops.select_blocks
    monkeypatch.setattr(ops, "select_blocks", lambda *arguments: select(*arguments).clamp(max=2))
    with pytest.raises(AssertionError, match=r"block_indices: got \[2\] for \[3\]"):
        check_case(case, numpy_oracle=False)


@pytest.mark.parametrize("values", ["normal", "huge"])
def test_a_wrong_gradient_is_found_without_the_oracle(monkeypatch, values):
    from flexmsa.kernels import torch as torch_kernels

    backward = torch_kernels.block_sparse_attention_backward

    def broken(*arguments):
        grad_q, grad_k, grad_v = backward(*arguments)
        grad_k[:, :, 7] = 0
        return grad_q, grad_k, grad_v

    monkeypatch.setattr(torch_kernels, "block_sparse_attention_backward", broken)
    case = Case(seqlen_q=60, seqlen_k=60, values=values, dtype="bfloat16")
    with pytest.raises(AssertionError, match="gradient of k: got 0 for"):
        check_case(case, numpy_oracle=False)


@pytest.mark.parametrize("rows", [1, 6, 400])
def test_the_loss_may_be_off_by_the_rounding_of_the_teacher(rows):
    """P in float16, as the backward leaves it; the other rounding errors of the loss are far smaller."""
    case, lse = Case(group_size=4), torch.zeros(rows * 4)
    torch.manual_seed(rows)
    shares = []
    for _ in range(200):
        teacher, student = (torch.randn(rows, 3, dtype=torch.float64) * size for size in (0.3, 3))
        teacher, student = teacher.softmax(-1), student.softmax(-1)
        rounded = (teacher * 2**15).half().double() / 2**15
        exact, loss = ((p * (p / student).log() + student - p).sum(-1).mean() for p in (teacher, rounded))
        allowed = 8 * torch.finfo(torch.float32).eps * teacher_term(case, lse, exact)
        shares.append(float((loss - exact).abs()) / allowed)
    assert 0.1 < max(shares) < 1


def test_inputs_are_laid_out_as_the_case_says():
    case = Case(2, 2, 3, 16, 16, 5, 7, strided=True, offset=1)
    for x in case.inputs("cpu")[0]:
        assert x.storage_offset() == 1 and x.stride(1) == 24 and not x.is_contiguous()
    hidden = replace(case, values="unseen NaN", kv_starts=(1, 0), kv_lens=(4, 7)).inputs("cpu")[0]
    for x in (*hidden[1:3], hidden[4]):
        assert x[0].isnan().all(-1).all(0).tolist() == [True, False, False, False, True, True, True]
        assert not x[1].isnan().any()


def test_garbage_is_out_of_range_and_ignored_by_the_reference():
    case = Case(seqlen_q=200, seqlen_k=200, topk=4, ids="garbage")
    ids = case.block_indices("cpu")
    blocks = 13
    wrong = (ids < -1) | (ids >= blocks)
    assert 0.1 < wrong.float().mean() < 0.4 and (ids == blocks).any()
    q, k, v, _, _ = case.inputs("cpu")[0]
    end = torch.arange(1, 201)[None]
    rest = torch.zeros_like(end), end, 16, 0.25
    found, expected = (reference.block_sparse_attention(q, k, v, x, *rest) for x in (ids, ids.masked_fill(wrong, -1)))
    assert torch.equal(found[0], expected[0])


def test_check_without_hypothesis_prints_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for name in [name for name in sys.modules if name.startswith("flexmsa.testing")]:
        monkeypatch.delitem(sys.modules, name)
    assert __main__.main(["check"]) == 1
    assert "pip install 'flexmsa[test]'" in capsys.readouterr().err
