"""What the compile tests build is cached nowhere, so that they see today's compiler."""

import pytest


@pytest.fixture(autouse=True)
def no_cache(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
