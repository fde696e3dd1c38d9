"""The cases that run under compute-sanitizer, in the interpreter: each path runs, and reaches its kernels."""

from dataclasses import replace

import pytest
import torch

from benchmarks import gpu_sanitize
from flexmsa.kernels.triton.common.launch import Launch
from flexmsa.testing import Case, Schedule

SMALL = Case(1, 1, 2, 16, 16, 12, 150, 16, 2, kv_lens=(145,), kv_starts=(3,), dtype="float32")
CACHE = Schedule((("append", (20, 17)), ("append", (2, 0))), block_size=16, head_dim=16, dtype="bfloat16")
LOSS = {"block_lse_kernel", "index_lse_kernel", "index_loss_kernel"}
PATHS = {
    "selection": (lambda: gpu_sanitize.select(SMALL), {"selection_kernel"}),
    "forward": (lambda: gpu_sanitize.train(SMALL, "forward"), {"query_major_kernel", "key_major_kernel"}),
    "few queries": (lambda: gpu_sanitize.train(SMALL, "forward", few=True), {"attend_kernel"}),
    "backward": (lambda: gpu_sanitize.train(SMALL, "backward"), {"gradient_kernel", "sum_slots_kernel"}),
    "warm-up": (lambda: gpu_sanitize.train(replace(SMALL, topk=None), "backward"), {"gradient_kernel"}),
    "index loss": (lambda: gpu_sanitize.train(SMALL, "index loss"), LOSS),
    "together": (lambda: gpu_sanitize.train_together(SMALL), {"selection_kernel", "gradient_kernel"}),
    "pages": (lambda: gpu_sanitize.serve(replace(CACHE, paged=True)), {"append_kernel", "attend_kernel"}),
    "e4m3": (lambda: gpu_sanitize.serve(replace(CACHE, fp8_keys=True, index_dtype="float8_e4m3fn")), {"attend_kernel"}),
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_reaches_its_kernels(name, monkeypatch):
    run, launched = Launch.run, set()

    def noted(launch):
        launched.add(launch.kernel.fn.__name__)
        run(launch)

    monkeypatch.setattr(Launch, "run", noted)
    monkeypatch.setattr(gpu_sanitize, "DEVICE", "cpu")
    call, expected = PATHS[name]
    # Twice, the second time in memory that is filled with NaN before use.
    gpu_sanitize.check_bits(call)
    assert expected <= launched


def test_what_depends_on_memory_that_nothing_was_written_to_is_found():
    with pytest.raises(AssertionError, match="result 1 depends on memory"):
        gpu_sanitize.check_bits(lambda: [torch.ones(2), torch.empty(1 << 20)])


def test_one_half_of_the_tokens_choose_alike(monkeypatch):
    monkeypatch.setattr(gpu_sanitize, "DEVICE", "cpu")
    ids = gpu_sanitize.blocks(gpu_sanitize.LAYERS["Triton"])
    alike, random = ids[0, 0, :24], ids[0, 0, 24:]
    assert (alike == alike[0]).all() and len(random.unique(dim=0)) > 20
