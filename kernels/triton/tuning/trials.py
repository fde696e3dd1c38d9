"""What tuning times: each kernel on random inputs of one size, with the configuration that ships and candidates."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...problem import Problem
from ...rules import SelectionRule
from ...tuning import Changes, Key, key_of
from ..backward.config import backward_config
from ..backward.launch import block_sparse_attention_backward
from ..common.primitives import tma_ready
from ..common.target import target_of
from ..forward.config import candidates as forward_candidates
from ..forward.config import default_config as default_forward_config
from ..forward.config import tuning_shape as forward_tuning_shape
from ..forward.launch import block_sparse_attention_forward
from ..loss.config import loss_config
from ..loss.launch import index_loss
from ..selection.config import selection_config
from ..selection.launch import select_blocks
from .candidates import backward_candidates, loss_candidates, selection_candidates

# Tokens that are alike in how far they choose as their neighbours do.
SPAN = 64


@dataclass(frozen=True)
class Sizes:
    """The shape of a trial: one sequence of seqlen tokens. What is found holds for every seqlen."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    index_head_dim: int
    block_size: int
    topk: int
    dtype: torch.dtype
    seqlen: int

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads


class Inputs(NamedTuple):
    """Random inputs of every kernel; sequences is the table of one sequence."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    index_q: Tensor
    index_k: Tensor
    block_indices: Tensor
    sequences: Tensor


class Trial(NamedTuple):
    """One kernel to tune, for `tuning.tune`; key: what the changes that are found hold for."""

    key: Key
    shipped: Any
    candidates: Iterable[Changes]
    run: Callable[[Any], tuple[Tensor, ...]]


def make_inputs(sizes: Sizes, device: torch.device) -> Inputs:
    """The inputs of the trials, the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normals(heads: int, depth: int) -> Tensor:
        return torch.randn(1, heads, sizes.seqlen, depth, device=device, generator=generator).to(sizes.dtype)

    return Inputs(
        q=normals(sizes.num_heads, sizes.head_dim),
        k=normals(sizes.num_kv_heads, sizes.head_dim),
        v=normals(sizes.num_kv_heads, sizes.head_dim),
        grad_out=normals(sizes.num_heads, sizes.head_dim),
        index_q=normals(sizes.num_kv_heads, sizes.index_head_dim),
        index_k=normals(1, sizes.index_head_dim),
        block_indices=choose_blocks(sizes, generator),
        sequences=torch.tensor([[0, 0, sizes.seqlen, 0, sizes.seqlen]], dtype=torch.int32, device=device),
    )


def choose_blocks(sizes: Sizes, generator: torch.Generator) -> Tensor:
    """block_indices [1, Hkv, S, topk]: spans of tokens that choose alike, at random, and to every degree between.

    So both of the forward's orders of work take their share, and so does the choice between them.
    """
    device, num_blocks = generator.device, triton.cdiv(sizes.seqlen, sizes.block_size)
    token, block = torch.arange(sizes.seqlen, device=device), torch.arange(num_blocks, device=device)
    newest, span = token[:, None] // sizes.block_size, token // SPAN
    num_spans = triton.cdiv(sizes.seqlen, SPAN)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    ids = []
    for _ in range(sizes.num_kv_heads):
        scores = uniform(num_spans, num_blocks)[span] + 2 * uniform(num_spans, 1)[span] * uniform(
            len(token), num_blocks
        )
        scores = scores.masked_fill(block == newest, torch.inf).masked_fill(block > newest, -torch.inf)
        best = torch.nn.functional.pad(scores, (0, sizes.topk), value=-torch.inf).topk(sizes.topk)
        ids.append(best.indices.masked_fill(best.values == -torch.inf, -1).int())
    return torch.stack(ids)[None]


def selection_trial(sizes: Sizes, x: Inputs) -> Trial:
    """The selection; its block_indices are its own."""
    target = target_of(x.q.device)
    shape = {
        "num_sequences": 1,
        "num_kv_heads": sizes.num_kv_heads,
        "seqlen_q": sizes.seqlen,
        "seqlen_k": sizes.seqlen,
        "index_head_dim": sizes.index_head_dim,
        "block_size": sizes.block_size,
        "topk": sizes.topk,
        "dtype": sizes.dtype,
        "key_size": sizes.dtype.itemsize,
        "tma_ready": tma_ready(x.index_k),
    }
    shipped = selection_config(target, **shape)  # type: ignore[arg-type]

    def run(config: Any) -> tuple[Tensor]:
        rule = SelectionRule(sizes.block_size, sizes.topk)
        return (select_blocks(x.index_q, x.index_k, x.sequences, rule, config=config),)

    changes = selection_candidates(target, shipped, sizes.num_kv_heads)
    return Trial(key_of("selection", shipped, target, shape), shipped, changes, run)


def forward_trial(sizes: Sizes, x: Inputs) -> Trial:
    """The main branch's forward."""
    target = target_of(x.q.device)
    problem = Problem(
        num_kv_heads=sizes.num_kv_heads,
        dtype=sizes.dtype,
        group_size=sizes.group_size,
        head_dim=sizes.head_dim,
        block_size=sizes.block_size,
        topk=sizes.topk,
        key_dtype=sizes.dtype,
        bulk_copies=tma_ready(x.q) and tma_ready(x.k) and tma_ready(x.v),
    )
    shipped = default_forward_config(problem, target)
    changes = forward_candidates(problem, target, shipped)
    key = key_of("forward", shipped, target, forward_tuning_shape(problem))
    return Trial(key, shipped, changes, lambda config: attend(sizes, x, config))


def attend(sizes: Sizes, x: Inputs, config: Any = None) -> tuple[Tensor, Tensor]:
    """out and lse of the main branch."""
    scale = sizes.head_dim**-0.5
    return block_sparse_attention_forward(
        x.q, x.k, x.v, x.block_indices, x.sequences, sizes.block_size, scale, config=config
    )


def backward_trial(sizes: Sizes, x: Inputs) -> Trial:
    """The main branch's backward."""
    target = target_of(x.q.device)
    shape = {
        "group_size": sizes.group_size,
        "head_dim": sizes.head_dim,
        "block_size": sizes.block_size,
        "element_size": sizes.dtype.itemsize,
    }
    shipped = backward_config(target, **shape)
    out, lse = attend(sizes, x)
    rules = sizes.block_size, sizes.head_dim**-0.5

    def run(config: Any) -> tuple[Tensor, Tensor, Tensor]:
        main = x.q, x.k, x.v, out, lse, x.block_indices, x.sequences
        return block_sparse_attention_backward(x.grad_out, None, *main, *rules, config=config)

    changes = backward_candidates(target, shipped, sizes.block_size)
    return Trial(key_of("backward", shipped, target, shape), shipped, changes, run)


def loss_trial(sizes: Sizes, x: Inputs) -> Trial:
    """The index loss with its gradient."""
    target = target_of(x.q.device)
    shape = {
        "head_dim": sizes.head_dim,
        "index_head_dim": sizes.index_head_dim,
        "block_size": sizes.block_size,
        "element_size": sizes.dtype.itemsize,
    }
    shipped = loss_config(target, **shape)
    _, lse = attend(sizes, x)

    def run(config: Any) -> tuple[Tensor, Tensor, Tensor]:
        scales = sizes.head_dim**-0.5, sizes.index_head_dim**-0.5
        chosen = x.block_indices, lse, x.sequences, sizes.block_size, *scales
        return index_loss(x.q, x.k, x.index_q, x.index_k, *chosen, True, config)

    changes = loss_candidates(target, shipped, sizes.block_size)
    return Trial(key_of("loss", shipped, target, shape), shipped, changes, run)


TRIALS = (selection_trial, forward_trial, backward_trial, loss_trial)
