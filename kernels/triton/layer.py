"""An attention layer by its sizes: tensors for its calls, to record or compile ahead what they launch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import lay_out
from ..problem import SCALE_DTYPES
from ..rules import SelectionRule
from .serving.append import append
from .serving.launch import attend_blocks, select_and_attend
from .step import training_step


@dataclass(frozen=True)
class Layer:
    """Sizes and dtype of one call of an attention layer, by default MiniMax-M3's.

    packed: documents along the sequence; fragments: of each document, as for context parallel; queries: as many as
    tokens, the keys, if None; strided, offset: as for `lay_out`, of q, k, v, index_q and index_k. Its tensors are
    uninitialised; on "meta" they take no memory.
    """

    tokens: int = 131072
    num_heads: int = 64
    num_kv_heads: int = 4
    head_dim: int = 128
    index_head_dim: int = 128
    block_size: int = 128
    topk: int = 16
    dtype: torch.dtype = torch.bfloat16
    packed: bool = False
    fragments: int = 1
    device: str = "meta"
    queries: int | None = None
    strided: bool = False
    offset: int = 0
    scale: float = 0.1

    @property
    def group_size(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_queries(self) -> int:
        """Queries of one sequence."""
        return self.tokens if self.queries is None else self.queries

    @property
    def rule(self) -> SelectionRule:
        """With the newest block forced."""
        return SelectionRule(self.block_size, self.topk)

    def empty(self, *shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """A tensor on the layer's device."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def sequences(self) -> Tensor:
        """The table of sequences of one row, or of three packed documents."""
        documents = 3 if self.packed else 1
        return self.empty(documents, 5) if self.fragments == 1 else self.empty(documents, self.fragments, 5)

    def vectors(self, heads: int, head_dim: int, tokens: int | None = None) -> Tensor:
        """[1, heads, tokens, head_dim]."""
        shape = 1, heads, self.tokens if tokens is None else tokens, head_dim
        return lay_out(shape, strided=self.strided, offset=self.offset, dtype=self.dtype, device=self.device)

    def main(self, tokens: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, of `tokens` queries, k and v."""
        keys = self.vectors(self.num_kv_heads, self.head_dim)
        return self.vectors(self.num_heads, self.head_dim, tokens or self.num_queries), keys, keys

    def index(self, tokens: int | None = None) -> tuple[Tensor, Tensor]:
        """index_q, of `tokens` queries, and index_k."""
        index_q = self.vectors(self.num_kv_heads, self.index_head_dim, tokens or self.num_queries)
        return index_q, self.vectors(1, self.index_head_dim)

    def block_indices(self) -> Tensor:
        """[1, Hkv, Sq, topk]."""
        return self.empty(1, self.num_kv_heads, self.num_queries, self.topk)

    def out(self) -> Tensor:
        """[1, Hq, Sq, D], as is its gradient."""
        return self.empty(1, self.num_heads, self.num_queries, self.head_dim, dtype=self.dtype)

    def lse(self) -> Tensor:
        """[1, Hq, Sq]."""
        return self.empty(1, self.num_heads, self.num_queries, dtype=torch.float32)


@dataclass(frozen=True)
class CacheFormat:
    """How a cache keeps its vectors: in pages or contiguous, keys and values as e4m3 numbers if they are `scaled`.

    index_dtype: of index keys, torch.float8_e4m3fn or torch.int8, with scales; None is the layer's dtype.
    """

    paged: bool = False
    scaled: bool = False
    index_dtype: torch.dtype | None = None


def train(layer: Layer, loss_in_backward: bool = False) -> None:
    """A training step with the index loss."""
    step = *layer.main(), *layer.index(), layer.sequences(), layer.rule, layer.scale, 0.1
    training_step(*step, with_loss=True, loss_in_backward=loss_in_backward)


def decode(
    layer: Layer,
    cache: CacheFormat = CacheFormat(),
    tokens: int = 1,
    batch: int = 1,
    ragged: bool = False,
    dense: bool = False,
) -> None:
    """Append `tokens` tokens per row to a cache of layer.tokens keys, and select and attend for them.

    ragged: rows get other numbers of tokens; dense: nothing is selected.
    """
    max_pages = layer.tokens // layer.block_size
    rows, keys = (batch * max_pages, layer.block_size) if cache.paged else (batch, layer.tokens)

    def stored(heads: int, head_dim: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
        scale = None if dtype is None else layer.empty(rows, heads, keys, dtype=SCALE_DTYPES[dtype])
        return layer.empty(rows, heads, keys, head_dim, dtype=dtype or layer.dtype), scale

    def new(heads: int, head_dim: int) -> Tensor:
        return layer.empty(batch, heads, tokens, head_dim, dtype=layer.dtype)

    dtype = torch.float8_e4m3fn if cache.scaled else None
    k, k_scale = stored(layer.num_kv_heads, layer.head_dim, dtype)
    v, v_scale = stored(layer.num_kv_heads, layer.head_dim, dtype)
    index_k, index_scale = stored(1, layer.index_head_dim, cache.index_dtype)
    table = layer.empty(batch, max_pages) if cache.paged else None
    new_k, new_index_k = new(layer.num_kv_heads, layer.head_dim), new(1, layer.index_head_dim)
    q, index_q = new(layer.num_heads, layer.head_dim), new(layer.num_kv_heads, layer.index_head_dim)
    sequences = layer.empty(batch, 5)
    buffers = k, v, index_k, k_scale, v_scale, index_scale, table
    lens = layer.empty(batch) if ragged else None
    append(new_k, new_k, new_index_k, lens, *buffers, layer.empty(batch), layer.empty(batch), sequences, layer.empty(2))
    scales = table, k_scale, v_scale
    if dense:
        attend_blocks(q, k, v, None, sequences, layer.block_size, layer.scale, *scales)
    else:
        select_and_attend(q, index_q, k, v, index_k, sequences, layer.rule, layer.scale, *scales, index_scale)
