import importlib.util
import os

import pytest

# `make test-vllm` makes an environment with vLLM; without it there is nothing to test here.
collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["*"]

# A cache of one GiB, and the engine in this process, unless a test starts others.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
# torch.compile with few passes.
os.environ.setdefault("VLLM_CPU_CI_ENV", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Return the folder of a checkpoint with these settings, which is saved once."""
    from vllm_plugin import checkpoints

    made = {}

    def folder(family="qwen3", **settings):
        key = family, str(settings)
        if key not in made:
            made[key] = checkpoints.save(tmp_path_factory.mktemp(family), family, **settings)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def expected(checkpoint):
    """Return what transformers generates from a checkpoint for each prompt, which is computed once."""
    from vllm_plugin import checkpoints

    made = {}

    def tokens(folder, given=None, **settings):
        key = folder, str(given), str(settings)
        if key not in made:
            made[key] = checkpoints.generate(folder, given or checkpoints.prompts(), **settings)
        return made[key]

    return tokens
