"""What cannot be right raises, and says what to do."""

import json
import types

import pytest
import safetensors.torch
import torch
import vllm
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins
from vllm_plugin.checkpoints import LAYERS
from vllm_plugin.engine import engine

import flexmsa.integrations.vllm
from flexmsa.integrations.vllm.branch import IndexBranch, own_groups


def config_of(folder, **settings):
    load_general_plugins()
    return EngineArgs(model=str(folder), max_model_len=2048, **settings).create_engine_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 64}, "block_size: expected a multiple of 128.*got 64"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype: expected auto.*got fp8"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size: expected 1.*got 2"),
        ({"enable_lora": True}, "lora_config: expected None"),
    ],
)
def test_settings_that_are_not_supported(checkpoint, settings, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        config_of(checkpoint(), **settings)


def test_the_blocks_of_vllm_are_those_of_the_model(checkpoint):
    assert config_of(checkpoint(block_size=64)).cache_config.block_size == 64
    assert config_of(checkpoint(), block_size=256).cache_config.block_size == 256


def edited(folder, to, change):
    """A copy of a checkpoint with another config.json."""
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_a_sliding_window(checkpoint, tmp_path):
    folder = edited(checkpoint("mistral"), tmp_path, lambda config: config.update(sliding_window=512))
    with pytest.raises(NotImplementedError, match="sliding_window: expected full attention in all layers"):
        config_of(folder)


def test_another_version_of_vllm(checkpoint, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match=r"vllm: expected version 0\.32.*got 0\.33\.0"):
        config_of(checkpoint())


@pytest.mark.parametrize("missing", ["index_k_proj.weight", "index_q_norm.weight"])
def test_index_weights_that_the_checkpoint_does_not_have(checkpoint, tmp_path, missing):
    folder = edited(checkpoint(), tmp_path, lambda config: None)
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    del weights[f"model.layers.{LAYERS[0]}.self_attn.{missing}"]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"{missing}: expected the weights of every index branch"), engine(folder):
        pass


def test_registering_twice_changes_nothing():
    from vllm.config import CompilationConfig

    load_general_plugins()
    before = list(CompilationConfig._attention_ops)
    flexmsa.integrations.vllm.register()
    assert CompilationConfig._attention_ops == before
    assert before.count("vllm::flexmsa_attention") == 1


@pytest.mark.parametrize(("kv_heads", "processes"), [(4, 1), (4, 2), (4, 4), (2, 4), (1, 8), (8, 2)])
def test_each_process_has_the_index_heads_of_its_kv_heads(kv_heads, processes):
    """`IndexBranch.load` of each process, against the shards that vLLM gives to its KV heads."""
    size, width = 8, 16
    whole = torch.randn(kv_heads * size, width)
    for rank in range(processes):
        groups = own_groups(kv_heads, rank, processes)
        rows = (len(groups) + 1) * size
        branch = types.SimpleNamespace(groups=groups, size=size)
        parameter = torch.full((rows, width), torch.nan)
        branch.get_parameter = {"proj.weight": parameter}.__getitem__
        IndexBranch.load(branch, "index_q_proj.weight", whole)
        IndexBranch.load(branch, "index_k_proj.weight", whole[:size] + 1)
        # As QKVParallelLinear: consecutive heads, or one that several processes share.
        replicas = max(1, processes // kv_heads)
        count = max(1, kv_heads // processes)
        first = rank // replicas * count * size
        assert torch.equal(parameter[:-size], whole[first : first + count * size])
        assert torch.equal(parameter[-size:], whole[:size] + 1)
