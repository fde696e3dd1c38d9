"""The main branch through FlexAttention on a GPU, beside dense attention: a part of `benchmarks/gpu.py`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import flexmsa

HEADS, GROUPS, DEPTH, BLOCK, TOPK = 64, 4, 128, 128, 16


def shared_by_neighbours(seqlen: int) -> Tensor:
    """block_indices [1, 4, S, 16] that change every 64 tokens, with block 0 and the local block always among them."""
    index_q = torch.randn(1, GROUPS, seqlen // 64, DEPTH, device="cuda", dtype=torch.bfloat16)
    index_q = index_q.repeat_interleave(64, dim=2)
    index_k = torch.randn(1, 1, seqlen, DEPTH, device="cuda", dtype=torch.bfloat16)
    return flexmsa.select_blocks(index_q, index_k, block_size=BLOCK, topk=TOPK, num_init_blocks=1)


def random_selection(seqlen: int) -> Tensor:
    index_q = torch.randn(1, GROUPS, seqlen, DEPTH, device="cuda", dtype=torch.bfloat16)
    index_k = torch.randn(1, 1, seqlen, DEPTH, device="cuda", dtype=torch.bfloat16)
    return flexmsa.select_blocks(index_q, index_k, block_size=BLOCK, topk=TOPK)


PATTERNS = {"random selection": random_selection, "neighbours share": shared_by_neighbours}


def main_branch_times(seqlen: int, timer: Callable[[Callable[[], object]], float]) -> dict[str, float]:
    """Milliseconds of the main branch, forward and forward + backward, of ours and of dense cuDNN attention."""
    q, k, v = (torch.randn(1, h, seqlen, DEPTH, device="cuda", dtype=torch.bfloat16) for h in (HEADS, GROUPS, GROUPS))
    grad = torch.randn_like(q)

    def train(attend: Callable[..., Tensor]) -> None:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        torch.autograd.grad(attend(*leaves), leaves, grad)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    times = {
        "dense cuDNN, forward": timer(lambda: dense(q, k, v)),
        "dense cuDNN, + backward": timer(lambda: train(dense)),
    }
    for name, make in PATTERNS.items():
        ids = make(seqlen)

        def sparse(q: Tensor, k: Tensor, v: Tensor, ids: Tensor = ids) -> Tensor:
            return flexmsa.block_sparse_attention(q, k, v, ids, block_size=BLOCK)

        times[f"FlexAttention, {name}, forward"] = timer(lambda sparse=sparse: sparse(q, k, v))
        times[f"FlexAttention, {name}, + backward"] = timer(lambda sparse=sparse: train(sparse))
        make_mask = lambda ids=ids: flexmsa.create_block_mask(ids, num_heads=HEADS, seqlen_k=seqlen)  # noqa: E731
        times[f"BlockMask for training, {name}"] = timer(make_mask)
    return times


def main_branch_floor(seqlen: int, flops: float) -> float:
    """Milliseconds of the products of the main branch's forward."""
    return 4.0 * HEADS * DEPTH * seqlen * TOPK * BLOCK / flops * 1e3
