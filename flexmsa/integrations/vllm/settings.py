"""What a model asks of vLLM's settings: checked, and chosen where the user chose nothing."""

from typing import Any, NamedTuple

import torch
import vllm
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from flexmsa.integrations.vllm import M3_SWITCH

__all__ = [
    "OPERATOR",
    "ConvertedModelConfig",
    "MiniMaxM3Config",
    "SparseSettings",
    "check_m3_dtypes",
    "check_settings",
    "is_supported_version",
]

OPERATOR = "vllm::flexmsa_attention"
_VERSION = "0.32"
_M3_DTYPES = {
    "kv_cache_dtype": ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3"),
    "indexer_kv_dtype": ("auto", "bf16", "fp8", "fp8_e4m3"),
}
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


def is_supported_version() -> bool:
    """Return whether flexmsa knows the internal interfaces of the installed vLLM."""
    # vLLM's part of a version such as "0.32.0+cpu".
    return vllm.__version__.split(".")[:2] == _VERSION.split(".")


def _check_version() -> None:
    if not is_supported_version():
        raise RuntimeError(
            f"vllm: expected version {_VERSION}, whose internal interfaces flexmsa uses, got {vllm.__version__}; "
            f"install vllm>={_VERSION}.0,<0.{int(_VERSION.split('.')[1]) + 1}"
        )


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
    _check_version()
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


class MiniMaxM3Config(VerifyAndUpdateConfig):
    """vLLM calls it for MiniMax-M3 with flexmsa's kernels, before it starts any process."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Check the version of vLLM, the platform and the dtypes of the pages."""
        _check_version()
        if not current_platform.is_cuda():
            # Elsewhere vLLM has another model, which flexmsa would not change.
            raise RuntimeError(
                f"{M3_SWITCH}: expected an NVIDIA GPU, got the platform {current_platform.device_name}; unset it"
            )
        given, model = vllm_config.cache_config.cache_dtype, vllm_config.model_config
        check_m3_dtypes(given, vllm_config.attention_config.indexer_kv_dtype)
        if given in ("bfloat16", "float16") and f"torch.{given}" != str(model.dtype):
            raise NotImplementedError(
                f"kv_cache_dtype: expected auto, fp8 or the model's {model.dtype} with {M3_SWITCH}=1, got {given}; "
                "leave the option out"
            )


def check_m3_dtypes(kv_cache_dtype: str, indexer_kv_dtype: str) -> None:
    """Check the dtypes of MiniMax-M3's pages, as vLLM names them.

    Raises:
        NotImplementedError: flexmsa has no kernels for one of them.

    >>> check_m3_dtypes("fp8", "auto")
    """
    given = {"kv_cache_dtype": kv_cache_dtype, "indexer_kv_dtype": indexer_kv_dtype}
    for name, supported in _M3_DTYPES.items():
        if given[name] not in supported:
            raise NotImplementedError(
                f"{name}: expected one of {', '.join(supported)} with {M3_SWITCH}=1, got {given[name]}; choose one of "
                "them, or unset the variable"
            )
