"""What a converted model asks of vLLM's settings: checked, and chosen where the user chose nothing."""

from typing import Any, NamedTuple

import torch
import vllm
from vllm.model_executor.models.config import VerifyAndUpdateConfig

__all__ = ["OPERATOR", "ConvertedModelConfig", "SparseSettings", "check_settings"]

OPERATOR = "vllm::flexmsa_attention"
_VERSION = "0.32"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparseSettings(NamedTuple):
    """The settings of all converted layers, from config.json.

    Attributes:
        block_size, topk, num_local_blocks, num_init_blocks, index_head_dim, qk_norm, norm_eps, bias: of `MSAConfig`.
        layers: the numbers of the converted layers; none in the warm-up, in which they attend densely.
    """

    block_size: int
    topk: int
    num_local_blocks: int
    num_init_blocks: int
    index_head_dim: int
    qk_norm: bool
    norm_eps: float
    bias: bool
    layers: frozenset[int]

    @classmethod
    def of(cls, config: Any) -> "SparseSettings":
        """Return those of a model's configuration."""
        stored = config.flexmsa
        own = {name: stored[name] for name in cls._fields if name != "layers"}
        return cls(**own, layers=frozenset(() if stored["warm_up"] else stored["layers"]))


class ConvertedModelConfig(VerifyAndUpdateConfig):
    """vLLM calls it for a converted model, before it starts any process."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the settings, and let vLLM's blocks be those of the model, unless the user chose another size."""
        cache = vllm_config.cache_config
        if not cache.user_specified_block_size:
            cache.block_size = SparseSettings.of(vllm_config.model_config.hf_config).block_size
            # vLLM would choose again, for its own kernels.
            cache.user_specified_block_size = True
        check_settings(vllm_config)


def check_settings(vllm_config: Any) -> None:
    """Check that vLLM can serve a converted model with these settings.

    Raises:
        ValueError, NotImplementedError: it cannot; the message says what to change.
        RuntimeError: this version of vLLM is not supported.
    """
    # vLLM's part of a version such as "0.32.0+cpu".
    if vllm.__version__.split(".")[:2] != _VERSION.split("."):
        raise RuntimeError(
            f"vllm: expected version {_VERSION}, whose internal interfaces flexmsa uses, got {vllm.__version__}; "
            f"install vllm>={_VERSION}.0,<0.{int(_VERSION.split('.')[1]) + 1}"
        )
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    settings = SparseSettings.of(model.hf_config)
    if model.dtype not in _DTYPES:
        raise ValueError(f"dtype: expected float32, bfloat16 or float16, got {model.dtype}")
    if cache.block_size % settings.block_size:
        raise ValueError(
            f"block_size: expected a multiple of {settings.block_size}, the block size that the model was trained "
            f"with, got {cache.block_size}; leave --block-size out"
        )
    layer_types = set(getattr(model.hf_config, "layer_types", None) or ())
    if model.get_sliding_window() is not None or layer_types - {"full_attention"}:
        raise NotImplementedError(
            "sliding_window: expected full attention in all layers, got layers with a sliding window, whose pages "
            "vLLM would keep in another group than those of the index keys; serve this model with transformers"
        )
    expected = {
        "kv_cache_dtype": (cache.cache_dtype, ("auto", str(model.dtype).removeprefix("torch."))),
        "quantization": (model.quantization, (None,)),
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, (1,)),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, (1,)),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, (1,)),
        "enable_dbo": (parallel.enable_dbo, (False,)),
        "lora_config": (vllm_config.lora_config, (None,)),
        "kv_transfer_config": (vllm_config.kv_transfer_config, (None,)),
    }
    for name, (value, supported) in expected.items():
        if value not in supported:
            raise NotImplementedError(
                f"{name}: expected {supported[0]} for a converted model, got {value}; flexmsa's pages or index "
                "branches do not support it. Leave the option out"
            )
