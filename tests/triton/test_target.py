"""What a GPU and a version of Triton run: the kernels in Gluon, or a warning that says why not."""

import warnings
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from flexmsa.kernels.triton.common import target  # noqa: E402


@pytest.fixture
def gpu(monkeypatch):
    """Lets the machine have a GPU of this capability."""

    def put(major, minor):
        properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.version, "hip", None)

    target._device_target.cache_clear()
    target._warn_without_gluon.cache_clear()
    yield put
    target._device_target.cache_clear()
    target._warn_without_gluon.cache_clear()


def test_this_version_runs_the_kernels_in_gluon():
    assert target.GLUON


def test_an_unknown_version_is_named_once(gpu, monkeypatch):
    monkeypatch.setattr(target, "GLUON", False)
    monkeypatch.setattr(triton, "__version__", "3.99.0")
    gpu(9, 0)
    with pytest.warns(UserWarning, match=r"kernels in Gluon.* 3\.9, and not with 3\.99\.0: the kernels in Triton run"):
        assert target.target_of(torch.device("cuda", 0)).arch == 90
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.target_of(torch.device("cuda", 0))
        target.target_of(torch.device("cuda", 1))


@pytest.mark.parametrize(("capability", "known"), [((9, 0), True), ((8, 0), False)])
def test_there_is_no_warning_where_nothing_is_lost(capability, known, gpu, monkeypatch):
    monkeypatch.setattr(target, "GLUON", known)
    gpu(*capability)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target.target_of(torch.device("cuda", 0))
