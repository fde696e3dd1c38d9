"""A training step of a layer beside flash-msa's, the other MSA that trains on Hopper: a part of `benchmarks/gpu.py`.

A step is the selection, the forward, and the backward of all five inputs with the gradient of the index loss. flash-msa
(0.1.1: head dim 128, blocks of 128, lengths that are multiples of 128) is timed where it is installed, on the same
inputs, after its results are compared with ours. Its scores are rounded to bf16 before they are ranked, so that some
blocks tie, and it selects other ones of them; the gradients are compared for its own selection. The loss that it
returns is 0, and so is ours in this mode: its value is there after the backward.
"""

from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import NamedTuple

import torch
from torch import Tensor

import flexmsa
from benchmarks.gpu_training import BLOCK, DEPTH, SETTINGS, TOPK, Timer
from flexmsa import AuxRequest

# (query heads, KV heads) -> lengths.
LAYERS = {(64, 4): (8192, 32768, 131072), (32, 8): (32768, 131072)}
SCALE = DEPTH**-0.5
NAMES = ("out", "q", "k", "v", "index_q", "index_k")
# Of all selected blocks, those that both select; and the relative error of out and gradients, two results in bf16.
LEAST_SAME, MOST_ERROR = 0.98, 5e-3
# From q, k, v, index_q, index_k and the gradient of out to out and the gradients of the five.
Step = Callable[[tuple[Tensor, ...], Tensor], list[Tensor]]


class Peer(NamedTuple):
    """name; step; select: from index_q and index_k to ids, of which those out of range are no block."""

    name: str
    step: Step
    select: Callable[[Tensor, Tensor], Tensor]


def layer_inputs(heads: int, kv_heads: int, seqlen: int) -> tuple[Tensor, ...]:
    """q, k, v, index_q, index_k."""
    counts = heads, kv_heads, kv_heads, kv_heads, 1
    return tuple(torch.randn(1, n, seqlen, DEPTH, device="cuda", dtype=torch.bfloat16) for n in counts)


def our_step(inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = torch.zeros((), device=grad.device)
    aux = AuxRequest(index_loss=True)
    out, found = flexmsa.attention(*leaves, **SETTINGS, return_aux=aux, index_loss_value=value)
    loss = found.index_loss
    return [out.detach(), *torch.autograd.grad((out, loss), leaves, (grad, torch.ones_like(loss)))]


def given_step(inputs: tuple[Tensor, ...], grad: Tensor, ids: Tensor) -> list[Tensor]:
    """Ours with the given blocks."""
    q, k, v, index_q, index_k = leaves = [x.detach().requires_grad_() for x in inputs]
    out, aux = flexmsa.block_sparse_attention(q, k, v, ids, block_size=BLOCK, return_aux=AuxRequest(lse=True))
    loss = flexmsa.index_loss(q, k, index_q, index_k, ids, aux.lse, block_size=BLOCK)
    return [out.detach(), *torch.autograd.grad((out, loss), leaves, (grad, torch.ones_like(loss)))]


def flash_msa() -> Peer | None:
    """flash-msa; None, with a printed reason, if it cannot be timed."""
    try:
        from flash_msa import flash_msa_func
        from flash_msa.msa_select_cutedsl import select_blocks
    except Exception as error:  # the libraries that it loads have errors of their own
        print(f"no rows of flash-msa ({type(error).__name__}: {error}): pip install flash-msa", flush=True)
        return None

    def step(inputs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
        q, k, v, index_q, index_k = leaves = [x.detach().requires_grad_() for x in inputs]
        # It takes topk in keys, and returns out as [B, S, Hq D].
        out, loss = flash_msa_func(index_q, index_k, q, k, v, TOPK * BLOCK, SCALE)
        out = out.unflatten(2, (q.shape[1], DEPTH)).transpose(1, 2)
        return [out.detach(), *torch.autograd.grad((out, loss), leaves, (grad, torch.ones_like(loss)))]

    def select(index_q: Tensor, index_k: Tensor) -> Tensor:
        num_blocks = index_k.shape[2] // BLOCK
        return select_blocks(index_q, index_k, scale=SCALE, num_blocks=num_blocks, top_k_blocks=TOPK)

    return Peer(f"flash-msa {version('flash-msa')}", step, select)


def disagreements(peer: Peer, inputs: tuple[Tensor, ...]) -> Iterator[str]:
    """How a peer's selection and gradients differ from ours, where they differ by more than rounding."""
    grad = torch.randn_like(inputs[0])
    theirs, ours = peer.select(*inputs[3:]), flexmsa.select_blocks(*inputs[3:], **SETTINGS)
    num_blocks = inputs[1].shape[2] // BLOCK
    theirs = theirs.int().masked_fill((theirs < 0) | (theirs >= num_blocks), -1)
    same = share_of_same(theirs, ours)
    if not same >= LEAST_SAME:
        yield f"{same:.1%} of the blocks are the same"
    expected = given_step(inputs, grad, theirs)
    for name, found, right in zip(NAMES, peer.step(inputs, grad), expected, strict=True):
        error = ((found.float() - right.float()).norm() / right.float().norm()).item()
        if not error <= MOST_ERROR:
            yield f"{name} is off by {error:.1e}"


def share_of_same(first: Tensor, second: Tensor) -> float:
    """Of the blocks in `second`, the share that the same query selects in `first`; -1 is no block.

    >>> share_of_same(torch.tensor([[3, 1, -1]]), torch.tensor([[0, 1, -1]]))
    0.5
    """
    there = (first[..., :, None] == second[..., None, :]).any(-2) & (second >= 0)
    return int(there.sum()) / int((second >= 0).sum())


def step_times(
    timer_of: Callable[[int], Timer], layers: dict[tuple[int, int], tuple[int, ...]]
) -> Iterator[tuple[str, float | str, dict[str, float]]]:
    """("step heads, length: peer", milliseconds or an error, {"ratio": to ours}) of each layer and length."""
    peer = flash_msa()
    for (heads, kv_heads), lengths in layers.items():
        checked = peer
        if peer is not None:
            checked = agreeing(peer, layer_inputs(heads, kv_heads, 8192))
        for seqlen in lengths:
            timer, name = timer_of(seqlen), f"step {heads}/{kv_heads}, {seqlen}"
            inputs = layer_inputs(heads, kv_heads, seqlen)
            grad = torch.randn_like(inputs[0])
            ours = timer(lambda inputs=inputs, grad=grad: our_step(inputs, grad))
            yield f"{name}: flexmsa", ours, {}
            if checked is not None:
                try:
                    theirs = timer(lambda inputs=inputs, grad=grad, step=checked.step: step(inputs, grad))
                    yield f"{name}: {checked.name}", theirs, {"ratio": theirs / ours}
                except Exception as error:  # out of memory, or a length that it does not take
                    yield f"{name}: {checked.name}", f"{type(error).__name__}: {str(error)[:80]}", {}


def agreeing(peer: Peer, inputs: tuple[Tensor, ...]) -> Peer | None:
    """The peer, if its results agree with ours; else None, with a printed reason."""
    try:
        wrong = "; ".join(disagreements(peer, inputs))
    except Exception as error:  # an error of this peer must not stop the others
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        heads = f"{inputs[0].shape[1]}/{inputs[1].shape[1]}"
        print(f"no rows of {peer.name} at {heads} heads, which does not agree with ours: {wrong}", flush=True)
    return None if wrong else peer
