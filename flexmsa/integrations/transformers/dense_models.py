"""What of a dense model of transformers can be converted: its sizes, its attention modules, its layers."""

import ast
import functools
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmsa.integrations.transformers.index_branch import num_groups

__all__ = ["attention_modules", "choose_layers", "is_local", "model_sizes"]

_FULL, _SPARSE = "full_attention", "minimax_m3_sparse"


def model_sizes(config: PreTrainedConfig) -> dict[str, int]:
    """Return the settings of `MSAConfig` that a model's own configuration has.

    Raises:
        ValueError: they differ between layers.
    """
    try:
        heads = config.num_attention_heads
        return {
            "hidden_size": config.hidden_size,
            "num_heads": heads,
            "num_kv_heads": num_groups(config),
            "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        }
    except RuntimeError as error:
        raise ValueError(
            f"model: expected layers of equal sizes, got a {type(config).__name__} with sizes of each layer's own"
        ) from error


def attention_modules(model: PreTrainedModel) -> dict[int, Any]:
    """Return the causal self-attention modules by layer number.

    Raises:
        ValueError: there are none, or they have a feature that flexmsa does not support.
    """
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        number = getattr(module, "layer_idx", None)
        kind = type(module)
        if not (kind.__name__.endswith("Attention") and getattr(module, "is_causal", False) and type(number) is int):
            continue
        if number in found:
            raise ValueError(f"model: expected one {kind.__name__} for each layer_idx, got several with {number}")
        found[number] = module
        parent, _, child = name.rpartition(".")
        _check_attention(module)
        _check_keywords(kind.forward)
        _check_keywords(type(model.get_submodule(parent)).forward, f"self.{child}")
    if not found:
        raise ValueError(
            f"model: expected causal attention modules with a layer_idx, found none in {type(model).__name__}"
        )
    return found


def _check_attention(module: Any) -> None:
    """Raise if an attention module does what flexmsa cannot."""
    kind = type(module)
    rope = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
    # Of q, k, cos and sin; in some models it rotates one tensor, in some the attention does not call it.
    has_rope = rope is not None and len(inspect.signature(rope).parameters) >= 4
    if not has_rope or "position_embeddings" not in inspect.signature(kind.forward).parameters:
        raise ValueError(f"model: expected attention with RoPE, got {kind.__name__} without it")
    if hasattr(module, "indexer"):
        raise ValueError(
            f"model: expected no own indexer, got {kind.__name__} with one; MiniMax-M3 needs no conversion: call "
            'register() and model.set_attn_implementation("flexmsa")'
        )
    refused = {
        "attention_dropout": getattr(module, "attention_dropout", 0),
        "attn_logit_softcapping": getattr(module, "attn_logit_softcapping", None),
        "sinks": getattr(module, "sinks", None),
        "differential attention": getattr(module, "lambda_q1", None),
        "latent attention": getattr(module, "kv_lora_rank", None),
        "experts in the attention": getattr(module, "experts", None),
    }
    for name, value in refused.items():
        if isinstance(value, Tensor | nn.Module) or value:
            raise ValueError(f"model: expected no {name}, which flexmsa cannot do, in {kind.__name__}")


class _Calls(ast.NodeVisitor):
    """Finds whether each call hands on keyword arguments: of `callee`, or for None of any function."""

    def __init__(self, callee: str | None) -> None:
        self.callee = callee
        self.hand_on: list[bool] = []

    def visit_Call(self, node: ast.Call) -> None:
        if self.callee in (None, ast.unparse(node.func)):
            self.hand_on.append(any(keyword.arg is None for keyword in node.keywords))
        self.generic_visit(node)


@functools.cache
def _check_keywords(forward: Callable, callee: str | None = None) -> None:
    """Raise unless `forward` hands its keyword arguments on: they hold index heads, index losses and documents.

    Args:
        callee: to what; default: to any function, as attention modules name their attention function as they like.
    """
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(forward)))
    except OSError:
        # A class without a file: the first forward pass in training mode raises.
        return
    calls = _Calls(callee)
    calls.visit(ast.parse(source))
    if not (any(calls.hand_on) if callee is None else all(calls.hand_on)):
        raise ValueError(
            f"model: expected {forward.__qualname__} to hand its keyword arguments on to "
            f"{callee or 'an attention function'}, got one that keeps them, so flexmsa cannot reach the attention; "
            "this model has to stay dense"
        )


def is_local(module: Any) -> bool:
    """Return whether an attention module sees only a window or chunk; some classes have that in the configuration."""
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None:
        return kinds[module.layer_idx] != _FULL
    return getattr(module, "sliding_window", getattr(module.config, "sliding_window", None)) is not None


def choose_layers(modules: dict[int, Any], layers: Iterable[int] | None) -> tuple[int, ...]:
    """Return the numbers of the layers to convert: those given, or all with full attention.

    Raises:
        ValueError: there are none, or some of those given have no full attention.
    """
    full = [number for number, module in sorted(modules.items()) if not is_local(module)]
    others = {number: _kind(module) for number, module in modules.items() if number not in full}
    if _SPARSE in others.values():
        raise ValueError(
            f"model: expected dense layers, got layer_types with {_SPARSE!r} and attention without an indexer: "
            "transformers does not load its weights; set these layers to 'full_attention' if the model has none"
        )
    if layers is None:
        if not full:
            raise ValueError(
                "layers: expected layers with full attention, got a model whose every layer has "
                f"{' or '.join(sorted(set(others.values())))}; set config.sliding_window = None if the model was not "
                "trained with one"
            )
        return tuple(full)
    chosen = tuple(sorted(set(layers)))
    for number in chosen:
        if number not in full:
            kind = f"has {others[number]}" if number in others else "does not exist"
            raise ValueError(f"layers: expected some of {full}, got {number}, which {kind}")
    if not chosen:
        raise ValueError("layers: expected at least one layer, got none")
    return chosen


def _kind(module: Any) -> str:
    kinds = getattr(module.config, "layer_types", None)
    kind = "sliding_attention" if kinds is None else kinds[module.layer_idx]
    return {"sliding_attention": "a sliding window", _SPARSE: _SPARSE}.get(kind, f"the type {kind!r}")
