"""The tasks that tuning times, each on random inputs of one size: one entry of `TASKS` per folder of kernels."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...problem import Problem
from ...rules import SelectionRule
from ...tuning import Changes, Key, key_for
from ..backward.config import backward_config
from ..backward.launch import block_sparse_attention_backward
from ..common.target import Target, target_of
from ..common.tiles import tma_ready
from ..forward.config import forward_config
from ..forward.launch import block_sparse_attention_forward
from ..loss import config as loss_config
from ..loss.launch import index_loss
from ..selection.config import selection_config
from ..selection.launch import select_blocks
from .candidates import TUNABLE, backward_candidates, forward_candidates, selection_candidates

# Neighbouring tokens whose choices overlap equally with each other's.
SPAN = 64


class Inputs(NamedTuple):
    """Random inputs of every task, for one sequence, whose table `sequences` is; out and lse: of the main branch."""

    problem: Problem
    target: Target
    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    index_q: Tensor
    index_k: Tensor
    block_indices: Tensor
    sequences: Tensor
    out: Tensor
    lse: Tensor

    @property
    def scale(self) -> float:
        return self.problem.head_dim**-0.5

    @property
    def index_scale(self) -> float:
        return self.problem.index_head_dim**-0.5


class Task(NamedTuple):
    """One task to tune.

    depends_on: the fields of the problem that its configuration depends on; tunable: the fields of the configuration
    that changes may name, which hold for every length; choose: the configuration that ships; candidates: changes to
    try, of a problem, a target and a configuration; run: the results with a configuration, or with None as a user gets
    them.
    """

    name: str
    depends_on: tuple[str, ...]
    tunable: tuple[str, ...]
    choose: Callable[[Inputs], Any]
    candidates: Callable[[Problem, Target, Any], Iterable[Changes]]
    run: Callable[[Inputs, Any], tuple[Tensor, ...]]

    def key(self, x: Inputs) -> Key:
        """What the changes that are found hold for."""
        return key_for(self.name, x.problem, x.target, self.choose(x), self.depends_on)


def make_inputs(problem: Problem, seqlen: int, device: torch.device) -> Inputs:
    """The inputs of the tasks, one sequence of seqlen tokens, the same every time."""
    generator = torch.Generator(device).manual_seed(0)

    def normals(heads: int, depth: int) -> Tensor:
        return torch.randn(1, heads, seqlen, depth, device=device, generator=generator).to(problem.dtype)

    groups, num_heads = problem.num_kv_heads, problem.num_kv_heads * problem.group_size
    q, k, v = normals(num_heads, problem.head_dim), normals(groups, problem.head_dim), normals(groups, problem.head_dim)
    grad_out = normals(num_heads, problem.head_dim)
    index_q, index_k = normals(groups, problem.index_head_dim), normals(1, problem.index_head_dim)
    ids = choose_blocks(problem, seqlen, generator)
    sequences = torch.tensor([[0, 0, seqlen, 0, seqlen]], dtype=torch.int32, device=device)
    scale = problem.head_dim**-0.5
    out, lse = block_sparse_attention_forward(q, k, v, ids, sequences, problem.block_size, scale)
    vectors = q, k, v, grad_out, index_q, index_k
    return Inputs(problem, target_of(device), *vectors, ids, sequences, out, lse)


def choose_blocks(problem: Problem, seqlen: int, generator: torch.Generator) -> Tensor:
    """block_indices [1, Hkv, S, topk]: spans of tokens that choose alike, at random, and to every degree between.

    So the forward does part of its work in each of its two orders, and the choice between them matters.
    """
    assert problem.topk is not None
    device, num_blocks = generator.device, triton.cdiv(seqlen, problem.block_size)
    token, block = torch.arange(seqlen, device=device), torch.arange(num_blocks, device=device)
    newest, span = token[:, None] // problem.block_size, token // SPAN
    num_spans = triton.cdiv(seqlen, SPAN)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device, generator=generator)

    ids = []
    for _ in range(problem.num_kv_heads):
        alike, different = uniform(num_spans, num_blocks)[span], uniform(num_spans, 1)[span]
        scores = alike + 2 * different * uniform(seqlen, num_blocks)
        scores = scores.masked_fill(block == newest, torch.inf).masked_fill(block > newest, -torch.inf)
        best = torch.nn.functional.pad(scores, (0, problem.topk), value=-torch.inf).topk(problem.topk)
        ids.append(best.indices.masked_fill(best.values == -torch.inf, -1).int())
    return torch.stack(ids)[None]


def run_selection(x: Inputs, config: Any) -> tuple[Tensor, ...]:
    """The selection's own block_indices."""
    assert x.problem.topk is not None
    rule = SelectionRule(x.problem.block_size, x.problem.topk)
    return (select_blocks(x.index_q, x.index_k, x.sequences, rule, config=config),)


def run_forward(x: Inputs, config: Any) -> tuple[Tensor, ...]:
    """out and lse of the main branch."""
    rules = x.sequences, x.problem.block_size, x.scale
    return block_sparse_attention_forward(x.q, x.k, x.v, x.block_indices, *rules, config=config)


def run_backward(x: Inputs, config: Any) -> tuple[Tensor, ...]:
    """The gradients of q, k and v."""
    main = x.q, x.k, x.v, x.out, x.lse, x.block_indices, x.sequences
    return block_sparse_attention_backward(x.grad_out, None, *main, x.problem.block_size, x.scale, config=config)


def run_loss(x: Inputs, config: Any) -> tuple[Tensor, ...]:
    """The index loss and its gradients."""
    chosen = x.block_indices, x.lse, x.sequences, x.problem.block_size, x.scale, x.index_scale
    return index_loss(x.q, x.k, x.index_q, x.index_k, *chosen, True, config)


def _choose_selection(x: Inputs) -> Any:
    return selection_config(
        x.target,
        num_sequences=1,
        num_kv_heads=x.problem.num_kv_heads,
        seqlen_q=x.q.shape[2],
        seqlen_k=x.k.shape[2],
        index_head_dim=x.problem.index_head_dim,
        block_size=x.problem.block_size,
        topk=x.block_indices.shape[3],
        dtype=x.problem.dtype,
        key_size=x.problem.key_size,
        tma_ready=tma_ready(x.index_k),
    )


def _choose_forward(x: Inputs) -> Any:
    return forward_config(
        x.target,
        group_size=x.problem.group_size,
        head_dim=x.problem.head_dim,
        block_size=x.problem.block_size,
        topk=x.block_indices.shape[3],
        element_size=x.problem.element_size,
    )


def _choose_backward(x: Inputs) -> Any:
    return backward_config(
        x.target,
        group_size=x.problem.group_size,
        head_dim=x.problem.head_dim,
        block_size=x.problem.block_size,
        element_size=x.problem.element_size,
    )


TASKS = (
    Task(
        "selection",
        ("num_kv_heads", "index_head_dim", "block_size", "topk", "dtype", "key_size"),
        TUNABLE["selection"],
        _choose_selection,
        lambda problem, target, config: selection_candidates(target, config, problem.num_kv_heads),
        run_selection,
    ),
    Task(
        "forward",
        ("group_size", "head_dim", "block_size", "topk", "element_size", "scaled"),
        TUNABLE["forward"],
        _choose_forward,
        lambda problem, target, config: forward_candidates(target, config, problem.group_size, problem.block_size),
        run_forward,
    ),
    Task(
        "backward",
        ("group_size", "head_dim", "block_size", "element_size"),
        TUNABLE["backward"],
        _choose_backward,
        lambda problem, target, config: backward_candidates(target, config, problem.block_size),
        run_backward,
    ),
    Task(
        "loss",
        loss_config.DEPENDS_ON,
        loss_config.TUNABLE,
        lambda x: loss_config.default_config(x.problem, x.target),
        loss_config.candidates,
        run_loss,
    ),
)
