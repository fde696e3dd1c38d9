"""Candidates for every GPU, and what tuning says where it cannot run."""

import os
from dataclasses import replace

import pytest
import torch

import flexmsa

triton = pytest.importorskip("triton")

from flexmsa.kernels.problem import Problem  # noqa: E402
from flexmsa.kernels.triton.common import target as targets  # noqa: E402
from flexmsa.kernels.triton.tuning.tasks import TASKS  # noqa: E402
from flexmsa.testing.launches import TARGETS  # noqa: E402

TUNABLE = {task.name: task.tunable for task in TASKS}
SHAPES = [(16, 4, 128, 128), (4, 8, 64, 64), (1, 2, 256, 48), (3, 1, 80, 512)]
EXPONENTS = ("rows", "columns", "num_warps", "period", "query_major_rows", "query_major_columns", "query_major_warps")


def lists(target, group_size, num_kv_heads, head_dim, block_size, dtype):
    """(task, shipped configuration, candidates) of every task."""
    problem = Problem(num_kv_heads, dtype, group_size, head_dim, head_dim, block_size, topk=16, bulk_copies=False)
    for task in TASKS:
        lengths = (1, 16384, 16384) if task.name == "selection" else ()
        config = task.config.default_config(problem, target, *lengths)
        yield task.name, config, task.candidates(problem, target, config)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_candidates_are_valid(target, shape, dtype):
    group_size, num_kv_heads, _, block_size = shape
    for kernel, shipped, changes in lists(target, *shape, dtype):
        changes = list(changes)
        assert 4 <= len(changes) <= 24
        for change in changes:
            assert set(change) <= set(TUNABLE[kernel])
            config = replace(shipped, **change)
            assert config != shipped
            for name in EXPONENTS:
                value = getattr(config, name, 1)
                assert value > 0 and value & (value - 1) == 0, (change, name)
            assert max(config.num_warps, getattr(config, "query_major_warps", 1)) <= 16
            assert config.num_stages >= 1 and getattr(config, "query_major_stages", 1) >= 1
            if kernel == "selection":
                assert config.tokens(num_kv_heads) >= 1 and config.period <= config.kept
            if kernel == "forward":
                assert config.query_major_rows >= group_size and config.longest_union >= 1
                assert target.backend == "cuda" or config.max_registers is config.query_major_registers is None
            assert getattr(config, "columns", 1) <= targets.padded(block_size)
            assert getattr(config, "length", 16) >= 16


SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="torch finds no GPU"):
        flexmsa.autotune(**SIZES)
    with pytest.raises(RuntimeError, match="torch finds no GPU"):
        flexmsa.load_tuning(tmp_path / "tuned.json")
    shell = ["--num-heads=4", "--num-kv-heads=2", "--head-dim=16", f"--out={tmp_path / 'tuned.json'}"]
    assert flexmsa.tuning.main(shell) == 1
    assert "torch finds no GPU" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"num_heads": 5}, ValueError, "num_heads: expected a multiple of num_kv_heads=2, got 5"),
        ({"topk": None}, TypeError, "topk: expected an int, got NoneType"),
        ({"seqlen": 0}, ValueError, "seqlen: expected an int >= 1, got 0"),
        ({"dtype": torch.float64}, ValueError, "dtype: expected torch.bfloat16, .* got torch.float64"),
    ],
)
def test_bad_sizes(change, error, message):
    with pytest.raises(error, match=message):
        flexmsa.autotune(**{**SIZES, **change})
