"""Decoding by these kernels from a cache whose blocks are dealt to two processes, against one process."""

from distributed import test_sharded_cache as cases
from distributed.processes import run
from torch.distributed.device_mesh import init_device_mesh

# Rows of one block and of five; drafts, whose queries see other numbers of a process's keys.
STEPS = (("prompt", 18, (18, 2, 9)), ("append", 2, (2, 0, 1)))


def steps():
    mesh = init_device_mesh("cpu", (2,))
    for name in ("pages in e4m3", "index keys in int8"):
        cases.check_steps(mesh, name, STEPS, "triton")


def test_equals_one_process():
    run(2, steps)
