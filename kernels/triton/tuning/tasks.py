"""The tasks that tuning times, each on random inputs of one size: one entry of `TASKS` per folder of kernels."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...problem import Problem
from ...rules import SelectionRule
from ...tuning import Changes, Key, key_of
from ..backward import config as backward_config
from ..backward.launch import block_sparse_attention_backward
from ..common.target import Target, target_of
from ..forward import config as forward_config
from ..forward.launch import block_sparse_attention_forward
from ..loss import config as loss_config
from ..loss.launch import index_loss
from ..selection import config as selection_config
from ..selection.launch import select_blocks

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

    config: the folder's config module, with DEPENDS_ON, TUNABLE and candidates; choose: the default configuration; run:
    the results with a configuration, or with None as a user gets them.
    """

    name: str
    config: ModuleType
    choose: Callable[[Inputs], Any]
    run: Callable[[Inputs, Any], tuple[Tensor, ...]]

    @property
    def tunable(self) -> tuple[str, ...]:
        """The fields of the configuration that changes may name."""
        return self.config.TUNABLE

    def candidates(self, problem: Problem, target: Target, config: Any) -> Iterable[Changes]:
        """Changes to try."""
        return self.config.candidates(problem, target, config)

    def key(self, x: Inputs) -> Key:
        """The Key of the changes that are found."""
        return key_of(self.name, x.problem, x.target, self.choose(x), self.config.DEPENDS_ON)


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
    return index_loss(x.q, x.k, x.index_q, x.index_k, *chosen, True, config=config)


def choose_selection(x: Inputs) -> Any:
    """The default configuration of the selection, for the inputs' length."""
    return selection_config.default_config(x.problem, x.target, 1, x.q.shape[2], x.k.shape[2])


TASKS = (
    Task("selection", selection_config, choose_selection, run_selection),
    Task("forward", forward_config, lambda x: forward_config.default_config(x.problem, x.target), run_forward),
    Task("backward", backward_config, lambda x: backward_config.default_config(x.problem, x.target), run_backward),
    Task("loss", loss_config, lambda x: loss_config.default_config(x.problem, x.target), run_loss),
)
