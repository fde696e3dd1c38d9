"""Sparse attention as vLLM's engine calls it: metadata of a step, pages, and the operator that writes them and attends.

A converted layer has two caches, which share block tables: keys and values in pages [P, Hkv, page, 2 D], and index keys
in pages [P, 1, page, Di]. Each is a layer of its own to vLLM, which allocates the pages.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheLayout, MLAAttentionSpec

from flexmsa import PagedBatch, PagePools, attend_pages, write_pages
from flexmsa.integrations.vllm.settings import SparseSettings

__all__ = ["BoundPools", "SparseAttention", "backend", "batch_of_step", "table_for_steps"]


@dataclass
class StepMetadata(AttentionMetadata):
    """The tokens of one step.

    Attributes:
        num_tokens: without those that pad a CUDA graph.
        slot_mapping: [num_tokens], where the new tokens are written; -1 for none.
        batch: their sequences; None for index keys, which share those of the keys and values.
    """

    num_tokens: int
    slot_mapping: Tensor
    batch: PagedBatch | None = None


def table_for_steps(vllm_config: Any, device: torch.device) -> Tensor:
    """Return a table of sequences for any step, which stays in place for CUDA graphs: `batch_of_step` writes it."""
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    # A step has at most one sequence per token.
    rows = max(vllm_config.scheduler_config.max_num_batched_tokens, captured) + 4
    return torch.empty(rows, 5, dtype=torch.int32, device=device)


def batch_of_step(given: CommonAttentionMetadata, page_size: int, most_drafts: int | None, table: Tensor) -> PagedBatch:
    """Return the sequences of a step, from vLLM's metadata.

    most_drafts: the most new tokens of a sequence that decodes.
    """
    count, rows = given.num_actual_tokens, given.num_reqs
    # Draft tokens of one length, which padded requests have too.
    uniform = given.max_query_len <= (most_drafts or 1) and count == rows * given.max_query_len
    starts, num_decodes = None, 0
    if not uniform:
        starts = given.query_start_loc[: rows + 1]
        # vLLM orders a batch by lengths, decodes first.
        lengths = given.query_start_loc_cpu[: rows + 1].diff()
        num_decodes = int((lengths == 1).cumprod(0).sum())
    return PagedBatch(
        given.block_table_tensor[:rows],
        given.seq_lens[:rows],
        starts,
        num_tokens=count,
        num_decodes=num_decodes,
        page_size=page_size,
        table=table[: rows + 4],
    )


class BoundPools:
    """The pools of a layer's pages, kept only as long as vLLM keeps the pages.

    Making them for each step would take time of the host.
    """

    def __init__(self) -> None:
        self._found: Any = WeakIdKeyDictionary()

    def of(self, pages: Tensor, index_pages: Tensor, make: Callable[[Tensor, Tensor], PagePools]) -> PagePools:
        """Return make(pages, index_pages), made once."""
        found: PagePools | None = self._found.get(pages)
        if found is None or found.index_k.data_ptr() != index_pages.data_ptr():
            # Views of the tensors themselves would keep them.
            found = self._found[pages] = make(pages.detach(), index_pages.detach())
        return found


class StepMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Makes the metadata from vLLM's, whose tensors stay in place: a CUDA graph of decoding steps reads them anew."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.table = table_for_steps(vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """Return the metadata of a step."""
        given = common_attn_metadata
        count = given.num_actual_tokens
        slots = given.slot_mapping[:count]
        if isinstance(self.kv_cache_spec, MLAAttentionSpec):
            return StepMetadata(count, slots)
        size, threshold = self.kv_cache_spec.block_size, self.reorder_batch_threshold
        batch = batch_of_step(given, size, threshold, self.table)
        return StepMetadata(count, slots, batch)


@functools.cache
def backend(block_size: int) -> type[AttentionBackend]:
    """The backend of layers that select blocks of this size, which are one page each."""

    class FlexMSABackend(AttentionBackend):
        """What vLLM asks of a layer's attention."""

        supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]

        @staticmethod
        def get_name() -> str:
            return "FLEXMSA"

        @staticmethod
        def get_impl_cls() -> Any:
            return SparseAttention

        @staticmethod
        def get_builder_cls() -> Any:
            return StepMetadataBuilder

        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [block_size]

        @classmethod
        def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
            # Kernels read a page of one head at once, so its tokens are best side by side.
            return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC, KVCacheLayout.LBNHC, KVCacheLayout.BLNHC

        @classmethod
        def is_sparse(cls) -> bool:
            return True

        @classmethod
        def supports_device_cpu_query_lens_mismatch(cls) -> bool:
            # The builder tells uniform steps by the lengths that the host knows.
            return False

    return FlexMSABackend


class CachedLayer(nn.Module, AttentionLayerBase):
    """A layer that vLLM gives pages to, under a name of its own.

    Args:
        name: unique in the model.
        block_size: of the selection.
    """

    supports_dcp = supports_pcp = False

    def __init__(self, name: str, block_size: int) -> None:
        super().__init__()
        self.layer_name, self.block_size = name, block_size
        config = get_current_vllm_config()
        self.dtype = config.model_config.dtype
        self.kv_cache = torch.tensor([])
        config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return the backend."""
        return backend(self.block_size)


class IndexKeys(CachedLayer):
    """The index keys of a layer."""

    def __init__(self, name: str, settings: SparseSettings) -> None:
        super().__init__(name, settings.block_size)
        self.size = settings.index_head_dim

    def get_kv_cache_spec(self, vllm_config: Any) -> MLAAttentionSpec:
        """Return what to allocate: one vector per token, as for latent attention."""
        size = vllm_config.cache_config.block_size
        return MLAAttentionSpec(block_size=size, num_kv_heads=1, head_size=self.size, dtype=self.dtype)


class SparseAttention(CachedLayer):
    """Attention to the blocks that the index branch selects, in place of vLLM's `Attention` of a layer.

    Args:
        dense: vLLM's own attention, whose name this takes.
        settings: of the selection.
    """

    def __init__(self, dense: Any, settings: SparseSettings) -> None:
        del get_current_vllm_config().compilation_config.static_forward_context[dense.layer_name]
        super().__init__(dense.layer_name, settings.block_size)
        self.settings, self.scale = settings, dense.impl.scale
        self.num_kv_heads, self.head_size = dense.num_kv_heads, dense.head_size
        self._bound = BoundPools()
        self.index_keys = IndexKeys(f"{dense.layer_name}.index_keys", settings)

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec:
        """Return what to allocate: the keys and values of this process's heads."""
        size, heads = vllm_config.cache_config.block_size, self.num_kv_heads
        return FullAttentionSpec(block_size=size, num_kv_heads=heads, head_size=self.head_size, dtype=self.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor) -> Tensor:
        """Write k, v [T, Hkv, D] and index_k [T, 1, Di] to the pages, and attend: q [T, Hq, D] to out [T, Hq, D]."""
        out = torch.empty_like(q)
        torch.ops.vllm.flexmsa_attention(q, k, v, index_q, index_k, out, _encode_layer_name(self.layer_name))
        return out

    def pools(self) -> PagePools:
        """Return the pages, once vLLM has allocated them."""
        return self._bound.of(self.kv_cache, self.index_keys.kv_cache, self._make_pools)

    def _make_pools(self, pages: Tensor, index_pages: Tensor) -> PagePools:
        k, v = pages.split(self.head_size, dim=-1)
        return PagePools(k, v, index_pages)

    def attend(self, step: StepMetadata, q: Tensor, k: Tensor, v: Tensor, index: tuple[Tensor, Tensor], out: Tensor):
        """Do what `forward` says, for the tokens of `step`."""
        (index_q, index_k), n, settings = index, step.num_tokens, self.settings
        assert step.batch is not None
        pools = self.pools()
        write_pages(k[:n], v[:n], index_k[:n], pools, step.slot_mapping)
        attend_pages(
            q[:n],
            index_q[:n],
            pools,
            step.batch,
            topk=settings.topk,
            num_local_blocks=settings.num_local_blocks,
            num_init_blocks=settings.num_init_blocks,
            scale=self.scale,
            out=out[:n],
        )


def _attention(
    q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor, out: Tensor, layer_name: LayerNameType
) -> None:
    context, name = get_forward_context(), _resolve_layer_name(layer_name)
    layer, metadata = context.no_compile_layers[name], context.attn_metadata
    if metadata is None:
        # vLLM measures the memory of a step before there are pages.
        out.zero_()
        return
    step, index_step = metadata[name], metadata[layer.index_keys.layer_name]
    # vLLM has one slot mapping, and the same block tables, for all layers of a group.
    assert step.slot_mapping.data_ptr() == index_step.slot_mapping.data_ptr()
    layer.attend(step, q, k, v, (index_q, index_k), out)


def _shapes(
    q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor, out: Tensor, layer_name: LayerNameType
) -> None:
    return None


direct_register_custom_op("flexmsa_attention", _attention, mutates_args=["out"], fake_impl=_shapes)
