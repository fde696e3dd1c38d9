"""Turn a dense causal model of transformers into one with MiniMax Sparse Attention."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.distributed._functional_collectives import all_reduce
from transformers import PreTrainedConfig, PreTrainedModel

from flexmsa.config import MSAConfig
from flexmsa.distributed.shards import SequenceShards
from flexmsa.integrations.transformers.attention import IMPLEMENTATION, check_shards
from flexmsa.integrations.transformers.auto import PREFIX, converted_config
from flexmsa.integrations.transformers.converted_attention import Conversion, ForwardPass, Report, hook_modules
from flexmsa.integrations.transformers.data_parallel import check_replicas, prepare_shards
from flexmsa.integrations.transformers.dense_models import attention_modules, choose_layers, is_local, model_sizes
from flexmsa.integrations.transformers.index_branch import add_index_branch, first_adapted, has_index_branch
from flexmsa.integrations.transformers.losses import (
    IndexLosses,
    IndexLossValue,
    defer_losses,
    prepare_checkpointing,
    prepare_init_weights,
)
from flexmsa.integrations.transformers.outputs import prepare_outputs, with_index_loss
from flexmsa.integrations.transformers.tensor_parallel import add_to_plan
from flexmsa.integrations.transformers.trainer import watch_gradients

__all__ = ["conversion_of", "convert", "install", "msa_config", "set_warm_up"]

# Settings that the model's own configuration has, and how to train: they are not saved.
_NOT_SAVED = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "rotary_dim", "rope_theta", "loss_in_backward")
# How the names of models end whose loss Trainer's count of the tokens divides.
_COUNT_TOKENS = ("ForCausalLM", "ForConditionalGeneration")


def msa_config(model: PreTrainedModel, **settings: Any) -> MSAConfig:
    """Return the settings of a converted layer of `model`: its sizes and epsilon, and `settings`.

    Args:
        model: a causal model of transformers.
        settings: fields of `MSAConfig`: block_size, topk, num_local_blocks, num_init_blocks, index_head_dim (default:
            the model's head_dim), qk_norm, norm_eps, bias.
    """
    config = model.config.get_text_config()
    sizes = model_sizes(config)
    epsilon = getattr(config, "rms_norm_eps", getattr(config, "layer_norm_eps", 1e-6))
    return MSAConfig(**{**sizes, "index_head_dim": sizes["head_dim"], "norm_eps": epsilon, **settings})


def convert(
    model: PreTrainedModel,
    settings: MSAConfig | Mapping[str, Any] | None = None,
    *,
    layers: Iterable[int] | None = None,
) -> PreTrainedModel:
    """Add an index branch to attention layers of a dense causal model, in place; its own weights do not change.

    The model starts in the warm-up: its logits are those of the dense model. Train it with
    `flexmsa.integrations.transformers.training`, or switch the selection on with `set_warm_up(model, False)`.

    In training mode the gradient of `outputs.loss` includes that of `model.flexmsa.index_loss_weight` times the sum of
    the layers' index losses. The backward computes these losses, so the value of `outputs.loss` is the model's own
    loss, and `model.flexmsa.report` has the index losses after the backward. With `model.flexmsa.loss_in_backward =
    False` the forward computes them: `outputs.index_loss` is their sum, and `outputs.loss` includes it.

    Activation checkpointing that is not reentrant saves the selected ids (`flexmsa.save_selection_policy`), unless a
    context_fn of your own is among `gradient_checkpointing_kwargs`.

    Args:
        model: grouped-query or multi-head attention with RoPE, such as Llama, Qwen2, Qwen3, Mistral, Gemma 3, Phi.
        settings: an MSAConfig that matches the model, or the arguments of `msa_config`. The model's own RoPE rotates
            the index heads.
        layers: the numbers of the layers to convert; default: all without a sliding window.

    Returns:
        The model. `model.flexmsa` is its `Conversion`, and `model.config.flexmsa` the settings, saved with the model.

    Raises:
        ValueError, TypeError: the model or the settings are not as described.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}")
    if hasattr(model, "flexmsa"):
        raise ValueError("model: expected a dense model, got one that is converted already; convert once")
    # Those of M3's own, which `attention_modules` refuses, have no msa.
    branches = (name for name, part in model.named_modules() if "msa" in part.__dict__ and has_index_branch(part))
    converted = next(branches, None)
    if converted is not None:
        raise ValueError(
            f"model: expected a dense model, got one with converted attention layers already, such as {converted}; "
            "converting again would replace their trained index branch: attach the head before convert, or load a "
            "converted model by from_pretrained"
        )
    if getattr(model.config.get_text_config(), "flexmsa", None) is not None:
        raise ValueError(
            "model: expected a dense model, got the checkpoint of a converted model without its index branch; "
            "load it with flexmsa.integrations.transformers.from_pretrained"
        )
    adapted = first_adapted(model)
    if adapted is not None:
        raise ValueError(
            f"model: expected one without adapters, got {adapted}; convert first, then give PEFT's configuration "
            "modules_to_save=[*INDEX_MODULES], without which it would not save the index branches"
        )
    config = settings if isinstance(settings, MSAConfig) else msa_config(model, **(settings or {}))
    _check_settings(config, model_sizes(model.config.get_text_config()))
    modules = attention_modules(model)
    chosen = choose_layers(modules, layers)
    return install(model, config, chosen, warm_up=True)


def _check_settings(config: MSAConfig, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if getattr(config, name) != size:
            raise ValueError(f"settings: expected {name}={size}, as the model has, got {getattr(config, name)}")
    if config.topk is None:
        raise ValueError("settings: expected an int for topk, got None; for the warm-up, call set_warm_up(model, True)")
    if config.loss_in_backward:
        raise ValueError(
            "settings: expected no loss_in_backward; set model.flexmsa.loss_in_backward, which is True by default"
        )
    if config.rotary_dim is not None or config.rope_theta != MSAConfig.rope_theta:
        raise ValueError("settings: expected no rotary_dim and rope_theta; the model's RoPE rotates the index heads")


def install(model: Any, config: MSAConfig, layers: tuple[int, ...], warm_up: bool) -> PreTrainedModel:
    """Convert as `convert` does, without its checks."""
    from flexmsa.integrations.transformers.loading import register_loader

    _own_config(model)
    if not model.config.architectures:
        model.config.architectures = [type(model).__name__]
    if hasattr(transformers, model.config.architectures[0].removeprefix(PREFIX)):
        register_loader(model.config)
    text_config = model.config.get_text_config()
    modules = attention_modules(model)
    dense = text_config._attn_implementation
    fallback = dense if dense not in (None, "eager", IMPLEMENTATION) else "sdpa"
    conversion = Conversion(config, layers, fallback, warm_up)
    std = config.hidden_size**-0.5
    fallbacks: dict[Any, str | None] = {}
    for number, module in modules.items():
        if number in layers:
            weight = next(module.parameters())
            dtype = weight.dtype if weight.is_floating_point() else model.dtype
            add_index_branch(module, config, std, dtype, weight.device)
            module.index_loss_value = IndexLossValue(weight.device)
        fallbacks[module] = fallback if is_local(module) else None
    hook_modules(model.base_model, fallbacks, conversion)
    model.flexmsa = conversion
    add_to_plan(model)
    text_config._attn_implementation = IMPLEMENTATION
    _store_settings(model)
    prepare_outputs(type(model))
    for part in model.modules():
        # Each initializes the modules inside it.
        if isinstance(part, PreTrainedModel):
            prepare_init_weights(type(part))
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)
    # A traced forward cannot look up the names.
    names = tuple(inspect.signature(type(model).forward).parameters)[1:]
    model.register_forward_hook(partial(_after_forward, names), with_kwargs=True)
    watch_gradients(model)
    return model


def _own_config(model: Any) -> None:
    """Give the model a copy of its configuration, since others may share it, that is saved as a converted model's."""
    copies: dict[int, Any] = {}
    own = copy.deepcopy(model.config, copies)
    if PREFIX not in type(own).__name__:
        kind: Any = type(own)
        own.__class__ = converted_config(kind)
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig) and id(config) in copies:
            module.config = copies[id(config)]


def set_warm_up(model: Any, warm_up: bool) -> None:
    """Make the main branch of a converted model dense (the warm-up), or sparse."""
    conversion_of(model).warm_up = warm_up
    _store_settings(model)


def conversion_of(model: Any) -> Conversion:
    """Return the state of a converted model."""
    conversion = getattr(model, "flexmsa", None)
    if not isinstance(conversion, Conversion):
        raise ValueError(f"model: expected a converted model, got a {type(model).__name__}; call convert(model) first")
    return conversion


def _store_settings(model: Any) -> None:
    """Write the settings to the model's configuration, which save_pretrained saves."""
    conversion: Conversion = model.flexmsa
    settings = {name: value for name, value in dataclasses.asdict(conversion.config).items() if name not in _NOT_SAVED}
    model.config.get_text_config().flexmsa = {
        **settings,
        "layers": list(conversion.layers),
        "fallback": conversion.fallback,
        "warm_up": conversion.warm_up,
    }


def _before_forward(model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Add this forward pass's `IndexLosses`, and its `ForwardPass` with them, to the keyword arguments, if any."""
    if model.config.get_text_config()._attn_implementation != IMPLEMENTATION:
        return args, kwargs
    if kwargs.get("index_losses") is not None:
        raise ValueError(
            "index_losses: expected none, got some; the loss of a converted model already includes them, weighted"
        )
    conversion: Conversion = model.flexmsa
    if kwargs.get("shards") is not None:
        check_shards(kwargs["shards"], kwargs.get("attention_mask"), kwargs.get("position_ids"))
        if conversion.with_health:
            raise ValueError("with_health: expected False with shards, which are parts of sequences, got True")
    trains = model.training and torch.is_grad_enabled()
    if not (trains or conversion.with_health):
        return args, kwargs
    losses = IndexLosses(conversion.loss_in_backward, conversion.index_loss_count)
    if trains:
        check_replicas(model)
        prepare_shards(model, returns_losses=True)
        prepare_checkpointing(model)
        if losses.in_backward:
            defer_losses(losses, model)
    return args, {**kwargs, "msa_pass": ForwardPass.of(args, kwargs, conversion.with_health), "index_losses": losses}


def _after_forward(names: tuple[str, ...], model: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Add the index loss to the outputs, and in training mode to their loss.

    Args:
        names: of the parameters of the model's forward.
    """
    conversion: Conversion = model.flexmsa
    losses: IndexLosses | None = kwargs.get("index_losses")
    if losses is None:
        return output
    if args and "labels" not in kwargs:
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    values = losses.values
    if values.keys() != set(conversion.layers):
        raise RuntimeError(
            f"{type(model).__name__} does not pass keyword arguments to its attention modules: "
            f"expected index losses of the layers {list(conversion.layers)}, got {list(values)}"
        )
    named = isinstance(output, Mapping)
    lm_loss = output.get("loss") if named else output[0] if kwargs.get("labels") is not None else None
    health = kwargs["msa_pass"].health
    share = _share_of_step(model, kwargs) if lm_loss is not None else 1.0
    conversion.report = Report(
        None if lm_loss is None else _mean_of_batch(lm_loss.detach(), share),
        tuple(values[number] for number in conversion.layers),
        tuple(health[number] for number in conversion.layers if number in health),
    )
    index_loss = losses.sum()
    if named:
        output = with_index_loss(output, index_loss)
    if not model.training:
        return output
    conversion.waits = index_loss.requires_grad and conversion.index_loss_weight != 0
    if conversion.waits:
        # A copy, or a model that was pickled, is not watched yet.
        watch_gradients(model)
    if conversion.collected is not None and index_loss.requires_grad:
        conversion.collected.append(index_loss)
    if lm_loss is None or conversion.collected is not None:
        return output
    if conversion.index_loss_count is not None:
        share = 1.0
    loss = lm_loss + conversion.index_loss_weight * share * index_loss.to(lm_loss.device)
    if not named:
        return (loss, *output[1:])
    output["loss"] = loss
    return output


def _mean_of_batch(lm_loss: Tensor, share: Tensor | float) -> Tensor:
    """Return the model's loss as a mean over the tokens of this forward; 0 without any."""
    return lm_loss / share.clamp(min=torch.finfo(torch.float32).tiny) if isinstance(share, Tensor) else lm_loss / share


def _share_of_step(model: Any, kwargs: dict[str, Any]) -> Tensor | float:
    """Return this forward pass's share of the tokens of the optimizer step.

    Trainer divides the summed loss of each micro-batch by the tokens of the whole step. The index loss is a mean, so it
    gets the weight tokens / tokens of the step; otherwise gradient accumulation would multiply it. With shards it is a
    mean over the queries of all processes, so their tokens count. Classifiers ignore the count and return a mean.
    """
    count = kwargs.get("num_items_in_batch")
    # A user's subclass may have another name.
    if count is None or not any(kind.__name__.endswith(_COUNT_TOKENS) for kind in type(model).__mro__):
        return 1.0
    labels = kwargs.get("shift_labels")
    if labels is None:
        labels = kwargs["labels"][..., 1:]
    tokens = labels.ne(-100).sum()
    shards: SequenceShards | None = kwargs.get("shards")
    if shards is not None:
        tokens = all_reduce(tokens, "sum", shards.mesh.get_group()) / shards.mesh.size()
    return tokens / count
