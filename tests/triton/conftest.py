"""Build kernels for GPUs that need not be present, and check what the compiler says of them."""

import pytest

triton = pytest.importorskip("triton")

from flexmsa.kernels.triton.common import target as targets  # noqa: E402
from flexmsa.testing import compiled as compiling  # noqa: E402
from flexmsa.testing.compiled import TARGETS  # noqa: E402


@pytest.fixture
def build(tmp_path, monkeypatch):
    """compile(kernel, target, constants, warps, stages) -> the compiled kernel, cached nowhere.

    It may spill `spills` bytes a thread, none by default.
    """
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))

    def build(kernel, target, constants, num_warps, num_stages=2, maxnreg=None, spills=0, **overrides):
        options = targets.launch_options(num_warps, num_stages, maxnreg)
        compiled = compiling.build(kernel, target, constants, options, overrides)
        found = compiling.report(compiled)
        assert found.shared <= target.shared_memory
        assert found.spilled <= spills
        return compiled

    return build


@pytest.fixture(params=TARGETS.values(), ids=TARGETS)
def target(request):
    return request.param
