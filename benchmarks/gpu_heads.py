"""A training step of a layer at other numbers of heads: a part of `benchmarks/gpu.py`.

The index loss is computed in the backward. It is first compared with the one that the forward computes, then all steps
are timed beside dense attention by cuDNN. Milliseconds, bf16, causal, batch 1.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flexmsa
from flexmsa import AuxRequest, ops
from flexmsa._sequences import Sequences

from .gpu_training import Timer, backward_time

INDEX_DEPTH = 128


class Layout(NamedTuple):
    """Heads of a layer, and its tokens; goal: milliseconds of selection, forward and backward, selected at random."""

    heads: int
    groups: int
    depth: int
    tokens: int
    goal: float
    block: int = 128
    topk: int = 16

    @property
    def name(self) -> str:
        return f"{self.heads}/{self.groups}/{self.depth}, blocks {self.block}, {self.tokens}"


LAYOUTS = (
    Layout(64, 4, 128, 1 << 17, 96),
    Layout(32, 8, 128, 1 << 17, 78),
    Layout(32, 8, 128, 1 << 15, 14),
    Layout(16, 8, 128, 1 << 16, 23),
    Layout(28, 4, 128, 1 << 16, 28),
    Layout(40, 8, 128, 1 << 16, 43),
    Layout(64, 8, 128, 1 << 16, 80, 64, 32),
    Layout(16, 16, 64, 1 << 16, 26),
    Layout(16, 8, 256, 1 << 15, 29),
)


class Inputs(NamedTuple):
    """q, k, v, index_q and index_k of a layer."""

    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor


def inputs_of(layout: Layout, tokens: int) -> Inputs:
    """Random inputs of `tokens` tokens; the index head dim is the head dim, at most 128."""
    index_depth = min(layout.depth, INDEX_DEPTH)
    heads = (layout.heads, layout.groups, layout.groups, layout.groups, 1)
    depths = (layout.depth,) * 3 + (index_depth,) * 2
    return Inputs(
        *(torch.randn(1, h, tokens, d, device="cuda", dtype=torch.bfloat16) for h, d in zip(heads, depths, strict=True))
    )


def block_indices(layout: Layout, tokens: int, shared: bool) -> Tensor:
    """[1, groups, tokens, topk]: the own block, and others at random, for each query or for 64 neighbours at a time."""
    newest = torch.arange(tokens, device="cuda") // layout.block
    query = torch.arange(tokens, device="cuda") // 64 * 64 if shared else torch.arange(tokens, device="cuda")
    ids = torch.empty(1, layout.groups, tokens, layout.topk, dtype=torch.int32, device="cuda")
    for group in range(layout.groups):
        # Odd steps through the older blocks from a random one: no block comes twice.
        older = newest.clamp(min=1)
        start = (torch.rand(tokens, device="cuda")[query] * older).long()
        step = torch.arange(layout.topk - 1, device="cuda") * (older[:, None] / layout.topk).clamp(min=1.0)
        chosen = (start[:, None] + step.long()) % older[:, None]
        few = newest[:, None] < layout.topk
        first = torch.arange(layout.topk - 1, device="cuda")
        chosen = torch.where(few, torch.where(first < newest[:, None], first, -1), chosen)
        ids[0, group] = torch.cat([chosen, newest[:, None]], dim=1)
    return ids


def step(layout: Layout, inputs: Inputs, ids: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """out, and the loss as a 0 with its gradient."""
    table = Sequences(inputs.q, inputs.k.shape[2]).table
    numbers = layout.block, layout.depth**-0.5, inputs.index_q.shape[3] ** -0.5, "triton"
    out, _, loss = ops.attention_and_index_loss(*inputs, ids, table, None, value, *numbers)
    return out, loss


def heads_errors() -> Iterator[str]:
    """Gradients and values that differ from those of a loss computed in the forward."""
    for layout in LAYOUTS:
        inputs = Inputs(*(x.requires_grad_() for x in inputs_of(layout, 2048)))
        ids, value = block_indices(layout, 2048, shared=False), torch.zeros((), device="cuda")
        grad = torch.randn_like(inputs.q)
        found = torch.autograd.grad(step(layout, inputs, ids, value), inputs, (grad, torch.tensor(3.0, device="cuda")))
        aux = AuxRequest(lse=True)
        out, extra = flexmsa.block_sparse_attention(*inputs[:3], ids, block_size=layout.block, return_aux=aux)
        branches = inputs.q, inputs.k, inputs.index_q, inputs.index_k
        loss = flexmsa.index_loss(*branches, ids, extra.lse, block_size=layout.block)
        expected = torch.autograd.grad((out, 3 * loss), inputs, (grad, torch.ones_like(loss)))
        for name, ours, right in zip(Inputs._fields, found, expected, strict=True):
            error = float((ours.float() - right.float()).norm() / right.float().norm())
            if not error < 5e-3:
                yield f"{layout.name}: the gradient of {name} is off by {error:.1e}"
        if not abs(float(value / loss) - 1) < 1e-3:
            yield f"{layout.name}: the loss of the backward is {float(value)}, of the forward {float(loss)}"


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def heads_times(report: Callable[..., None], timer_of: Callable[[int], Timer], layouts: tuple[Layout, ...]) -> None:
    """Report each step of each layout, and all together beside dense attention."""
    for layout in layouts:
        inputs, timer = inputs_of(layout, layout.tokens), timer_of(layout.tokens)
        grad, value = torch.randn_like(inputs.q), torch.zeros((), device="cuda")
        settings = {"block_size": layout.block, "topk": layout.topk}
        select = partial(flexmsa.select_blocks, inputs.index_q, inputs.index_k, **settings)
        selection = timer(select)
        report(f"heads {layout.name}: selection", selection)
        dense_time = timer(lambda x=inputs: dense(*x[:3])) + backward_time(dense, inputs[:3], grad, timer)
        report(f"heads {layout.name}: dense cuDNN", dense_time)
        for pattern in ("random", "shared"):
            ids = block_indices(layout, layout.tokens, pattern == "shared")
            table = Sequences(inputs.q, layout.tokens).table
            attend = partial(ops.block_sparse_attention, *inputs[:3], ids, table, layout.block, 0.1, "triton")
            forward = timer(attend)
            leaves = Inputs(*(x.detach().requires_grad_() for x in inputs))
            results, grads = step(layout, leaves, ids, value), (grad, torch.ones((), device="cuda"))
            backward = timer(partial(torch.autograd.grad, results, leaves, grads, retain_graph=True))
            together = selection + forward + backward
            report(f"heads {layout.name}: {pattern}, forward", forward)
            report(f"heads {layout.name}: {pattern}, backward with loss", backward)
            more = {"faster": dense_time / together, "goal": layout.goal}
            report(f"heads {layout.name}: {pattern}, together", together, **more)
            del results, leaves, grads
        del inputs
        torch.cuda.empty_cache()
