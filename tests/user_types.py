"""What type checkers make of a user's calls; `test_types.py` runs one over this file and README's examples."""

from typing import Any, assert_type

import torch
from torch import Tensor

import flexmsa
from flexmsa import AuxOutput, AuxRequest, MSACache, MSAConfig, MSAttention, PagedMSACache

q, k, v = torch.randn(1, 4, 64, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16)
index_q, index_k = torch.randn(1, 2, 64, 16), torch.randn(1, 1, 64, 16)
wanted = AuxRequest(lse=True)


def steps(request: AuxRequest | None) -> None:
    """The type of a result depends on `return_aux` alone."""
    assert_type(flexmsa.attention(q, k, v, index_q, index_k, topk=None), Tensor)
    assert_type(flexmsa.attention(q, k, v, index_q, index_k, return_aux=None), Tensor)
    out, aux = assert_type(
        flexmsa.attention(q, k, v, index_q, index_k, block_size=16, return_aux=wanted), tuple[Tensor, AuxOutput]
    )
    either = flexmsa.attention(q, k, v, index_q, index_k, return_aux=request)
    assert_type(either, Tensor | tuple[Tensor, AuxOutput])
    ids = assert_type(flexmsa.select_blocks(index_q, index_k, topk=2), Tensor)
    assert_type(flexmsa.block_sparse_attention(q, k, v, ids), Tensor)
    assert_type(flexmsa.block_sparse_attention(q, k, v, ids, return_aux=wanted), tuple[Tensor, AuxOutput])
    loss: Tensor = flexmsa.index_loss(q, k, index_q, index_k, ids, aux.lse)
    print(out + loss)


def generate(config: MSAConfig) -> None:
    """Caches and layers."""
    layer = MSAttention(config)
    cache = assert_type(layer.new_cache(1, 64), MSACache)
    assert_type(layer.new_cache(1, 64, paged=True, dtype=torch.bfloat16), PagedMSACache)
    assert_type(layer(q, cache=cache), tuple[Tensor, Tensor | Any])
    assert_type(flexmsa.decode(q, cache, index_q), Tensor)
    assert_type(flexmsa.decode(q, cache, None, topk=None, return_aux=wanted), tuple[Tensor, AuxOutput])
    mask = flexmsa.create_block_mask(torch.zeros(1, 2, 64, 1), num_heads=4, seqlen_k=64)
    assert_type(flexmsa.packed_flex_attention(q, k, v, mask), Tensor)
    assert_type(flexmsa.packed_flex_attention(q, k, v, mask, return_lse=True), tuple[Tensor, Tensor])
    # What is ignored here must be an error: a wrong name, and a wrong type.
    flexmsa.attention(q, k, v, index_q, index_k, tok=3)  # type: ignore[call-overload]
    layer(q, caches=cache)  # type: ignore[call-arg]
