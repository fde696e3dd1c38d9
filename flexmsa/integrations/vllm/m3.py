"""vLLM's MiniMax-M3 with flexmsa's kernels; vLLM imports this in place of its own module with FLEXMSA_VLLM_M3=1.

A sparse layer of vLLM's writes keys, values and index keys to its pages, then calls its indexer, whose blocks pass
through `topk_indices_buffer`, then attends to them. Weights, pages and that buffer stay vLLM's.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import vllm.models.minimax_m3.common.indexer as vllm_indexer
import vllm.models.minimax_m3.nvidia.model as vllm_model
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.models.minimax_m3 import MiniMaxM3MTP, MiniMaxM3SparseForCausalLM, MiniMaxM3SparseForConditionalGeneration
from vllm.models.minimax_m3.common.indexer import MiniMaxM3IndexerImpl
from vllm.models.minimax_m3.common.sparse_attention import (
    SPARSE_BLOCK_SIZE,
    MiniMaxM3SparseBackend,
    MiniMaxM3SparseImpl,
    MiniMaxM3SparseMetadata,
    MiniMaxM3SparseMetadataBuilder,
)
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheLayout

from flexmsa import PagedBatch, PagePools, attend_pages, validation
from flexmsa.integrations.vllm.attention import BoundPools, backend, batch_of_step, table_for_steps
from flexmsa.integrations.vllm.settings import check_m3_dtypes

__all__ = ["MiniMaxM3MTP", "MiniMaxM3SparseForCausalLM", "MiniMaxM3SparseForConditionalGeneration"]

# vLLM shows what its own loggers write.
_logger = init_logger("vllm.flexmsa")


@dataclass
class M3Metadata(MiniMaxM3SparseMetadata):
    """vLLM's metadata of a step, and its sequences as flexmsa takes them."""

    batch: PagedBatch | None = None


class M3MetadataBuilder(MiniMaxM3SparseMetadataBuilder):
    """Makes the metadata. A CUDA graph of decoding steps reads the same table of sequences anew."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.table = table_for_steps(vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> M3Metadata:
        """Return the metadata of a step."""
        given = super().build(common_prefix_len, common_attn_metadata, fast_build)
        batch = batch_of_step(common_attn_metadata, SPARSE_BLOCK_SIZE, self.reorder_batch_threshold, self.table)
        return M3Metadata(**vars(given), batch=batch)


class M3Backend(MiniMaxM3SparseBackend):
    """What vLLM asks of the attention of sparse layers."""

    @staticmethod
    def get_impl_cls() -> type[MiniMaxM3SparseImpl]:
        return M3Attention

    @staticmethod
    def get_builder_cls() -> type[MiniMaxM3SparseMetadataBuilder]:
        return M3MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        return backend(SPARSE_BLOCK_SIZE).supported_kv_cache_layouts()

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        return backend(SPARSE_BLOCK_SIZE).supports_device_cpu_query_lens_mismatch()


class M3Indexer(MiniMaxM3IndexerImpl):
    """Keeps its queries for `M3Attention`, which selects and attends in one operator: a launch less than two have.

    Args:
        settings: those of vLLM's own implementations.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        validation.check_settings(self.block_size, self.topk_blocks, self.local_blocks, self.init_blocks)
        expected = {
            "sparse_block_size": (self.block_size, SPARSE_BLOCK_SIZE),
            "sparse_score_type": (self.score_type, "max"),
            "sparse_num_index_heads": (self.num_index_heads, self.num_kv_heads),
        }
        for name, (value, supported) in expected.items():
            if value != supported:
                raise NotImplementedError(
                    f"{name}: expected {supported} with FLEXMSA_VLLM_M3=1, got {value}; unset the variable"
                )
        self.queries: Tensor | None = None

    def forward(self, index_query: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Keep the queries [T, heads * Di]. vLLM reads the blocks from `topk_indices_buffer`, not from here."""
        self.queries = index_query
        return None, None

    def take(self) -> Tensor | None:
        """Return the queries and keep them no longer: they may be in the memory of a CUDA graph."""
        queries, self.queries = self.queries, None
        return queries


class M3Attention(MiniMaxM3SparseImpl):
    """Selects blocks and attends to them, in one operator on vLLM's pages."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._bound = BoundPools()

    def forward(
        self, layer: Any, query: Tensor, kv_cache: Tensor, output: Tensor, *, query_fp8: Tensor | None = None
    ) -> Tensor:
        """Write the step's tokens of output [T, heads * D], and their ids to the layer's `topk_indices_buffer`."""
        indexer, metadata = layer.indexer.impl, get_forward_context().attn_metadata
        index_q = indexer.take()
        if not isinstance(metadata, dict):
            # vLLM measures the memory of a step before there are pages.
            return output
        step, index_step = metadata[layer.layer_name], metadata[indexer.index_cache.prefix]
        if step.slot_mapping.data_ptr() != index_step.slot_mapping.data_ptr():
            raise RuntimeError(
                "kv_cache_groups: expected index keys and keys of a layer in one group, which has one block table, "
                "got two groups; unset FLEXMSA_VLLM_M3"
            )
        if index_q is None:
            raise RuntimeError("indexer: expected its call before the attention's, got none; unset FLEXMSA_VLLM_M3")
        n, index_pages = step.num_actual_tokens, layer.indexer.index_cache.kv_cache
        pools = self._bound.of(kv_cache, index_pages, partial(self._make_pools, layer))
        if index_q.element_size() == 1:
            index_q = index_q.to(query.dtype)
        attend_pages(
            query[:n].unflatten(1, (self.num_heads, self.head_size)),
            index_q[:n].unflatten(1, (indexer.num_index_heads, indexer.index_head_dim)),
            pools,
            step.batch,
            topk=self.topk_blocks,
            num_local_blocks=indexer.local_blocks,
            num_init_blocks=indexer.init_blocks,
            scale=self.scale,
            out=output[:n].unflatten(1, (self.num_heads, self.head_size)),
            block_indices_out=layer.topk_indices_buffer[:n],
        )
        return output

    def _make_pools(self, layer: Any, pages: Tensor, index_pages: Tensor) -> PagePools:
        stored = pages.view(self.kv_cache_fp8_dtype) if self.use_fp8_kv else pages
        scales = (layer._k_scale_float, layer._v_scale_float) if self.use_fp8_kv else ()
        k, v = stored.split(self.head_size, dim=-1)
        return PagePools(k, v, index_pages.unsqueeze(1), *scales)


def select_main_backend_and_impl_cls(
    *, topk_blocks: int, kv_cache_dtype: str, num_kv_heads: int, emits_sparse_block_table: bool = False
) -> tuple[type[MiniMaxM3SparseBackend], type[MiniMaxM3SparseImpl]]:
    """Return flexmsa's, in place of the attention that vLLM would choose."""
    check_m3_dtypes(kv_cache_dtype, "auto")
    _logger.info_once("MiniMax-M3 attends with flexmsa's kernels (FLEXMSA_VLLM_M3=1)")
    return M3Backend, M3Attention


def select_indexer_impl_cls(*, topk_blocks: int, indexer_kv_dtype: str = "bf16") -> type[MiniMaxM3IndexerImpl]:
    """Return flexmsa's, in place of the indexer that vLLM would choose."""
    check_m3_dtypes("auto", indexer_kv_dtype)
    return M3Indexer


# The modules that call these functions have their names.
vllm_model.select_main_backend_and_impl_cls = select_main_backend_and_impl_cls
vllm_indexer.select_indexer_impl_cls = select_indexer_impl_cls
