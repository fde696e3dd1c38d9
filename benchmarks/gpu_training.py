"""Training, prefill and dense attention on a GPU: a part of `benchmarks/gpu.py`.

The main branch, the KL loss and the selection are first checked against the float64 oracle, on shapes that reach every
kernel, then timed on four kinds of selections. Times are milliseconds at M3's shape: 64 query heads, 4 KV heads, head
dim 128, blocks of 128 keys, topk 16, bf16, causal, batch 1.
"""

from collections.abc import Callable, Iterator
from time import perf_counter

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flexmsa
from flexmsa import AuxRequest, MSAConfig, MSAttention
from flexmsa.testing import Case, check_case

HEADS, GROUPS, DEPTH, BLOCK, TOPK = 64, 4, 128, 128, 16
SETTINGS = {"block_size": BLOCK, "topk": TOPK}
Timer = Callable[[Callable[[], object]], float]
# By default, compiled code may free its buffers in a backward, but here a backward runs many times.
functorch_config.donated_buffer = False


def chosen(scores: Callable[[int, Tensor, int], Tensor], seqlen: int) -> Tensor:
    """block_indices [1, 4, S, 16]: the local block, and the best blocks by scores(group, queries, blocks)."""
    num_blocks = -(-seqlen // BLOCK)
    ids = torch.empty(1, GROUPS, seqlen, TOPK, dtype=torch.int32, device="cuda")
    block = torch.arange(num_blocks, device="cuda")
    for group in range(GROUPS):
        for query in torch.arange(seqlen, device="cuda").split(8192):
            newest = (query // BLOCK)[:, None]
            best = scores(group, query, num_blocks).masked_fill(block == newest, torch.inf)
            best = torch.nn.functional.pad(best.masked_fill(block > newest, -torch.inf), (0, TOPK), value=-torch.inf)
            found = best.topk(TOPK)
            ordered = found.indices.masked_fill(found.values == -torch.inf, num_blocks + 1).sort().values
            ids[0, group, query] = ordered.masked_fill(ordered > num_blocks, -1).int()
    return ids


def random_selection(group: int, query: Tensor, num_blocks: int) -> Tensor:
    return torch.rand(len(query), num_blocks, device="cuda")


def first_block_hot(group: int, query: Tensor, num_blocks: int) -> Tensor:
    """Random, but 99 % of the queries choose block 0."""
    scores = torch.rand(len(query), num_blocks, device="cuda")
    scores[:, 0] += (torch.rand(len(query), device="cuda") < 0.99) * 2.0
    return scores


def neighbours_share(group: int, query: Tensor, num_blocks: int) -> Tensor:
    """Scores that change every 64 tokens, and noise: eight neighbours choose about 18 different blocks together."""
    generator = torch.Generator("cuda").manual_seed(group)
    slow = torch.randn(num_blocks * BLOCK // 64 + 1, num_blocks, device="cuda", generator=generator)
    scores = slow[query // 64] + 0.05 * torch.randn(len(query), num_blocks, device="cuda")
    scores[:, 0] = torch.inf
    return scores


def eight_hot_blocks(group: int, query: Tensor, num_blocks: int) -> Tensor:
    """Every query chooses the visible ones of eight blocks, and other blocks at random."""
    scores = torch.rand(len(query), num_blocks, device="cuda")
    scores[:, :: max(1, num_blocks // 8)] += 2.0
    return scores


PATTERNS = {
    "random": random_selection,
    "block 0 hot": first_block_hot,
    "neighbours share": neighbours_share,
    "8 hot blocks": eight_hot_blocks,
}

CASES = [
    # B, Hkv, G, D, Di, Sq, Sk, block_size, topk
    Case(1, 2, 16, 128, 128, 700, 700, 128),
    Case(1, 2, 4, 128, 64, 600, 600, 64, 4),
    Case(2, 1, 3, 80, 80, 333, 333, 48, 5),
    Case(1, 3, 5, 64, 32, 90, 500, 16, 9),
    Case(1, 1, 7, 96, 96, 300, 300, 32, None),
    Case(1, 1, 12, 32, 32, 400, 400, 16, 3, cu_seqlens=(0, 1, 130, 400)),
    Case(1, 4, 1, 64, 64, 257, 257, 16, 16, strided=True),
    Case(2, 1, 6, 16, 16, 200, 260, 32, kv_starts=(0, 31), kv_lens=(260, 231)),
    Case(1, 1, 64, 64, 64, 150, 150, 16, values="ties"),
    # Shapes of the Hopper kernels: documents, and keys that end within a block.
    Case(1, 2, 8, 64, 64, 700, 700, 64, 16, cu_seqlens=(0, 1, 300, 700)),
    Case(1, 2, 32, 64, 64, 900, 900, 128, 3, cu_seqlens=(0, 2, 300, 900)),
    Case(2, 2, 16, 128, 16, 300, 475, 128, 16, kv_starts=(0, 31), kv_lens=(475, 446)),
    Case(1, 1, 2, 256, 256, 300, 300, 256, 1),
]


def training_errors(backend: str | None = None) -> Iterator[str]:
    """The errors of out, lse, loss and gradients, case by case."""
    for number, case in enumerate(CASES):
        for dtype in ("bfloat16", "float16", "float32") if number in (2, 3) else ("bfloat16",):
            try:
                check_case(Case(**{**vars(case), "dtype": dtype}), device="cuda", backend=backend)
            except AssertionError as error:
                yield f"{dtype} {case}: {error}"
    yield from repeat_errors()
    yield from poison_errors()


def repeat_errors() -> Iterator[str]:
    """Results that differ between two runs, on a selection with split lists and with both orders of work."""
    inputs = training_inputs(16384)
    ids = chosen(eight_hot_blocks, 16384)
    ids[:, :, 8192:] = chosen(neighbours_share, 16384)[:, :, 8192:]
    first, second = (train_step(*inputs, ids) for _ in range(2))
    names = ("out", "loss", "q", "k", "v", "index_q", "index_k")
    for name, x, y in zip(names, first, second, strict=True):
        if not torch.equal(x, y):
            yield f"{name} is not repeatable"
        if not x.isfinite().all():
            yield f"{name} is not finite"


def poison_errors() -> Iterator[str]:
    """Results that depend on memory beyond the last key of a block, or on a NaN in another token's gradient."""
    *inputs, _, _ = (x[:, :, :500] for x in training_inputs(512))
    _, k, v = inputs
    ids = chosen(random_selection, 500)
    end = torch.tensor([460], device="cuda", dtype=torch.int32)

    def results(grad: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = flexmsa.block_sparse_attention(*leaves, ids, block_size=BLOCK, kv_lens=end)
        grads = torch.autograd.grad(out, leaves, grad)
        return [out, grads[0], *(x[:, :, :460] for x in grads[1:])]

    grad = torch.randn_like(inputs[0])
    kept = results(grad)
    k[:, :, 460:] = v[:, :, 460:] = torch.nan
    if not all(map(torch.equal, results(grad), kept)):
        yield "memory beyond the last key changes a result"
    grad[:, :, 300] = torch.nan
    _, grad_q, *grads = results(grad)
    if not torch.equal(grad_q.isfinite().all(3)[0, 0], torch.arange(500, device="cuda") != 300):
        yield "a NaN in one token's gradient reaches another's"
    # Token 300 is in block 2 and sees no later one.
    if not all(x[:, :, 384:].isfinite().all() for x in grads):
        yield "a NaN in one token's gradient reaches keys that it does not see"


def training_inputs(seqlen: int) -> tuple[Tensor, ...]:
    """q, k, v, index_q, index_k."""
    return tuple(
        torch.randn(1, heads, seqlen, DEPTH, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, GROUPS, GROUPS, GROUPS, 1)
    )


def train_step(q: Tensor, k: Tensor, v: Tensor, index_q: Tensor, index_k: Tensor, ids: Tensor) -> list[Tensor]:
    """out, loss and the gradients of all five inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, index_q, index_k)]
    out, aux = flexmsa.block_sparse_attention(*leaves[:3], ids, block_size=BLOCK, return_aux=AuxRequest(lse=True))
    loss = flexmsa.index_loss(*leaves[:2], *leaves[3:], ids, aux.lse, block_size=BLOCK)
    weight = torch.linspace(-1, 1, DEPTH, device="cuda", dtype=out.dtype)
    return [out, loss, *torch.autograd.grad((out * weight).sum() + loss, leaves)]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def backward_time(call: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor | None, timer: Timer) -> float:
    """Milliseconds of the backward of call(*inputs) alone."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = call(*leaves)
    return timer(lambda: torch.autograd.grad(result, leaves, grad, retain_graph=True))


def training_times(seqlen: int, timer: Timer, dense_timer: Timer, launch_timer: Timer) -> Iterator[tuple[str, float]]:
    """(name, milliseconds) of all steps of a training layer at one length, of its launches, and of dense attention."""
    q, k, v, index_q, index_k = training_inputs(seqlen)
    grad = torch.randn_like(q)
    yield "dense cuDNN, forward", dense_timer(lambda: dense(q, k, v))
    yield "dense cuDNN, backward", backward_time(dense, (q, k, v), grad, dense_timer)
    yield "selection", timer(lambda: flexmsa.select_blocks(index_q, index_k, **SETTINGS))

    def loss_gradient(ids: Tensor, lse: Tensor) -> None:
        leaves = index_q.detach().requires_grad_(), index_k.detach().requires_grad_()
        torch.autograd.grad(flexmsa.index_loss(q, k, *leaves, ids, lse, block_size=BLOCK), leaves)

    for pattern, scores in PATTERNS.items():
        ids = chosen(scores, seqlen)
        for direction, time in main_branch_times((q, k, v), ids, grad, None, timer):
            yield f"{pattern}, main branch, {direction}", time
        aux = AuxRequest(lse=True)
        lse = flexmsa.block_sparse_attention(q, k, v, ids, block_size=BLOCK, return_aux=aux)[1].lse
        yield f"{pattern}, KL value and gradient", timer(lambda ids=ids, lse=lse: loss_gradient(ids, lse))

    def step() -> None:
        train_step(q, k, v, index_q, index_k, flexmsa.select_blocks(index_q, index_k, **SETTINGS))

    yield "launches", launch_timer(step)


def main_branch_times(
    inputs: tuple[Tensor, ...], ids: Tensor, grad: Tensor, backend: str | None, timer: Timer
) -> Iterator[tuple[str, float]]:
    """Milliseconds of the main branch's forward and backward with given blocks."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flexmsa.block_sparse_attention(q, k, v, ids, block_size=BLOCK, backend=backend)

    yield "forward", timer(lambda: attend(*inputs))
    yield "backward", backward_time(attend, inputs, grad, timer)


def flex_times(seqlen: int, timer: Timer, patterns: list[str]) -> Iterator[tuple[str, float]]:
    """Times of the main branch by FlexAttention with our BlockMask."""
    q, k, v, _, _ = training_inputs(seqlen)
    for pattern in patterns:
        ids = chosen(PATTERNS[pattern], seqlen)
        for direction, time in main_branch_times((q, k, v), ids, torch.randn_like(q), "flex", timer):
            yield f"{pattern}, main branch by FlexAttention, {direction}", time


def step_times(seqlen: int, repeats: int = 10) -> Iterator[tuple[str, float]]:
    """(mode, milliseconds) of a training step of the whole layer: wall-clock time, with the host's launches."""
    torch.manual_seed(0)
    config = MSAConfig(hidden_size=2048, num_heads=HEADS, num_kv_heads=GROUPS, head_dim=DEPTH, index_head_dim=DEPTH)
    layer = MSAttention(config).to("cuda", torch.bfloat16)
    x = torch.randn(1, seqlen, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    for how in ("eager", "default", "reduce-overhead"):
        torch._dynamo.reset()
        call = layer if how == "eager" else torch.compile(layer, fullgraph=True, dynamic=False, mode=how)

        def step(call: Callable = call) -> None:
            torch.compiler.cudagraph_mark_step_begin()
            layer.zero_grad(set_to_none=True)
            out, loss = call(x)
            (out.float().square().mean() + loss).backward()

        for _ in range(4):
            step()
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
        yield how, (perf_counter() - start) / repeats * 1e3


def prefill_times(seqlen: int, timer: Timer, patterns: list[str]) -> Iterator[tuple[str, float]]:
    """(name, milliseconds) of the forward steps alone, at a length where dense attention takes seconds."""
    q, k, v, index_q, index_k = training_inputs(seqlen)

    def compiled_and_timed(call: Callable[[], object]) -> float:
        call()
        return timer(call)

    yield "selection", compiled_and_timed(lambda: flexmsa.select_blocks(index_q, index_k, **SETTINGS))
    e4m3 = [x.to(torch.float8_e4m3fn) for x in (index_q, index_k)]
    yield "selection, e4m3", compiled_and_timed(lambda: flexmsa.select_blocks(*e4m3, **SETTINGS))
    for pattern in patterns:
        ids = chosen(PATTERNS[pattern], seqlen)
        attend = lambda ids=ids: flexmsa.block_sparse_attention(q, k, v, ids, block_size=BLOCK)  # noqa: E731
        yield f"{pattern}, main branch, forward", compiled_and_timed(attend)
    yield "dense cuDNN, forward", timer(lambda: dense(q, k, v))


def floors(seqlen: int, flops: float, bandwidth: float) -> dict[str, float]:
    """Milliseconds that the FLOPs of each step take; for key-major work also its bytes (docs/notes/kernels.md)."""
    product = 2.0 * HEADS * DEPTH * seqlen * TOPK * BLOCK / flops * 1e3
    gather = 2.0 * HEADS * DEPTH * seqlen * TOPK / bandwidth * 1e3
    return {
        "main branch, forward": 2 * product,
        "main branch, backward": 5 * product,
        "main branch, forward, bytes in KV-outer order": 3 * gather,
        "main branch, backward, bytes in KV-outer order": 4 * gather,
        "KL value and gradient": product * (1 + 3 * GROUPS / HEADS),
        "selection": 1.0 * GROUPS * DEPTH * seqlen**2 / flops * 1e3,
        "dense, forward": 2.0 * HEADS * DEPTH * seqlen**2 / flops * 1e3,
    }
