"""Serve converted models with vLLM: `vllm serve path`, for a checkpoint that `save_pretrained` wrote.

vLLM calls `register` through the entry point `vllm.general_plugins`. Importing flexmsa never imports vLLM.
"""

import warnings

__all__ = ["ARCHITECTURES", "register"]

# In config.json of the converted models that vLLM can serve.
ARCHITECTURES = ("FlexMSALlamaForCausalLM", "FlexMSAMistralForCausalLM", "FlexMSAQwen3ForCausalLM")


def register() -> None:
    """Let vLLM load converted models. vLLM calls this in each of its processes; further calls do nothing.

    A model that is not converted stays vLLM's own. If the installed versions do not fit, this warns, since vLLM calls
    it for every model.
    """
    try:
        from vllm import ModelRegistry
        from vllm.config import CompilationConfig
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        # AutoConfig then knows the type of model in config.json.
        import flexmsa.integrations.transformers.auto  # noqa: F401
        from flexmsa.integrations.vllm.settings import OPERATOR, ConvertedModelConfig
    except ImportError as error:
        warnings.warn(f"flexmsa cannot serve converted models: {error}", stacklevel=2)
        return
    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"flexmsa.integrations.vllm.models:{name}")
        MODELS_CONFIG_MAP[name] = ConvertedModelConfig
    # Where vLLM cuts the graph for piecewise CUDA graphs.
    if OPERATOR not in CompilationConfig._attention_ops:
        CompilationConfig._attention_ops.append(OPERATOR)
