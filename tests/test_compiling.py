"""`warm_up` and its command: what they accept, what they say without a GPU, and how the command shows its progress."""

import pytest
import torch

import flexmsa
from flexmsa import __main__, compiling

SHAPE = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64}
COMMAND = ["warm-up", "--num-heads", "4", "--num-kv-heads", "2", "--head-dim", "64"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"torch finds none|Triton is not installed"):
        flexmsa.warm_up(**SHAPE)
    assert __main__.main(COMMAND) == 1
    assert capsys.readouterr().err.startswith("warm_up compiles ")


def test_the_interpreter_has_nothing_to_compile(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interprets"):
        flexmsa.warm_up(**SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 3}, "num_heads"),
        ({"topk": 0}, "topk"),
        ({"block_size": 0}, "block_size"),
        ({"dtype": torch.float64}, "dtype"),
        ({"cache_dtype": torch.float32}, "cache_dtype"),
        ({"cache_dtype": torch.int8}, "cache_dtype"),
        ({"index_dtype": torch.bfloat16}, "index_dtype"),
    ],
)
def test_a_wrong_shape_raises_on_every_machine(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        flexmsa.warm_up(**SHAPE | change)


def test_the_command_passes_on_what_it_was_given(monkeypatch, capsys):
    given = {}

    def warm_up(report, **options):
        given.update(options)
        for done, name in enumerate(("selection_kernel", "combine_kernel"), 1):
            report(done, 2, name)
        return 2

    monkeypatch.setattr(compiling, "warm_up", warm_up)
    dtypes = "--cache-dtype", "float8_e4m3fn", "--index-dtype", "int8"
    assert __main__.main([*COMMAND, "--decoding", "--no-training", *dtypes]) == 0
    cache = {"decoding": True, "training": False, "cache_dtype": torch.float8_e4m3fn, "paged": False}
    cache["index_dtype"] = torch.int8
    assert given.items() >= {**SHAPE, **cache, "index_head_dim": None, "dtype": torch.bfloat16}.items()
    shown = capsys.readouterr()
    assert shown.out == "2 kernels are ready\n" and "2/2" in shown.err and "combine_kernel" in shown.err


def test_ctrl_c_ends_the_command(monkeypatch, capsys):
    def warm_up(report, **options):
        report(1, 2, "selection_kernel")
        raise KeyboardInterrupt

    monkeypatch.setattr(compiling, "warm_up", warm_up)
    assert __main__.main(COMMAND) == compiling.INTERRUPTED
    assert "stopped" in capsys.readouterr().err
