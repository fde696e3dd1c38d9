"""The launches of whole operations on meta tensors: what a user's call would run, for a GPU that need not be present.

Needs Triton, so `flexmsa.testing` does not import it by itself.
"""

import itertools
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexmsa.kernels import triton as kernels
from flexmsa.kernels.problem import SCALE_DTYPES
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.triton.common.launch import Launch, record
from flexmsa.kernels.triton.common.target import Target
from flexmsa.kernels.triton.layer import CacheFormat, Layer, decode
from flexmsa.testing.check import kernels_for_many_queries

TARGETS = {
    "sm_80": Target("cuda", 80, 108),
    "sm_86": Target("cuda", 86, 84),
    "sm_90": Target("cuda", 90, 132),
    "sm_100": Target("cuda", 100, 148),
    "gfx942": Target("hip", "gfx942", 304),
}
CONTIGUOUS = CacheFormat()


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """An uninitialised tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


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


def few_launches(layer: Layer, target: Target) -> list[Launch]:
    """Of the main branch's forward where each of a few queries attends to its own blocks."""
    with record(target) as launches:
        kernels.attend_blocks(*layer.main(), layer.block_indices(), layer.sequences(), layer.block_size, layer.scale)
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
            *(out, lse if lse_gradient else None, (meta(dtype=torch.float32), None), *layer.main(), *layer.index()),
            *(out, lse, layer.block_indices(), layer.sequences(), layer.block_size, layer.scale, 0.1),
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


def decode_launches(
    layer: Layer,
    target: Target,
    cache: CacheFormat = CONTIGUOUS,
    tokens: int = 1,
    batch: int = 1,
    ragged: bool = False,
    dense: bool = False,
) -> list[Launch]:
    """Of appending `tokens` tokens per row to a cache of layer.tokens keys, and of selecting and attending for them.

    ragged: rows get other numbers of tokens; dense: nothing is selected.
    """
    with record(target) as launches:
        decode(layer, cache, tokens, batch, ragged, dense)
    return launches


def scored_launches(layer: Layer, target: Target, cache: CacheFormat = CONTIGUOUS, tokens: int = 1) -> list[Launch]:
    """Of the scored blocks of `tokens` tokens, a sequence each, in a cache of layer.tokens keys."""
    pages = layer.tokens // layer.block_size
    rows, keys = (pages, layer.block_size) if cache.paged else (1, layer.tokens)
    index_k, scale = meta(rows, 1, keys, layer.index_head_dim, dtype=cache.index_dtype or layer.dtype), None
    if cache.index_dtype is not None:
        scale = meta(rows, 1, keys, dtype=SCALE_DTYPES[cache.index_dtype])
    index_q = meta(1, layer.num_kv_heads, tokens, layer.index_head_dim, dtype=layer.dtype)
    rule = SelectionRule(layer.block_size, layer.topk, num_local_blocks=0)
    with record(target) as launches:
        table = meta(1, pages) if cache.paged else None
        kernels.scored_blocks(index_q, index_k, meta(tokens, 5), rule, table, scale)
    return launches


@dataclass(frozen=True)
class StepFormat:
    """A step of an engine: `rows` batch rows of layer.queries tokens in all, which are `sequences` rows of the table.

    fp8_keys, scales: as for `PagedStep`; index_dtype: of index keys in 8 bits; offset: tokens in front of these; many:
    without the kernels for few queries.
    """

    rows: int
    sequences: int
    max_pages: int
    fp8_keys: bool = False
    index_dtype: torch.dtype | None = None
    scales: str = "none"
    offset: int = 0
    many: bool = False


def step_launches(layer: Layer, target: Target, step: StepFormat, dense: bool = False) -> list[Launch]:
    """Of writing to pages, and of a selection and attention to them, together and each alone."""
    keys = torch.float8_e4m3fn if step.fp8_keys else layer.dtype
    stored = [keys, keys, step.index_dtype or layer.dtype]
    groups, tokens, page, pages = layer.num_kv_heads, layer.num_queries, layer.block_size, 64

    def arrange(x: Tensor) -> Tensor:
        return x.unflatten(0, (step.rows, -1)).transpose(1, 2)

    def new(heads: int, depth: int) -> Tensor:
        return meta(tokens, heads, depth, dtype=layer.dtype)

    k, v = meta(pages, groups, page, 2 * layer.head_dim, dtype=stored[0]).split(layer.head_dim, dim=3)
    index_k = meta(pages, 1, page, layer.index_head_dim + 16, dtype=stored[2])[..., : layer.index_head_dim]
    each = [
        meta(*x.shape[:3], dtype=SCALE_DTYPES[x.dtype]) if x.dtype in SCALE_DTYPES else None for x in (k, v, index_k)
    ]
    # Scales of int8 are always those of tokens.
    own = [step.scales == "token" or x.dtype == torch.int8 for x in (k, v, index_k)]
    written = [scale if by_token else None for scale, by_token in zip(each, own, strict=True)]
    read = [
        scale if scale is None or by_token else meta(page, dtype=torch.uint8)
        for scale, by_token in zip(each, own, strict=True)
    ]
    new_k, new_index_k = (x.transpose(0, 1)[None] for x in (new(groups, layer.head_dim), new(1, layer.index_head_dim)))
    to: Any = meta(tokens, dtype=torch.int64), k, v, index_k, *written, (1.0, 1.0, 1.0)
    q, index_q = arrange(new(layer.num_heads, layer.head_dim)), arrange(new(groups, layer.index_head_dim))
    ids = arrange(meta(tokens + step.offset, groups, layer.topk)[step.offset :])
    sequences, table = meta(step.sequences, 5), meta(step.sequences, step.max_pages)
    main: Any = sequences, layer.block_size, layer.scale, table, *read[:2], q
    branches: Any = sequences, layer.rule, layer.scale, table, *read, q, ids
    few = kernels_for_many_queries(q, "triton") if step.many else nullcontext()
    with record(target) as launches, few:
        kernels.write_pages(new_k, new_k, new_index_k, *to)
        kernels.attend_blocks(q, k, v, None if dense else ids, *main)
        if not dense:
            kernels.select_blocks(index_q, index_k, sequences, layer.rule, table, read[2], ids)
            kernels.select_and_attend(q, index_q, k, v, index_k, *branches)
    return launches


TASKS = {
    make.__name__.removesuffix("_launches"): make
    for make in (
        *(selection_launches, forward_launches, backward_launches, loss_launches),
        *(joint_backward_launches, decode_launches),
    )
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
