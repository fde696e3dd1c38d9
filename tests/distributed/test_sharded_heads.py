"""Heads over several processes, as a layer's plan for tensor parallel and as DTensors: all equals one process's."""

import traceback

import pytest
from torch.distributed.device_mesh import init_device_mesh

from . import cases_dtensors, cases_tensor_parallel
from .processes import run

CASES = {2: {**cases_tensor_parallel.CASES, **cases_dtensors.CASES}}
CASES[4] = {**cases_tensor_parallel.CASES_OF_FOUR, **cases_dtensors.CASES_OF_FOUR}


def failures(world):
    """What failed, by case."""
    mesh = init_device_mesh("cpu", (2,) * (world // 2), mesh_dim_names=("dp", "tp")[-(world // 2) :])
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
