"""flexmsa::decode: selection and attention of a few new queries on a filled cache; for inference, no gradient."""

import torch
from torch import Tensor

from .attention import statistics_dtype
from .autocast import register_autocast
from .dispatch import run_kernel


@torch.library.custom_op(
    "flexmsa::decode",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor index_q, Tensor index_k, Tensor sequences, int block_size, int topk, "
    "int num_local_blocks, int num_init_blocks, float scale, str backend) -> (Tensor, Tensor, Tensor)",
)
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    sequences: Tensor,
    block_size: int,
    topk: int,
    num_local_blocks: int,
    num_init_blocks: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [B, Hq, Sq, D], lse [B, Hq, Sq] and block_indices [B, Hkv, Sq, topk]."""
    return run_kernel(
        backend,
        "decode",
        q,
        k,
        v,
        index_q,
        index_k,
        sequences,
        block_size,
        topk,
        num_local_blocks,
        num_init_blocks,
        scale,
    )


@decode.register_fake
def _(q, k, v, index_q, index_k, sequences, block_size, topk, num_local_blocks, num_init_blocks, scale, backend):
    lse = q.new_empty(q.shape[:3], dtype=statistics_dtype(q))
    return q.new_empty(q.shape), lse, q.new_empty((*index_q.shape[:3], topk), dtype=torch.int32)


register_autocast(decode, cast=5)
