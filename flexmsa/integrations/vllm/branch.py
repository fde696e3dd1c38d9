"""The index branch of a converted layer in vLLM: its heads, and how its weights are sharded and loaded."""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.rotary_embedding import get_rope

from flexmsa.integrations.vllm.settings import SparseSettings

__all__ = ["IndexBranch", "own_groups"]


def own_groups(num_kv_heads: int, rank: int, size: int) -> range:
    """Return the groups of a process of tensor parallelism: those whose KV heads vLLM gives to it.

    >>> [list(own_groups(4, rank, 2)) for rank in range(2)]
    [[0, 1], [2, 3]]

    With more processes than KV heads, several processes have the same KV head:

    >>> [list(own_groups(2, rank, 4)) for rank in range(4)]
    [[0], [0], [1], [1]]
    """
    count = max(1, num_kv_heads // size)
    first = rank * num_kv_heads // size
    return range(first, first + count)


class IndexBranch(nn.Module):
    """Computes index_q of this process's groups and index_k, by one product.

    Args:
        config: of the model.
        settings: of its index branches.
        rotary_emb: the RoPE of the main branch.
    """

    def __init__(self, config: Any, settings: SparseSettings, rotary_emb: Any) -> None:
        super().__init__()
        size = settings.index_head_dim
        self.size, self.settings = size, settings
        self.groups = own_groups(
            config.num_key_value_heads, get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        )
        # Each process has its own rows, which `load` chooses: to vLLM they are the whole matrix.
        rows = (len(self.groups) + 1) * size
        self.proj = ReplicatedLinear(config.hidden_size, rows, bias=settings.bias, return_bias=False)
        if settings.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=settings.norm_eps) for _ in range(2))
        self.rotary_emb = rotary_emb
        if rotary_emb.head_size != size:
            if rotary_emb.rotary_dim > size:
                raise ValueError(
                    f"index_head_dim: expected at least the {rotary_emb.rotary_dim} dimensions that RoPE rotates, "
                    f"got {size}"
                )
            parameters = {**config.rope_parameters, "rope_dim": rotary_emb.rotary_dim}
            self.rotary_emb = get_rope(size, config.max_position_embeddings, rope_parameters=parameters)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return index_q [T, groups, Di] and index_k [T, 1, Di] of hidden_states [T, hidden_size]."""
        heads = self.proj(hidden_states).unflatten(-1, (-1, self.size))
        index_q, index_k = heads[:, :-1], heads[:, -1:]
        if self.settings.qk_norm:
            index_q, index_k = self.q_norm(index_q), self.k_norm(index_k)
        rotated = self.rotary_emb(positions, index_q.flatten(1), index_k.flatten(1))
        index_q, index_k = (heads.unflatten(-1, (-1, self.size)) for heads in rotated)
        return index_q, index_k

    def load(self, name: str, weight: Tensor) -> str:
        """Load a weight of a checkpoint, such as "index_q_proj.weight"; return the name of the parameter here."""
        module, kind = name.split(".")
        if module.endswith("_norm"):
            own = f"{module.removeprefix('index_')}.{kind}"
            target: Tensor = self.get_parameter(own)
        else:
            own = f"proj.{kind}"
            parameter = self.get_parameter(own)
            count = len(self.groups) * self.size
            target = parameter[:count] if module == "index_q_proj" else parameter[count:]
            if module == "index_q_proj":
                weight = weight[self.groups.start * self.size : self.groups.stop * self.size]
        if target.shape != weight.shape:
            raise ValueError(f"{name}: expected shape {list(target.shape)}, got {list(weight.shape)}")
        with torch.no_grad():
            target.copy_(weight)
        return own
