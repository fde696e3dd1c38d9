"""Tensor parallel by transformers' own plans: the styles of an index branch whose heads are sharded."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers.distributed.tensor_parallel import (
    ALL_PARALLEL_STYLES,
    ColwiseParallel,
    TensorParallelLayer,
    replace_layer_number_by_wildcard,
)

from flexmsa.distributed.gradients import summed
from flexmsa.integrations.transformers.index_branch import has_index_branch

__all__ = ["add_to_plan", "head_mesh", "minimax_m3_tp_plan", "register_styles"]

_HEADS, _REPLICATED = "flexmsa_heads", "flexmsa_replicated"
_PARTS = {"index_q_proj": _HEADS, "index_k_proj": _REPLICATED, "index_q_norm": _REPLICATED, "index_k_norm": _REPLICATED}
# transformers sums their gradients too, but again and again where gradients are accumulated.
_NORMS = "q_norm", "k_norm"


class _Heads(ColwiseParallel):
    """The projection to index_q: each process has the index heads of its own groups."""

    def install_forward(self, module: Any, mesh: DeviceMesh) -> Any:
        module.flexmsa_head_mesh = mesh
        return super().install_forward(module, mesh)


class _Replicated(TensorParallelLayer):
    """Weights that every process has whole, for its own heads: their gradients are sums over the processes."""

    @contextlib.contextmanager
    def context_around_forward(self, module: nn.Module, mesh: DeviceMesh) -> Iterator[None]:
        weights = {name: weight for name, weight in module._parameters.items() if weight is not None}
        module._parameters.update({name: summed(weight, mesh) for name, weight in weights.items()})  # type: ignore[misc]
        try:
            yield
        finally:
            module._parameters.update(weights)


def register_styles() -> None:
    """Make the styles known to transformers."""
    styles: Any = ALL_PARALLEL_STYLES
    styles.register(_HEADS, _Heads())
    styles.register(_REPLICATED, _Replicated())


def minimax_m3_tp_plan(prefix: str = "model.") -> dict[str, str]:
    """Return a plan for MiniMax-M3 that shards the heads; its own gathers q, k and v on every process.

    With `attn_implementation="flexmsa"`, for a number of processes that divides the KV heads. Index losses and all
    gradients are those of one process.

    Args:
        prefix: where the text model is: "model." in `MiniMaxM3VLForCausalLM`, "model.language_model." in
            `MiniMaxM3SparseForConditionalGeneration`.

    >>> minimax_m3_tp_plan()["model.layers.*.self_attn.k_proj"]
    'colwise'
    """
    from transformers import MiniMaxM3VLTextConfig

    register_styles()
    attention = "layers.*.self_attn."
    own = {"q_proj": "colwise", "k_proj": "colwise", "v_proj": "colwise", "o_proj": "rowwise"}
    own |= dict.fromkeys(_NORMS, _REPLICATED)
    own |= {name.replace("index_", "indexer."): style for name, style in _PARTS.items()}
    plan = {**MiniMaxM3VLTextConfig.base_model_tp_plan, **{attention + name: style for name, style in own.items()}}
    return {"lm_head": "colwise_gather_output", **{prefix + name: style for name, style in plan.items()}}


def head_mesh(attention: nn.Module) -> DeviceMesh | None:
    """Return the processes over which the heads of an attention module with an index branch are sharded."""
    indexer = attention._modules.get("indexer")
    projection = attention._modules.get("index_q_proj") if indexer is None else indexer._modules.get("q_proj")
    return None if projection is None else projection.__dict__.get("flexmsa_head_mesh")


def add_to_plan(model: Any) -> None:
    """Add the index branches to the plan of a converted model, where the plan shards the heads of their attention.

    Branches of a model whose weights are sharded already are sharded now.
    """
    register_styles()
    plan = model._tp_plan or {}
    for name, module in model.named_modules():
        place = replace_layer_number_by_wildcard(name)
        if not has_index_branch(module):
            continue
        if plan.get(f"{place}.k_proj") == "colwise":
            plan |= {f"{place}.{part}": style for part, style in _PARTS.items()}
            plan |= {f"{place}.{norm}": _REPLICATED for norm in _NORMS if f"{place}.{norm}" in plan}
        meshes = [weight.device_mesh for weight in module.parameters() if isinstance(weight, DTensor)]
        if meshes:
            for part in _PARTS:
                _share(module._modules[part], meshes[0], plan.get(f"{place}.{part}"))


def _share(module: Any, mesh: DeviceMesh, style: str | None) -> None:
    """Give all processes the first one's new weights, in this style."""
    group = mesh.get_group()
    for name, parameter in list(module.named_parameters(recurse=False)):
        dist.broadcast(parameter.data, dist.get_process_group_ranks(group)[0], group)
        if style is not None:
            ALL_PARALLEL_STYLES[style].shard_param(module, name, mesh)
    if style is not None:
        ALL_PARALLEL_STYLES[style].install_forward(module, mesh)
