"""Serve converted models with vLLM: `vllm serve path`, for a checkpoint that `save_pretrained` wrote.

With FLEXMSA_VLLM_M3=1, vLLM's own MiniMax-M3 runs flexmsa's kernels.

vLLM calls `register` through the entry point `vllm.general_plugins`. Importing flexmsa never imports vLLM.
"""

import os
import warnings

__all__ = ["ARCHITECTURES", "M3_ARCHITECTURES", "M3_SWITCH", "register"]

# In config.json of the converted models that vLLM can serve.
ARCHITECTURES = ("FlexMSALlamaForCausalLM", "FlexMSAMistralForCausalLM", "FlexMSAQwen3ForCausalLM")

# vLLM's own, whose kernels flexmsa can replace, and the environment variable that says so.
M3_ARCHITECTURES = ("MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3MTP")
M3_SWITCH = "FLEXMSA_VLLM_M3"


def register() -> None:
    """Let vLLM load converted models, and with FLEXMSA_VLLM_M3=1 its own MiniMax-M3 with flexmsa's kernels.

    vLLM calls this in each of its processes; further calls do nothing. Other models stay vLLM's own. If the installed
    versions do not fit, this warns, since vLLM calls it for every model.

    Raises:
        ValueError: FLEXMSA_VLLM_M3 is neither 0 nor 1.
    """
    switch = os.environ.get(M3_SWITCH, "0")
    if switch not in ("0", "1"):
        raise ValueError(f"{M3_SWITCH}: expected 1, or 0 which is the default, got {switch!r}")
    try:
        from vllm import ModelRegistry
        from vllm.config import CompilationConfig
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        # AutoConfig then knows the type of model in config.json.
        import flexmsa.integrations.transformers.auto  # noqa: F401
        from flexmsa.integrations.vllm.settings import (
            OPERATOR,
            ConvertedModelConfig,
            MiniMaxM3Config,
            is_supported_version,
        )
    except ImportError as error:
        if switch == "1":
            raise
        warnings.warn(f"flexmsa cannot serve converted models: {error}", stacklevel=2)
        return
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"flexmsa.integrations.vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = ConvertedModelConfig
    # Where vLLM cuts the graph for piecewise CUDA graphs.
    if OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATOR)
    for name in M3_ARCHITECTURES if switch == "1" else ():
        MODELS_CONFIG_MAP[name] = MiniMaxM3Config
        # With another version of vLLM, MiniMaxM3Config raises.
        if is_supported_version():
            ModelRegistry.register_model(name, f"flexmsa.integrations.vllm.m3:{name}")
