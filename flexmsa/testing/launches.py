"""The launches of whole operations on meta tensors: what a user's call would run, for a GPU that need not be present.

Needs Triton, so `flexmsa.testing` does not import it by itself.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.launch import Launch, record
from flexmsa.kernels.triton.common.target import Target
from flexmsa.testing.cases import lay_out

TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_86": Target("cuda", 86, 84),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "gfx942": Target("hip", "gfx942", 304),
}


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """An uninitialised tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Layer:
    """Sizes and dtype of one call of an attention layer, by default MiniMax-M3's.

    queries: as many as tokens, the keys, if None; packed: documents along the sequence; strided, offset: as for
    `lay_out`, of q, k, v, index_q and index_k.
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

    def sequences(self) -> Tensor:
        """The table of sequences of one row, or of three packed documents."""
        return meta(3 if self.packed else 1, 5)

    def vectors(self, heads: int, head_dim: int, tokens: int | None = None) -> Tensor:
        """[1, heads, tokens, head_dim]."""
        shape = 1, heads, self.tokens if tokens is None else tokens, head_dim
        return lay_out(shape, strided=self.strided, offset=self.offset, dtype=self.dtype, device="meta")

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
        return meta(1, self.num_kv_heads, self.num_queries, self.topk)

    def out(self) -> Tensor:
        """[1, Hq, Sq, D], as is its gradient."""
        return meta(1, self.num_heads, self.num_queries, self.head_dim, dtype=self.dtype)

    def lse(self) -> Tensor:
        """[1, Hq, Sq]."""
        return meta(1, self.num_heads, self.num_queries, dtype=torch.float32)


def selection_launches(layer: Layer, target: Target, dtype: torch.dtype | None = None) -> list[Launch]:
    """Of `select_blocks` for all tokens; dtype: of the index vectors, if another, such as e4m3."""
    with record(target) as launches:
        index_q, index_k = (x.to(dtype or layer.dtype) for x in layer.index())
        kernels.select_blocks(index_q, index_k, layer.sequences(), layer.rule)
    return launches


def forward_launches(layer: Layer, target: Target, dense: bool = False) -> list[Launch]:
    """Of the main branch's forward."""
    ids = None if dense else layer.block_indices()
    with record(target) as launches:
        kernels.block_sparse_attention_forward(*layer.main(), ids, layer.sequences(), layer.block_size, layer.scale)
    return launches


def backward_launches(layer: Layer, target: Target, dense: bool = False, lse_gradient: bool = False) -> list[Launch]:
    """Of the main branch's backward, from the gradient of out, and of the lse."""
    ids = None if dense else layer.block_indices()
    out, lse = layer.out(), layer.lse()
    with record(target) as launches:
        kernels.block_sparse_attention_backward(
            *(out, lse if lse_gradient else None, *layer.main(), out, lse, ids, layer.sequences()),
            *(layer.block_size, layer.scale),
        )
    return launches


def joint_backward_launches(layer: Layer, target: Target, lse_gradient: bool = False) -> list[Launch]:
    """Of the backward that computes the index loss too."""
    out, lse = layer.out(), layer.lse()
    with record(target) as launches:
        kernels.attention_and_index_loss_backward(
            *(out, lse if lse_gradient else None, meta(dtype=torch.float32), *layer.main(), *layer.index(), out, lse),
            *(layer.block_indices(), layer.sequences(), layer.block_size, layer.scale, 0.1),
        )
    return launches


def loss_launches(layer: Layer, target: Target, with_grad: bool = True, dense: bool = False) -> list[Launch]:
    """Of the index loss, with its gradient or without."""
    ids = None if dense else layer.block_indices()
    q, k, _ = layer.main()
    with record(target) as launches:
        kernels.index_loss(
            q, k, *layer.index(), ids, layer.lse(), layer.sequences(), layer.block_size, layer.scale, 0.1, with_grad
        )
    return launches


@dataclass(frozen=True)
class CacheFormat:
    """How a cache keeps its vectors: in pages or contiguous, as e4m3 numbers with scales or in the layer's dtype."""

    paged: bool = False
    scaled: bool = False
    index_scaled: bool = False


def decode_launches(
    layer: Layer,
    target: Target,
    cache: CacheFormat = CacheFormat(),
    tokens: int = 1,
    batch: int = 1,
    ragged: bool = False,
    dense: bool = False,
) -> list[Launch]:
    """Of appending `tokens` tokens per row to a cache of layer.tokens keys, and of selecting and attending for them.

    ragged: rows get other numbers of tokens; dense: nothing is selected.
    """
    max_pages = layer.tokens // layer.block_size
    rows, keys = (batch * max_pages, layer.block_size) if cache.paged else (batch, layer.tokens)

    def stored(heads: int, head_dim: int, scaled: bool) -> tuple[Tensor, Tensor | None]:
        dtype = torch.float8_e4m3fn if scaled else layer.dtype
        scale = meta(rows, heads, keys, dtype=torch.uint8) if scaled else None
        return meta(rows, heads, keys, head_dim, dtype=dtype), scale

    def new(heads: int, head_dim: int) -> Tensor:
        return meta(batch, heads, tokens, head_dim, dtype=layer.dtype)

    k, k_scale = stored(layer.num_kv_heads, layer.head_dim, cache.scaled)
    v, v_scale = stored(layer.num_kv_heads, layer.head_dim, cache.scaled)
    index_k, index_scale = stored(1, layer.index_head_dim, cache.index_scaled)
    table = meta(batch, max_pages) if cache.paged else None
    new_k, new_index_k = new(layer.num_kv_heads, layer.head_dim), new(1, layer.index_head_dim)
    q, index_q = new(layer.num_heads, layer.head_dim), new(layer.num_kv_heads, layer.index_head_dim)
    sequences = meta(batch, 5)
    with record(target) as launches:
        buffers = k, v, index_k, k_scale, v_scale, index_scale, table
        lens = meta(batch) if ragged else None
        kernels.append(new_k, new_k, new_index_k, lens, *buffers, meta(batch), meta(batch), sequences, meta(2))
        scales = table, k_scale, v_scale
        if dense:
            kernels.attend_blocks(q, k, v, None, sequences, layer.block_size, 0.1, *scales)
        else:
            kernels.select_and_attend(q, index_q, k, v, index_k, sequences, layer.rule, 0.1, *scales, index_scale)
    return launches


TASKS = {
    make.__name__.removesuffix("_launches"): make
    for make in (selection_launches, forward_launches, backward_launches, loss_launches, decode_launches)
}
TRAINING = {task: make for task, make in TASKS.items() if task != "decode"}


def grid() -> list[Layer]:
    """Layers of every kind that the public functions accept: head dims, group sizes, block sizes, dtypes."""
    head_dims, block_sizes = (32, 64, 80, 96, 128, 192, 256), (16, 32, 64, 128, 256)
    group_sizes = (1, 2, 3, 4, 5, 7, 8, 16, 32, 64)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return [
        Layer(4096, 2 * group_size, 2, head_dim, head_dim, block_size, 16, dtype)
        for head_dim, group_size, block_size, dtype in itertools.product(head_dims, group_sizes, block_sizes, dtypes)
    ]
