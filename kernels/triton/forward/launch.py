"""The main branch's forward: exact softmax attention over the visible keys of the selected blocks.

    out[i, h] = sum_j softmax_j(scale <q[i, h], k[j]>) v[j],   lse[i, h] = log sum_j exp(scale <q[i, h], k[j]>)

Layouts: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], any strides; out [B, Hq, Sq, D] and lse [B, Hq, Sq] fp32, contiguous.
For inference, k and v may be kept in pages and in e4m3, as in `decode`.

Two orders of work, chosen tile by tile on the device (see `union`): neighbouring tokens that chose much the same
blocks walk the union of them (see `walk`); all other tokens take the KV-outer order (see `by_block`). For Hopper both
have a kernel in Gluon (`walk_hopper`, `by_block_hopper`).
"""

import torch

from ...tuning import tuned
from ..common.fp8 import Cache
from ..common.primitives import tma_ready
from ..common.target import target_of
from .config import ForwardConfig, forward_config
from .key_major import attend_by_block
from .query_major import walk_tiles
from .tile_unions import choose_tiles


def block_sparse_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_indices: torch.Tensor | None,
    sequences: torch.Tensor,
    block_size: int,
    scale: float,
    config: ForwardConfig | None = None,
    cache: Cache | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Hq, Sq, D] and lse [B, Hq, Sq], as the module's docstring defines them.

    block_indices [B, Hkv, Sq, topk] may be in any order and hold -1, repeats, ids out of range and blocks that the
    query does not see; None stands for every visible block. `cache` says how k and v are kept, contiguous and in q's
    dtype by default; `config` overrides the choice of tiles.
    """
    cache = cache or Cache()
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0 or (block_indices is not None and block_indices.shape[3] == 0):
        return out.zero_(), lse.fill_(-torch.inf)
    topk = 1 if block_indices is None else block_indices.shape[3]
    config = config or tuned(
        "forward",
        forward_config,
        target_of(q.device),
        group_size=q.shape[1] // k.shape[1],
        head_dim=q.shape[3],
        block_size=block_size,
        topk=topk,
        element_size=q.element_size(),
        decoded=cache.k_scale is not None,
    )
    tiles = choose_tiles(block_indices, sequences, q, k, block_size, config)
    if config.walk_all:
        # Tokens without a block to see are in no walk.
        out.zero_()
        lse.fill_(-torch.inf)
    # What the kernels for Hopper take: keys and values as they are, and a positive scale.
    plain = scale > 0 and cache.page_table is None and cache.k_scale is None and all(map(tma_ready, (q, k, v)))
    if plain and config.walk_hopper and tiles.list is not None and tiles.tokens * (q.shape[1] // k.shape[1]) == 128:
        # Imported where it is launched: another version of Triton may not have what it needs.
        from .query_major_sm90 import attend_tiles_sm90

        attend_tiles_sm90(q, k, v, tiles, block_size, scale, config, out, lse)
    else:
        walk_tiles(q, k, v, cache, tiles, sequences, block_size, scale, config, out, lse)
    if block_indices is not None and not config.walk_all:
        rules = block_size, scale, config, plain and config.hopper
        attend_by_block(q, k, v, cache, block_indices, sequences, tiles.skip, *rules, out, lse)
    return out, lse
