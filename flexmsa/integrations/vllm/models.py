"""The converted models that vLLM can serve: its own dense models, whose converted layers select blocks."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from flexmsa.integrations.transformers.index_branch import is_index_weight
from flexmsa.integrations.vllm.attention import SparseAttention
from flexmsa.integrations.vllm.branch import IndexBranch
from flexmsa.integrations.vllm.settings import SparseSettings, check_settings

__all__ = ["FlexMSALlamaForCausalLM", "FlexMSAMistralForCausalLM", "FlexMSAQwen3ForCausalLM"]


class ConvertedAttention(nn.Module):
    """The attention module of a converted layer, made from vLLM's dense one, whose parameters keep their names.

    Args:
        dense: of Llama, Mistral or Qwen3.
        config: of the model.
        settings: of its index branches.
    """

    def __init__(self, dense: Any, config: Any, settings: SparseSettings) -> None:
        super().__init__()
        self.head_dim, self.sizes = dense.head_dim, [dense.q_size, dense.kv_size, dense.kv_size]
        self.qkv_proj, self.o_proj, self.rotary_emb = dense.qkv_proj, dense.o_proj, dense.rotary_emb
        self.has_norms = hasattr(dense, "q_norm")
        if self.has_norms:
            self.q_norm, self.k_norm = dense.q_norm, dense.k_norm
        self.index_branch = IndexBranch(config, settings, dense.rotary_emb)
        self.attn = SparseAttention(dense.attn, settings)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the output of the attention for hidden_states [T, hidden_size]."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        if self.has_norms:
            q, k = self.q_norm(self._heads(q)).flatten(1), self.k_norm(self._heads(k)).flatten(1)
        q, k = self.rotary_emb(positions, q, k)
        index_q, index_k = self.index_branch(positions, hidden_states)
        out = self.attn(self._heads(q), self._heads(k), self._heads(v), index_q, index_k)
        return self.o_proj(out.flatten(1))[0]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class _Converted(nn.Module):
    """What the classes below add to vLLM's own."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_settings(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        settings = SparseSettings.of(config)
        self.branches: dict[str, IndexBranch] = {}
        model: Any = self.model
        layers = model.layers
        for number in settings.layers:
            dense = layers[number].self_attn
            _check_attention(dense, config)
            layers[number].self_attn = attention = ConvertedAttention(dense, config, settings)
            self.branches[f"model.layers.{number}.self_attn"] = attention.index_branch

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of a checkpoint; return the names of those that were loaded.

        Raises:
            ValueError: an index branch has no weights in the checkpoint, or they have other shapes.
        """
        loaded: set[str] = set()

        def others() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                if not is_index_weight(name):
                    yield name, weight
                    continue
                module, own = name.split(".index_")
                # In the warm-up, layers are dense.
                if module in self.branches:
                    parameter = self.branches[module].load(f"index_{own}", weight)
                    loaded.add(f"{module}.index_branch.{parameter}")
                    found.add((module, own))

        found: set[tuple[str, str]] = set()
        loaded |= super().load_weights(others())  # type: ignore[misc]
        self._check_loaded(found)
        return loaded

    def _check_loaded(self, found: set[tuple[str, str]]) -> None:
        for module, branch in self.branches.items():
            kinds = ["weight", *(["bias"] if branch.settings.bias else [])]
            expected = [f"{name}_proj.{kind}" for name in "qk" for kind in kinds]
            expected += [f"{name}_norm.weight" for name in "qk"] if branch.settings.qk_norm else []
            for own in expected:
                if (module, own) not in found:
                    raise ValueError(
                        f"{module}.index_{own}: expected the weights of every index branch, got a checkpoint without "
                        "them; save the model that flexmsa.integrations.transformers.convert returned with "
                        "save_pretrained"
                    )


def _check_attention(dense: Any, config: Any) -> None:
    for name in ("dual_chunk_attention_config", "llama_4_scaling", "ada_rms_norm_t_cond"):
        if getattr(config, name, None):
            raise NotImplementedError(f"{name}: expected none in config.json of a converted model, got one")
    if not getattr(config, "is_causal", True):
        raise NotImplementedError("is_causal: expected True in config.json of a converted model, got False")


class FlexMSALlamaForCausalLM(_Converted, LlamaForCausalLM):
    """A converted Llama."""


class FlexMSAMistralForCausalLM(_Converted, MistralForCausalLM):
    """A converted Mistral."""


class FlexMSAQwen3ForCausalLM(_Converted, Qwen3ForCausalLM):
    """A converted Qwen3."""
