"""Backward of block-sparse attention: one pass over the key/value blocks and the queries that chose them.

    P = exp(scale Q K^T - lse),  dS = P * (dO V^T - delta),  delta = rowsum(dO * O) - dlse
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO        a query that sees no key gets 0

Layouts: q, out, grad_out [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], lse, grad_lse [B, Hq, Sq] fp32, any strides;
block_indices [B, Hkv, Sq, topk], or None for every visible block; sequences as in `flexmsa.kernels`. The gradients are
contiguous. Programs do not accumulate into one result, so the results are the same bits every time.

`statistics_kernel` computes delta. Then each pass (see `work_items`) takes four launches:

- `gather_kernel` writes, in the order of the lists, what each entry and its G rows need (`preprocess`);
- `gradient_kernel`: one program owns one work item of a block's list, and computes its dK, dV and dQ (`gradient`, and
  for Hopper `gradient_sm90`);
- `sum_items_kernel`: one program owns some keys of a block whose list has several work items, and adds them in order;
- `sum_slots_kernel`: one program owns some heads of one token, and sums dQ over its top-k slots in order (`reduce`).

At the end `finish_kernel` writes dK and dV, which were summed in fp32, and the results of the loss.

The main kernel computes every probability again, and their mean over a group's heads is the index loss's teacher. Where
the loss is wanted too, it leaves that mean to the launches of `loss`, which follow in the same pass.

For E = B Hkv Sq topk entries and R = E G rows: 10 R block_size D FLOPs; 2 R D elements of q and dO are gathered, R D of
dQ written and read again. At M3's shape and 128K tokens, bf16: 22 TFLOP, 28 ms, beside 68 + 69 GB, 32 ms, of which
reading dQ, 8 ms, does not overlap with the products.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...problem import Problem
from ...tuning import tuned_config
from ...workspace import ranges_per_pass, tokens_per_range
from ..common.launch import choose
from ..common.passes import PassLaunch, run_pass
from ..common.sizes import cdiv
from ..common.target import GLUON, target_of
from ..common.tiles import tma_ready
from ..loss.launch import index_loss
from ..schedule.make_index import inverse_indexes
from ..schedule.work_items import cut_into_items
from . import gradient
from .config import DEPENDS_ON, BackwardConfig, default_config
from .index_loss import IndexBranch, bytes_per_slot, constants_of, prepare
from .preprocess import gather_rows, row_statistics
from .reduce import finish, sum_items, sum_slots
from .workspace import KeyGradients, Work, entry_bytes, make_workspace

# The first that supports a problem runs. Other versions of Triton may lack what the kernel in Gluon needs.
GRADIENTS: tuple[Any, ...] = (gradient,)
if GLUON:
    from . import gradient_sm90

    GRADIENTS = (gradient_sm90, *GRADIENTS)


class Inputs(NamedTuple):
    """The main branch's backward: see the module's docstring."""

    grad_out: Tensor
    grad_lse: Tensor | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor
    block_indices: Tensor | None
    sequences: Tensor
    block_size: int
    scale: float

    def problem(self, index_head_dim: int = 0) -> Problem:
        """The Problem of the call."""
        num_kv_heads, ids = self.k.shape[1], self.block_indices
        return Problem(
            num_kv_heads=num_kv_heads,
            dtype=self.q.dtype,
            group_size=self.q.shape[1] // num_kv_heads,
            head_dim=self.q.shape[3],
            index_head_dim=index_head_dim,
            block_size=self.block_size,
            topk=None if ids is None else ids.shape[3],
            bulk_copies=all(map(tma_ready, (self.grad_out, self.q, self.k, self.v))),
        )


def find_gradients(
    x: Inputs, problem: Problem, implementation: Any, config: BackwardConfig, branch: IndexBranch | None
) -> tuple[Tensor, ...]:
    """The gradients of q, k and v, and given `branch` those of index_q and index_k, and the loss."""
    q, k, num_kv_heads, seqlen_k = x.q, x.k, problem.num_kv_heads, x.k.shape[2]
    topk = problem.topk or cdiv(seqlen_k, problem.block_size)
    sizes = implementation.tiles(problem, config)
    bytes_per_entry = entry_bytes(problem, sizes, branch is not None)
    if branch is not None:
        loss_settings = constants_of(problem, sizes, q.device)
        bytes_per_entry += bytes_per_slot(branch, loss_settings[1], config.length)
    rows_per_token = topk * cdiv(sizes.tile_rows, sizes.entries)
    range_tokens = tokens_per_range(q.shape[0] * q.shape[2], topk * bytes_per_entry)
    # Rows are numbered in 32 bits, up to two tiles past the last.
    range_tokens = max(1, min(range_tokens, (2**31 - 1) // rows_per_token - 2 * sizes.tile_rows))

    grad_q = q.new_empty(q.shape)
    grad_k, grad_v = x.lse.new_zeros(2, *k.shape).unbind()
    sums = KeyGradients(grad_k, grad_v, num_kv_heads, seqlen_k)
    statistics = row_statistics(x.grad_out, x.grad_lse, x.out, x.lse, problem)
    workspace = loss = None
    for index in inverse_indexes(x.block_indices, x.sequences, q, k, problem.block_size, range_tokens):
        items = cut_into_items(index, config.length)
        if workspace is None:
            # No later index has more tokens.
            tokens = index.num_tokens, index.range_tokens
            per_pass = ranges_per_pass(num_kv_heads, *tokens, topk * bytes_per_entry, rows_per_token)
            entries, slots = per_pass * items.num_entries, per_pass * items.num_slots
            workspace = make_workspace(q, x.lse, x.sequences, sizes, entries, slots, branch is not None)
            launches = implementation.gradient_launches(x.grad_out, q, k, x.v, workspace, problem, config)
        if branch is not None:
            loss = prepare(branch, workspace, index, items, per_pass, x.sequences, problem, *loss_settings)
        work = Work(items, workspace.rows, workspace.partial, sums, 0, index.num_ranges // num_kv_heads)
        grid, given = (items.num_items, 0, 1), {"work": work, "scale": x.scale}
        steps = [
            gather_rows(index, statistics, workspace, num_kv_heads),
            *(PassLaunch(launch._replace(grid=grid, arguments=launch.arguments | given)) for launch in launches),
            *sum_items(index, work, problem),
            sum_slots(index, workspace, grad_q, num_kv_heads),
            *([] if loss is None else loss.launches),
        ]
        for first in range(0, index.num_ranges, per_pass):
            run_pass(steps, first, min(per_pass, index.num_ranges - first))
    if loss is None:
        return grad_q, *finish(sums, k, x.v, None)
    loss_sums = loss.sums()
    main = grad_q, *finish(sums, k, x.v, loss_sums)
    return *main, loss.grad_index_q(), loss_sums.grad_k, loss_sums.loss


def backward_config(problem: Problem, device: torch.device) -> BackwardConfig:
    """The configuration for a problem on a device: the default, or what tuning found."""
    target = target_of(device)
    return tuned_config("backward", problem, target, default_config(problem, target), DEPENDS_ON)


def block_sparse_attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor | None,
    sequences: Tensor,
    block_size: int,
    scale: float,
    config: BackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_q, grad_k, grad_v from the gradients of out and lse (None for zero).

    `config` overrides the choice of tiles, for tests and tuning.
    """
    x = Inputs(grad_out, grad_lse, q, k, v, out, lse, block_indices, sequences, block_size, scale)
    problem = x.problem()
    if q.numel() * k.numel() * (1 if block_indices is None else block_indices.shape[3]) == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    config = config or backward_config(problem, q.device)
    implementation = choose(GRADIENTS, problem, target_of(q.device), config)
    grad_q, grad_k, grad_v = find_gradients(x, problem, implementation, config, None)
    return grad_q, grad_k, grad_v


def attention_and_index_loss_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    loss: tuple[Tensor, Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    sequences: Tensor,
    block_size: int,
    scale: float,
    index_scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, index_q and index_k, and the index loss, a fp32 scalar.

    loss: its gradient, and its count as for `index_loss`, scalars.
    """
    main = grad_out, grad_lse, q, k, v, out, lse, block_indices, sequences, block_size, scale
    x, (grad_loss, count) = Inputs(*main), loss
    problem = x.problem(index_q.shape[3])
    config = backward_config(problem, q.device)
    implementation = choose(GRADIENTS, problem, target_of(q.device), config)
    if q.numel() * k.numel() * block_indices.shape[3] > 0 and implementation.leaves_teacher(problem, config):
        branch = IndexBranch(index_q, index_k, grad_loss, index_scale, count)
        return find_gradients(x, problem, implementation, config, branch)
    branches = q, k, index_q, index_k, block_indices, lse, sequences
    value, *unit_grads = index_loss(*branches, block_size, scale, index_scale, True, count)
    index = [(grad * grad_loss).to(x.dtype) for grad, x in zip(unit_grads, (index_q, index_k), strict=True)]
    return *block_sparse_attention_backward(*main), *index, value
