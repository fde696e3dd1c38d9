"""The first training step of a fresh process on a GPU: with an empty cache of compiled kernels, and with a full one.

`python benchmarks/first_step.py` prints one line of JSON: seconds from the start of the process, and from the first
call, to the end of the first synchronized step of a layer (64/4 heads of 128, 8K tokens, bf16, with the index loss).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

HEADS, KV_HEADS, HEAD_DIM, TOKENS = 64, 4, 128, 8192


def step(started: float) -> dict[str, float]:
    """The seconds of this process's first step; started: when the process was."""
    import torch

    import flexmsa

    torch.zeros(1, device="cuda")
    imported = time.time()

    def vectors(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, TOKENS, HEAD_DIM, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    inputs = [vectors(heads) for heads in (HEADS, KV_HEADS, KV_HEADS, KV_HEADS, 1)]
    grad_out = torch.randn_like(inputs[0])

    def train() -> float:
        torch.cuda.synchronize()
        called = time.time()
        out, aux = flexmsa.attention(*inputs, return_aux=flexmsa.AuxRequest(index_loss=True))
        # A scalar, as in training: for a gradient that is given, torch.autograd.backward imports sympy.
        ((out * grad_out).sum() + aux.index_loss).backward()
        torch.cuda.synchronize()
        return time.time() - called

    first = train()
    ended = time.time()
    compiler = "torch._dynamo" in sys.modules
    return {
        "process_s": ended - started,
        "import_s": imported - started,
        "call_s": first,
        "second_call_s": train(),
        "imports_the_compiler": compiler,
    }


def measure(folder: str) -> dict[str, float]:
    """`step` in a fresh process, with Triton's cache in `folder`."""
    command = [sys.executable, __file__, "--started", str(time.time())]
    environment = os.environ | {"TRITON_CACHE_DIR": folder}
    return json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--started", type=float, default=None, help="used by the script itself, in the fresh processes")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.started is not None:
        print(json.dumps(step(options.started)))
        return
    import torch
    import triton

    cold, warm = [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(measure(folder))
            warm.append(measure(folder))
    result = {
        "gpu": torch.cuda.get_device_name(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    for name, runs in (("cold", cold), ("warm", warm)):
        result[name] = {field: round(median(run[field] for run in runs), 3) for field in runs[0]}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
