"""The index branch of a transformers attention module: its weights, its heads, and its keys in the cache."""

import functools
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    QuantizedLayer,
    StaticIndexedLayer,
    StaticLayer,
)

from flexmsa.config import MSAConfig
from flexmsa.integrations.transformers.gathered import GatheredRows

__all__ = [
    "INDEX_MODULES",
    "IndexHeads",
    "add_index_branch",
    "cache_index_keys",
    "first_adapted",
    "has_index_branch",
    "has_index_keys",
    "is_index_weight",
    "num_groups",
    "numbers_inside",
    "project_index",
    "trains_index_branch",
]

# The modules of an index branch, by name; for PEFT's `modules_to_save`.
INDEX_MODULES = ("index_q_proj", "index_k_proj", "index_q_norm", "index_k_norm")
_PARTS = frozenset(INDEX_MODULES)
# PEFT keeps these beside what it trains.
_FROZEN_COPIES = frozenset({"original_module", "base_layer"})


class IndexHeads(NamedTuple):
    """index_q [B, Hkv, S, Di] and index_k [B, 1, S, Di], after norms and RoPE."""

    index_q: Tensor
    index_k: Tensor

    def gathered(self, rows: GatheredRows) -> "IndexHeads":
        """Return those of rows with their tokens in front."""
        return IndexHeads(rows.gather_queries(self.index_q), rows.gather_keys(self.index_k))


def add_index_branch(
    module: nn.Module, config: MSAConfig, std: float, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Add index_q_proj, index_k_proj and their norms to `module`; weights are normal with standard deviation `std`."""
    for name, heads in (("index_q", config.num_kv_heads), ("index_k", 1)):
        size = heads * config.index_head_dim
        projection = nn.Linear(config.hidden_size, size, bias=config.bias, dtype=dtype, device=device)
        nn.init.normal_(projection.weight, std=std)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
        norm: nn.Module = nn.Identity()
        if config.qk_norm:
            norm = nn.RMSNorm(config.index_head_dim, eps=config.norm_eps, dtype=dtype, device=device)
        module.add_module(f"{name}_proj", projection)
        module.add_module(f"{name}_norm", norm)


def has_index_branch(module: nn.Module) -> bool:
    """Return whether an attention module has an index branch, from `add_index_branch` or MiniMax-M3's own."""
    # Not hasattr, which is slow for a name that a module does not have: every forward asks every module.
    return "index_q_proj" in module._modules or module._modules.get("indexer") is not None


def trains_index_branch(module: nn.Module) -> bool:
    """Return whether weights of the index branch of an attention module get gradients."""
    parts = (module._modules.get(name) for name in ("indexer", *sorted(_PARTS)))
    return any(parameter.requires_grad for part in parts if part is not None for parameter in part.parameters())


def num_groups(config: Any) -> int:
    """Return the number of KV heads of a model with this configuration, which need not name it."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def numbers_inside(module: nn.Module) -> list[int]:
    """Return the layer numbers of the attention modules inside `module` that have an index branch."""
    modules: Iterable[Any] = module.modules()
    return [inner.layer_idx for inner in modules if has_index_branch(inner)]


def first_adapted(model: nn.Module) -> str | None:
    """Return the name of the first module that an adapter of PEFT wraps, or None."""
    return next((name for name, _ in model.named_modules() if name.rpartition(".")[2] == "base_layer"), None)


def is_index_weight(name: str) -> bool:
    """Return whether a parameter of this name belongs to an index branch, and is not a copy that PEFT keeps frozen.

    >>> is_index_weight("model.layers.0.self_attn.index_q_proj.weight"), is_index_weight("lm_head.weight")
    (True, False)
    >>> is_index_weight("model.layers.0.self_attn.index_q_proj.original_module.weight")
    False
    """
    parts = name.split(".")
    return not _PARTS.isdisjoint(parts) and _FROZEN_COPIES.isdisjoint(parts)


def project_index(
    branch: Any, attention: nn.Module, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None
) -> IndexHeads:
    """Return the index heads of `hidden_states` [B, S, hidden_size], with the RoPE of `attention`'s own model, if any.

    The input is detached, so the loss of the index branch trains only the weights of `branch`.
    """
    detached = hidden_states.detach()
    size = branch.index_k_proj.out_features

    def heads(project: nn.Module, norm: Any) -> Tensor:
        projected = torch.unflatten(project(detached), -1, (-1, size))
        # Under autocast, cast back to the dtype of the norm's weight.
        return norm(projected.to(getattr(norm, "weight", projected).dtype)).transpose(1, 2)

    index_q = heads(branch.index_q_proj, branch.index_q_norm)
    index_k = heads(branch.index_k_proj, branch.index_k_norm)
    if position_embeddings is not None and getattr(attention, "use_rope", True):
        index_q, index_k = _rotate(attention, index_q, index_k, *position_embeddings)
    return IndexHeads(index_q, index_k)


def _rotate(attention: nn.Module, index_q: Tensor, index_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the model's own RoPE to the leading dimensions of both, as many as cos and sin [B, S, rotary] have."""
    rotary, size = cos.shape[-1], index_k.shape[-1]
    if rotary > size:
        raise ValueError(f"index_head_dim: expected at least the {rotary} dimensions that RoPE rotates, got {size}")
    apply_rope = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    if rotary == size:
        # Slices and a cat of everything would copy both, in the backward too.
        rotated = apply_rope(index_q, index_k, cos, sin)
        return rotated[0].to(index_q.dtype), rotated[1].to(index_k.dtype)
    rotated = apply_rope(index_q[..., :rotary], index_k[..., :rotary], cos, sin)
    return tuple(
        torch.cat([part, whole[..., rotary:]], dim=-1).to(whole.dtype)
        for part, whole in zip(rotated, (index_q, index_k), strict=True)
    )  # type: ignore[return-value]


def cache_index_keys(cache: Cache, layer_idx: int, index_k: Tensor) -> Tensor:
    """Append index_k [B, 1, S, Di] to the layer's index keys in `cache`; return all of them, [B, 1, capacity, Di].

    This replaces an empty layer by transformers' own kind of layer with index keys, which supports beam search and
    cropping. Beside quantized keys and values, index keys are not quantized.
    """
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    if not hasattr(cache.layers[layer_idx], "update_indexer"):
        cache.layers[layer_idx] = _with_index_keys(cache, layer_idx)
    return cache.update_indexer(index_k.squeeze(1), layer_idx).unsqueeze(1)


def has_index_keys(cache: Cache, layer_idx: int) -> bool:
    """Return whether a layer of a cache of any kind has index keys."""
    layers = getattr(cache, "layers", ())
    return layer_idx < len(layers) and getattr(layers[layer_idx], "is_indexer_initialized", False)


def _with_index_keys(cache: Cache, layer_idx: int) -> Any:
    """Return an empty layer of the cache as one that has index keys too."""
    layer: Any = cache.layers[layer_idx]
    made: Any = None
    if type(layer) is DynamicLayer:
        made = DynamicIndexedLayer()
    elif type(layer) is StaticLayer:
        made = StaticIndexedLayer(layer.max_cache_len)
    elif isinstance(layer, QuantizedLayer):
        kind = _quantized_layer(type(layer))
        made = kind.__new__(kind)
        DynamicIndexedLayer.__init__(made)
    length: Any = layer.get_seq_length() if layer.is_initialized else 0
    if isinstance(length, Tensor) and torch.compiler.is_compiling():
        torch._assert_async(length == 0, "cache: expected an empty StaticCache, got one without index keys")
        length = 0
    if made is None or length != 0:
        raise ValueError(
            f"cache: expected an empty DynamicCache, StaticCache or QuantizedCache, or one that this model filled, got "
            f"{layer} in layer {layer_idx} of a {type(cache).__name__}; it has no index keys of the earlier tokens"
        )
    # Its settings, and what `early_initialization` allocated.
    for name, value in vars(layer).items():
        setattr(made, name, value)
    return made


@functools.cache
def _quantized_layer(kind: Any) -> Any:
    """The class of layers of the class `kind` with index keys."""
    return type(kind.__name__, (kind, DynamicIndexedLayer), {"__module__": __name__})
