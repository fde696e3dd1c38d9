"""A forward pass holds nothing that grows with the square of the length."""

import subprocess
import sys
from pathlib import Path

import pytest

_PROBE = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from integrations.device import DEVICE
from integrations.m3 import make_m3, tokens
torch.set_num_threads(1)
model = make_m3(
    sys.argv[1], num_hidden_layers=2, layer_types=["full_attention", "minimax_m3_sparse"],
    mlp_layer_types=["dense", "dense"], num_attention_heads=2, num_key_value_heads=1,
    index_n_heads=1, index_block_size=128, index_topk_blocks=8,
)
def high_water():
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / (1 << 20)
    # Not getrusage's, which starts with the parent's.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
def peak(length):
    before = high_water()
    with torch.no_grad():
        mask = None
        if sys.argv[3] == "gap":
            mask = torch.ones(1, length, device=DEVICE)
            mask[:, length // 3 : length // 2] = 0
        model(tokens(1, length), attention_mask=mask, logits_to_keep=1, use_cache=False)
    return high_water() - before
peak(512)
print(*(peak(int(length)) for length in sys.argv[4:]))
"""


def peaks(implementation, *lengths, padding="none"):
    """By how many MiB each length raises the most memory that the process ever held."""
    arguments = [implementation, str(Path(__file__).parents[1]), padding, *map(str, lengths)]
    run = subprocess.run([sys.executable, "-c", _PROBE, *arguments], capture_output=True, text=True, check=True)
    return [float(part) for part in run.stdout.split()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process held")
@pytest.mark.parametrize("padding", ["none", "gap"])
def test_peak_memory_is_linear_in_the_length(padding):
    first, second = peaks("flexmsa", 16384, 32768, padding=padding)
    # One bool for each query and key would be 1024 MiB.
    assert first + second < 400
    assert second < 1.5 * first + 16


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells how much memory a process held")
def test_the_eager_path_is_not():
    first, second = peaks("eager", 1024, 2048)
    assert second > 2 * first
