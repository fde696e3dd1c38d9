"""The testing tools for users find errors and report them."""

import sys

import pytest
import torch

from flexmsa import __main__
from flexmsa.testing import Case, assert_close, check_case, fuzz


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

    forward = torch_kernels.block_sparse_attention_forward

    def broken(q, k, v, block_indices, sequences, block_size, scale):
        out, lse = forward(q, k, v, block_indices, sequences, block_size, scale)
        if q.shape[1] // k.shape[1] == 3:
            out = out * 1.001
        return out, lse

    monkeypatch.setattr(torch_kernels, "block_sparse_attention_forward", broken)
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


def test_check_without_hypothesis_prints_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    for name in [name for name in sys.modules if name.startswith("flexmsa.testing")]:
        monkeypatch.delitem(sys.modules, name)
    assert __main__.main(["check"]) == 1
    assert "pip install 'flexmsa[test]'" in capsys.readouterr().err
