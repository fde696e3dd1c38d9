"""Backward of block-sparse attention: one pass over the key/value blocks and the queries that chose them.

    P = exp(scale Q K^T - lse),  dS = P * (dO V^T - delta),  delta = rowsum(dO * O) - dlse
    dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO        a query that sees no key gets 0

Layouts: q, out, grad_out [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], lse, grad_lse [B, Hq, Sq] fp32, any strides;
block_indices [B, Hkv, Sq, topk], or None for every visible block; sequences as in `flexmsa.kernels`. The gradients are
contiguous. Programs do not accumulate into one result, so the results are the same bits every time.

`statistics_kernel` computes delta. Then each token range (see `inverse_index`) takes four launches:

- `gather_kernel` writes, in the order of the lists, what each entry and its G rows need (`preprocess`);
- `gradient_kernel`: one program owns one work item of a block's list, and computes its dK, dV and dQ (`gradient`, and
  for Hopper `gradient_sm90`);
- `sum_items_kernel`: one program owns some keys of a block whose list has several work items, and adds them in order;
- `sum_slots_kernel`: one program owns some heads of one token, and sums dQ over its top-k slots in order (`reduce`).

For E = B Hkv Sq topk entries and R = E G rows: 10 R block_size D FLOPs; 2 R D elements of q and dO are gathered, R D of
dQ written and read again. At M3's shape and 128K tokens, bf16: 22 TFLOP, 28 ms, beside 68 + 69 GB, 32 ms, of which
reading dQ, 8 ms, does not overlap with the products.
"""

from typing import Any

import triton
from torch import Tensor

from ...problem import Problem
from ...tuning import tuned_config
from ...workspace import tokens_per_range
from ..common.launch import choose
from ..common.target import GLUON, target_of
from ..common.tiles import tma_ready
from ..loss.launch import index_loss
from ..schedule.inverse_index import inverse_indexes
from ..schedule.work_items import cut_into_items
from . import gradient
from .config import DEPENDS_ON, BackwardConfig, default_config
from .preprocess import gather_rows, row_statistics
from .reduce import sum_items, sum_slots
from .workspace import KeyGradients, Work, make_workspace

# The first that supports a problem runs. Other versions of Triton may lack what the kernel in Gluon needs.
GRADIENTS: tuple[Any, ...] = (gradient,)
if GLUON:
    from . import gradient_sm90

    GRADIENTS = (gradient_sm90, *GRADIENTS)


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
    num_kv_heads, seqlen_k = k.shape[1:3]
    topk = triton.cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    sums = KeyGradients(lse.new_zeros(k.shape), lse.new_zeros(k.shape), num_kv_heads, seqlen_k)
    if q.numel() * topk * seqlen_k == 0:
        return q.new_zeros(q.shape), sums.k.to(k.dtype), sums.v.to(v.dtype)
    grad_q = q.new_empty(q.shape)
    target = target_of(q.device)
    problem = Problem(
        num_kv_heads=num_kv_heads,
        dtype=q.dtype,
        group_size=q.shape[1] // num_kv_heads,
        head_dim=q.shape[3],
        block_size=block_size,
        bulk_copies=all(map(tma_ready, (grad_out, q, k, v))),
    )
    config = config or tuned_config("backward", problem, target, default_config(problem, target), DEPENDS_ON)
    implementation = choose(GRADIENTS, problem, target, config)

    range_tokens = backward_range(q, topk, problem, config)
    num_entries = min(range_tokens, q.shape[0] * q.shape[2]) * topk
    heads_inside = implementation.puts_heads_inside(problem)
    workspace = make_workspace(q, lse, sequences, problem, num_entries, slots_of(num_entries, config), heads_inside)
    statistics = row_statistics(grad_out, grad_lse, out, lse, problem)
    launches = implementation.gradient_launches(grad_out, q, k, v, workspace, problem, config)
    for index in inverse_indexes(block_indices, sequences, q, k, block_size, range_tokens):
        items = cut_into_items(index, config.length)
        per_group = index.num_ranges // num_kv_heads
        for number in range(index.num_ranges):
            group, first_token = number // per_group, number % per_group * index.range_tokens
            num_tokens = min(index.range_tokens, index.num_tokens - first_token)
            gather_rows(index, statistics, workspace, number, num_tokens * topk, problem)
            work = Work(items, workspace.rows, workspace.partial, sums, number, group)
            for launch in launches:
                arguments = launch.arguments | {"work": work, "scale": scale}
                launch._replace(grid=(items.num_items, 1, 1), arguments=arguments).run()
            sum_items(index, work, problem)
            sum_slots(workspace, grad_q, group, index.first_token + first_token, num_tokens, topk, problem)
    return grad_q, sums.k.to(k.dtype), sums.v.to(v.dtype)


def backward_range(q: Tensor, topk: int, problem: Problem, config: BackwardConfig) -> int:
    """Tokens of a token range: as many as the workspace holds, with rows that are numbered in 32 bits."""
    rows = topk * problem.group_size
    tokens = tokens_per_range(q.shape[0] * q.shape[2], rows * problem.head_dim * problem.element_size)
    return max(1, min(tokens, (2**31 - 1) // rows - 2 * config.rows))


def slots_of(num_entries: int, config: BackwardConfig) -> int:
    """Most slots of work items that the lists of a token range need: only lists of several work items have slots."""
    return 2 * num_entries // config.length if num_entries > config.length else 0


def attention_and_index_loss_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grad_loss: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, index_q and index_k, and the index loss, a scalar; grad_loss is a scalar tensor."""
    main = block_sparse_attention_backward(
        grad_out, grad_lse, q, k, v, out, lse, block_indices, sequences, block_size, scale
    )
    branches = q, k, index_q, index_k, block_indices, lse, sequences
    loss, *unit_grads = index_loss(*branches, block_size, scale, index_scale, True)
    index = [(grad * grad_loss).to(x.dtype) for grad, x in zip(unit_grads, (index_q, index_k), strict=True)]
    return *main, index[0], index[1], loss
