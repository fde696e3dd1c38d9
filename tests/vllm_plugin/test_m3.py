"""vLLM's MiniMax-M3 with flexmsa's kernels: its layer's steps, from metadata made by hand, against the reference."""

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm
from vllm.config import AttentionConfig, CacheConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel
from vllm.forward_context import set_forward_context
from vllm_plugin.m3_layer import DIM, HEADS, KV_HEADS, UNTOUCHED, WIDTH, Layer

# Importing m3 is what replaces vLLM's functions.
from flexmsa.integrations.vllm import m3, register, settings  # noqa: F401

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """vLLM's layers ask for their process group; engines of other tests have left theirs."""
    cleanup_dist_env_and_memory()
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('group') / 'store'}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Chunks of prompts, then tokens beside the rest of a prompt, then tokens alone, then drafts in two lengths.
STEPS = (
    [(0, 512), (2, 7)],
    [(2, 1), (0, 177), (1, 300)],
    [(2, 1), (0, 1), (1, 84)],
    [(0, 1), (1, 1), (2, 1)],
    [(1, 4), (0, 4)],
    [(0, 1), (2, 2), (1, 1)],
)
LENGTHS = [sum(count for step in STEPS for row, count in step if row == sequence) for sequence in range(3)]
CASES = {
    "pages by heads": {},
    "pages by tokens": {"order": (0, 2, 1, 3)},
    "heads apart": {"order": (1, 0, 2, 3)},
    "drafts": {"drafts": 3},
    "e4m3 keys": {"kv_cache_dtype": "fp8"},
    "e4m3 keys and index keys": {"kv_cache_dtype": "fp8", "index_dtype": "fp8"},
    "more blocks than there are": {"sparse_topk_blocks": 16},
    "only the newest blocks": {"sparse_topk_blocks": 2, "sparse_init_block": 0, "sparse_local_block": 2},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps(case):
    layer = Layer(LENGTHS, **case)
    for step in STEPS:
        layer.run(step)
    assert layer.done == LENGTHS


@pytest.mark.parametrize(("drafts", "count"), [(0, 1), (3, 4)])
def test_padding(drafts, count):
    """Sequences without keys, and tokens past the last sequence, as CUDA graphs have them."""
    layer = Layer((200, 300), drafts)
    layer.run([(0, 150), (1, 260)], extra=5)
    layer.run([(0, count), (1, count)], padding=3)
    layer.run([(1, count)], padding=1)
    layer.run([(0, count), (1, 20)], extra=1)


@pytest.mark.parametrize(("drafts", "count"), [(0, 1), (3, 4)])
def test_a_captured_step_reads_the_table_of_sequences_anew(drafts, count):
    layer = Layer((200, 300), drafts)
    layer.run([(0, 120), (1, 260)])
    step = [(0, count), (1, count)]
    captured = layer.metadata(step)
    built = layer.builder.build(0, captured)
    for _ in range(3):
        layer.run(step)
    swapped = step[::-1]
    later = layer.metadata(swapped)
    for name in ("seq_lens", "block_table_tensor", "slot_mapping"):
        getattr(captured, name).copy_(getattr(later, name))
    layer.builder.build(0, captured)
    layer.ids.fill_(UNTOUCHED)
    layer.check(swapped, layer.forward(swapped, captured, built), captured.num_actual_tokens)


def test_new_pages():
    """vLLM allocates pages anew after it has measured the memory of its graphs."""
    layer = Layer((200, 300))
    for _ in range(2):
        layer.bind((0, 1, 2, 3), "auto", layer.layer.indexer.index_cache)
        layer.done, layer.hidden = [0, 0], [torch.randn_like(hidden) for hidden in layer.hidden]
        layer.run([(0, 120), (1, 260)])


def test_a_step_without_pages():
    layer = Layer((20,))
    with set_forward_context(None, layer.config):
        assert (layer.layer(torch.zeros(7, dtype=torch.int64), torch.randn(7, WIDTH)) == 0).all()
        out = torch.randn(7, HEADS * DIM)
        layer.layer._run_attention(out, None, torch.randn(7, KV_HEADS * DIM), out)
    assert layer.layer.indexer.impl.queries is None


def test_index_keys_in_another_group():
    layer = Layer((20,))
    given = layer.metadata([(0, 20)])
    built = layer.builder.build(0, given)
    built.slot_mapping = built.slot_mapping.clone()
    index = dataclasses.replace(built, slot_mapping=given.slot_mapping)
    names = layer.layer.layer_name, layer.layer.indexer.index_cache.prefix
    out = torch.randn(20, HEADS * DIM)
    with set_forward_context(dict(zip(names, (built, index), strict=True)), layer.config):
        layer.layer.indexer(torch.randn(20, KV_HEADS * DIM))
        with pytest.raises(RuntimeError, match="kv_cache_groups: expected index keys and keys of a layer in one group"):
            layer.layer.impl.forward(layer.layer, out, layer.layer.kv_cache, out)


WRONG = [
    ({"sparse_block_size": 64}, "sparse_block_size: expected 128 with FLEXMSA_VLLM_M3=1, got 64"),
    ({"sparse_score_type": "mean"}, "sparse_score_type: expected max"),
    ({"sparse_local_block": 0}, "num_local_blocks: expected an int >= 1"),
    ({"sparse_init_block": 3}, "topk: expected room for the 1 local and 3 initial blocks"),
    ({"kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype: expected one of auto.*got fp8_e5m2; choose"),
    ({"index_dtype": "nvfp4"}, "indexer_kv_dtype: expected one of auto.*got nvfp4"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_models_that_are_not_supported(change, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        Layer((20,), **change)


def test_settings_that_are_not_supported(monkeypatch):
    verify, config = settings.MiniMaxM3Config.verify_and_update_config, VllmConfig()
    with pytest.raises(RuntimeError, match="FLEXMSA_VLLM_M3: expected an NVIDIA GPU, got the platform cpu; unset it"):
        verify(config)
    monkeypatch.setattr(settings.current_platform, "is_cuda", lambda: True)
    verify(config)
    with pytest.raises(NotImplementedError, match="kv_cache_dtype: expected one of auto"):
        verify(VllmConfig(cache_config=CacheConfig(cache_dtype="fp8_e5m2")))
    with pytest.raises(NotImplementedError, match="indexer_kv_dtype: expected one of auto"):
        verify(VllmConfig(attention_config=AttentionConfig(indexer_kv_dtype="mxfp4")))
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    with pytest.raises(RuntimeError, match=r"vllm: expected version 0\.32.*got 0\.33\.0"):
        verify(config)


def test_pages_in_another_dtype_than_the_model(monkeypatch):
    monkeypatch.setattr(settings.current_platform, "is_cuda", lambda: True)
    config = SimpleNamespace(
        cache_config=CacheConfig(cache_dtype="float16"),
        attention_config=AttentionConfig(),
        model_config=SimpleNamespace(dtype=torch.bfloat16),
    )
    with pytest.raises(NotImplementedError, match=r"kv_cache_dtype: expected auto, fp8 or the model's torch\.bfloat16"):
        settings.MiniMaxM3Config.verify_and_update_config(config)


def test_pages_that_vllm_drops_are_freed():
    layer = Layer((20,))
    layer.run([(0, 20)])
    (pools,) = layer.layer.impl._bound._found.values()
    kept = weakref.ref(layer.layer.kv_cache), weakref.ref(pools)
    del pools
    layer.layer.kv_cache = layer.layer.indexer.index_cache.kv_cache = torch.tensor([])
    gc.collect()
    assert [x() for x in kept] == [None, None]


def test_a_switch_that_is_neither(monkeypatch):
    monkeypatch.setenv("FLEXMSA_VLLM_M3", "yes")
    with pytest.raises(ValueError, match="FLEXMSA_VLLM_M3: expected 1, or 0 which is the default, got 'yes'"):
        register()


PROGRAM = """
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm_plugin.m3_layer import vllm_model
from vllm import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
import vllm.models.minimax_m3 as package, vllm.models.minimax_m3.common.indexer as indexer
for name in package.__all__:
    assert ModelRegistry.models[name].load_model_cls() is getattr(package, name)
    print(MODELS_CONFIG_MAP[name].__name__ if name in MODELS_CONFIG_MAP else None)
main = vllm_model.select_main_backend_and_impl_cls(topk_blocks=16, kv_cache_dtype="auto", num_kv_heads=4)
for found in (*main, indexer.select_indexer_impl_cls(topk_blocks=16)):
    print(found.__name__)
"""
VLLM_OWN = ["MiniMaxM3SparseBackend", "MiniMaxM3SparseTritonImpl", "MiniMaxM3IndexerTritonImpl"]
FLEXMSA = ["M3Backend", "M3Attention", "M3Indexer"]


@pytest.mark.parametrize(("switch", "config", "classes"), [("1", "MiniMaxM3Config", FLEXMSA), (None, "None", VLLM_OWN)])
def test_the_switch(switch, config, classes):
    """In a process of its own, through the entry point."""
    environment = {name: value for name, value in os.environ.items() if name != "FLEXMSA_VLLM_M3"}
    environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | ({"FLEXMSA_VLLM_M3": switch} if switch else {})
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-6:] == [config] * 3 + classes
