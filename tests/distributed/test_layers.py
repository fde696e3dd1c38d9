"""A layer over several processes, by heads, as DTensors, and with other kinds of parallel: all equals one process's."""

import traceback

import pytest
from torch.distributed.device_mesh import init_device_mesh

from . import cases_dtensors, cases_tensor_parallel, cases_together
from .processes import device_type, run

MODULES = cases_tensor_parallel, cases_dtensors, cases_together
CASES = {
    2: {name: case for module in MODULES for name, case in module.CASES.items()},
    4: {name: case for module in MODULES for name, case in module.CASES_OF_FOUR.items()},
}


def failures(world):
    """What failed, by case."""
    mesh = init_device_mesh(device_type(), (2,) * (world // 2), mesh_dim_names=("dp", "tp")[-(world // 2) :])
    found = []
    for name, (check, *arguments) in CASES[world].items():
        try:
            check(mesh, *arguments)
        except Exception:
            found.append(f"{name}: {traceback.format_exc()}")
    return found


@pytest.mark.parametrize("world", CASES)
def test_equals_one_process(world):
    """All cases in one start of the processes, which takes longer than most of them."""
    for found in run(world, failures, world):
        assert not found, f"{len(found)} of {len(CASES[world])} cases failed\n" + "\n".join(found)
