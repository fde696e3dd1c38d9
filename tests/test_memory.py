"""Peak memory grows linearly with the length."""

import subprocess
import sys
from pathlib import Path

import pytest

_PROBE = """
import sys, torch, flexmsa
torch.set_num_threads(1)
seqlen, topk, train = int(sys.argv[1]), None if sys.argv[2] == "None" else int(sys.argv[2]), sys.argv[3] == "train"
def high_water():
    # getrusage would start with the peak of the parent process.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
def run(seqlen):
    q, k, v, iq, ik = (torch.randn(1, h, seqlen, 16, requires_grad=train) for h in (2, 1, 1, 1, 1))
    before = high_water()
    aux = flexmsa.AuxRequest(index_loss=True)
    out, aux = flexmsa.attention(q, k, v, iq, ik, block_size=64, topk=topk, return_aux=aux)
    if train:
        (out.sum() + aux.index_loss).backward()
    return high_water() - before
run(512)
print(run(seqlen))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, which reports peak memory")
@pytest.mark.parametrize(("topk", "mode"), [("8", "forward"), ("8", "train"), ("None", "train")])
def test_peak_memory_is_linear_in_the_length(topk, mode):
    def peak(seqlen):
        run = [sys.executable, "-c", _PROBE, str(seqlen), topk, mode]
        return float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)

    seqlen = 8192
    square = seqlen * seqlen * 4 / 2**20
    output = seqlen * 2 * 16 * 4 / 2**20
    short, long = peak(seqlen), peak(2 * seqlen)
    assert output < short < square / 2
    # A quadratic part would make the long one four times the short one.
    assert long < 2.5 * short + 16
