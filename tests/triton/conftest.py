"""The compile tests share a cache that begins empty, so that they see today's compiler."""

import pytest


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory, monkeypatch):
    triton = pytest.importorskip("triton")
    # The parent of a worker's folder is the folder of the whole run.
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.getbasetemp().parent / "triton-cache"))
