"""The main branch and its peers on a GPU: a part of `benchmarks/gpu.py`.

All attend at M3's shape (gpu_training.py), forward and backward: ours and `parallel_nsa` of flash-linear-attention to
the same given blocks, the dense peers to every block up to the query.

`parallel_nsa` computes its selected branch alone, without compression, gates or window. Its inputs are converted to its
layout [B, T, H, D] before the measurement. Its own tuner picks the tile sizes, independently of the length, so it runs
once, at 8K tokens. Its forward also computes the means of keys and values, which a caller cannot turn off.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

import flexmsa
from benchmarks.gpu_training import (
    BLOCK,
    PATTERNS,
    TOPK,
    Timer,
    backward_time,
    chosen,
    dense,
    main_branch_times,
    training_inputs,
)

LENGTHS = [8192, 32768, 131072]
CHOSEN = ["random", "neighbours share"]
# From q, k and v to out, in the peer's own layout.
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# From a selection to attention to its blocks.
Sparse = Callable[[Tensor], Attend]


def token_major(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, H, S, ...] to [B, S, H, ...], or back, contiguous."""
    return tuple(x.transpose(1, 2).contiguous() for x in tensors)


def parallel_nsa() -> tuple[str, Sparse] | None:
    """The peer's name and its attention to given blocks; None, with a printed reason, if it cannot be timed."""
    try:
        from fla.ops.nsa import parallel_nsa as function
    except ImportError as error:
        print(f"no rows of parallel_nsa ({error}): pip install flash-linear-attention", flush=True)
        return None

    def sparse(ids: Tensor) -> Attend:
        # parallel_nsa also ignores ids of -1; block_counts is the width of the selection.
        return partial(function, block_indices=token_major(ids)[0], block_counts=TOPK, block_size=BLOCK)

    try:
        wrong = "; ".join(disagreements(sparse))
    except Exception as error:  # an error of this peer must not stop the others
        wrong = f"{type(error).__name__}: {error}"
    if wrong:
        print(f"no rows of parallel_nsa, which does not agree with ours: {wrong}", flush=True)
        return None
    return f"parallel_nsa (fla {version('fla-core')})", sparse


def disagreements(sparse: Sparse, seqlen: int = 8192) -> Iterator[str]:
    """The results of a token-major peer that differ from ours by more than the rounding errors of bf16."""
    inputs = training_inputs(seqlen)[:3]
    ids, grad = chosen(PATTERNS["random"], seqlen), torch.randn_like(inputs[0])

    def results(attend: Attend, tensors: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, grad)

    ours = results(partial(flexmsa.block_sparse_attention, block_indices=ids, block_size=BLOCK), inputs, grad)
    theirs = token_major(*results(sparse(ids), token_major(*inputs), *token_major(grad)))
    for name, actual, expected in zip(("out", "dq", "dk", "dv"), theirs, ours, strict=True):
        error = relative_error(actual, expected)
        if not error < 2e-2:
            yield f"{name} is off by {error:.1e}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The largest error of a token, over all heads, relative to its norm or to the mean norm if that is larger.

    Per token, because many elements are near zero by cancellation, and a few wrong tokens would not show in the whole.
    """
    norms = torch.linalg.vector_norm(expected.float(), dim=(1, 3))
    errors = torch.linalg.vector_norm(actual.float() - expected.float(), dim=(1, 3))
    return (errors / norms.clamp(min=norms.mean())).max().item()


def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def dense_peers(seqlen: int) -> dict[str, Attend]:
    """The peers that attend to every block up to the query; FlexAttention is compiled for this length."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    # When the compiler's cache for FlexAttention is full (of our own calls or of other lengths), FlexAttention runs
    # uncompiled and allocates S x S scores. Therefore the cache is cleared, and fullgraph makes this case an error.
    torch._dynamo.reset()
    mask = torch.compile(create_block_mask)(causal, None, None, seqlen, seqlen, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    flex = partial(compiled, block_mask=mask, enable_gqa=True)
    return {"dense cuDNN": dense, "dense flash": flash, "dense FlexAttention": flex}


def times(attend: Attend, inputs: tuple[Tensor, ...], grad: Tensor, timer: Timer) -> Iterator[tuple[str, float | str]]:
    """Milliseconds of a peer's forward and of its backward, or the error message if it fails."""
    for direction, measure in (
        ("forward", lambda: timer(lambda: attend(*inputs))),
        ("backward", lambda: backward_time(attend, inputs, grad, timer)),
    ):
        try:
            yield direction, measure()
        except Exception as error:  # out of memory, or an unsupported shape: report it and continue
            yield direction, f"{type(error).__name__}: {str(error)[:80]}"


def peer_times(seqlen: int, timer: Timer, nsa: tuple[str, Sparse] | None) -> Iterator[tuple[str, float | str]]:
    """("peer, blocks, direction", milliseconds) at one length."""
    inputs = training_inputs(seqlen)[:3]
    grad = torch.randn_like(inputs[0])
    for pattern in CHOSEN:
        ids = chosen(PATTERNS[pattern], seqlen)
        for direction, time in main_branch_times(inputs, ids, grad, None, timer):
            yield f"flexmsa, {pattern}, {direction}", time
        if nsa is not None:
            name, sparse = nsa
            for direction, time in times(sparse(ids), token_major(*inputs), *token_major(grad), timer):
                yield f"{name}, {pattern}, {direction}", time
    for name, attend in dense_peers(seqlen).items():
        for direction, time in times(attend, inputs, grad, timer):
            yield f"{name}, every block, {direction}", time
