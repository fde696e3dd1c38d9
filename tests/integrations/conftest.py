import importlib.util
import os

import pytest
import torch

# A test module imports what it needs of transformers at its top.
collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["*"]

# On a GPU: float32 products are compared, so no TF32 whatever the environment says, and some are compared bit for bit.
torch.set_float32_matmul_precision("highest")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
torch.use_deterministic_algorithms(torch.cuda.is_available(), warn_only=True)


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def eager():
    """MiniMax-M3 with the attention of transformers."""
    from integrations.m3 import make_m3

    return make_m3("eager")


@pytest.fixture(scope="module")
def model():
    """The same with this one."""
    from integrations.m3 import make_m3

    return make_m3("flexmsa")
