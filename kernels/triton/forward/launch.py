"""The main branch's forward: exact softmax attention over the visible keys of the selected blocks.

    out[i, h] = sum_j softmax_j(scale <q[i, h], k[j]>) v[j],   lse[i, h] = log sum_j exp(scale <q[i, h], k[j]>)

Layouts: q [B, Hq, Sq, D], k, v [B, Hkv, Sk, D], any strides; out [B, Hq, Sq, D] and lse [B, Hq, Sq] fp32, contiguous.
For inference, k and v may be kept in pages and in e4m3, as in `decode`.

Two orders of work, which the device chooses per tile (see `tile_unions`): neighbouring tokens that chose much the same
blocks are attended to query-major, all other tokens key-major. For Hopper both orders have a kernel in Gluon.
"""

from typing import Any

import torch

from ...problem import Problem
from ...tuning import tuned_config
from ...workspace import ranges_per_pass, tokens_per_range
from ..common.fp8 import Cache
from ..common.launch import choose, view
from ..common.passes import of_passes, run_pass
from ..common.records import capacity_of
from ..common.target import GLUON, Target, target_of
from ..common.tiles import tma_ready
from ..schedule.make_index import inverse_index
from . import combine, key_major, query_major
from .config import DEPENDS_ON, ForwardConfig, default_config
from .records import Inputs, Partial, Results
from .tile_unions import Tiles, find_tile_unions

# The first that supports a problem runs. Other versions of Triton may lack what the kernels in Gluon need.
QUERY_MAJOR: tuple[Any, ...] = (query_major,)
KEY_MAJOR: tuple[Any, ...] = (key_major,)
if GLUON:
    from . import key_major_sm90, query_major_sm90

    QUERY_MAJOR, KEY_MAJOR = (query_major_sm90, *QUERY_MAJOR), (key_major_sm90, *KEY_MAJOR)


def problem_of(inputs: Inputs, block_indices: torch.Tensor | None, block_size: int) -> Problem:
    """The Problem of a call of `block_sparse_attention_forward`."""
    q, k = inputs.q, inputs.k
    return Problem(
        num_kv_heads=k.shape[1],
        dtype=q.dtype,
        group_size=q.shape[1] // k.shape[1],
        head_dim=q.shape[3],
        block_size=block_size,
        topk=None if block_indices is None else block_indices.shape[3],
        key_dtype=k.dtype,
        paged=inputs.cache.page_table is not None,
        bulk_copies=tma_ready(q) and tma_ready(k) and tma_ready(inputs.v),
        positive_scale=inputs.scale > 0,
    )


def attend_key_major(
    inputs: Inputs,
    block_indices: torch.Tensor,
    tiles: Tiles,
    results: Results,
    problem: Problem,
    config: ForwardConfig,
    target: Target,
) -> None:
    """Fill the results of the tokens whose skip is 0, in token ranges whose partial results fit the workspace."""
    assert problem.topk is not None and tiles.skip is not None
    q, batch = inputs.q, inputs.q.shape[0]
    rows = problem.topk * problem.group_size
    # Elements of a pass's partial results are numbered in 32 bits.
    bytes_per_token, numbers = rows * (problem.head_dim * problem.element_size + 4), rows * problem.head_dim
    range_tokens = max(1, min(tokens_per_range(batch * results.seqlen_q, bytes_per_token), (2**31 - 1) // numbers))
    index = inverse_index(
        block_indices,
        inputs.sequences,
        batch=batch,
        num_kv_heads=problem.num_kv_heads,
        seqlen_q=results.seqlen_q,
        seqlen_k=capacity_of(inputs.cache.page_table, inputs.k, batch),
        block_size=problem.block_size,
        range_tokens=range_tokens,
        skip=tiles.skip,
    )
    tokens = index.num_tokens, index.range_tokens
    per_pass = ranges_per_pass(problem.num_kv_heads, *tokens, bytes_per_token, numbers)
    shape = per_pass * index.range_tokens, problem.topk, problem.group_size
    partial = Partial(q.new_empty(*shape, problem.head_dim), results.lse.new_empty(shape))
    implementation = choose(KEY_MAJOR, problem, target, config)
    # Made once: a descriptor costs the host as much as a launch.
    attend = implementation.launch(inputs, index, partial, problem, config, target)
    join = combine.launch(partial, index, tiles.skip, results, problem, target)
    launches = of_passes([attend, join], axis=1)
    for first in range(0, index.num_ranges, per_pass):
        run_pass(launches, first, min(per_pass, index.num_ranges - first))


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
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Hq, Sq, D] and lse [B, Hq, Sq], as the module's docstring defines them.

    block_indices [B, Hkv, Sq, topk] may be in any order and hold -1, repeats, ids out of range and blocks that the
    query does not see; None stands for every visible block. `cache` says how k and v are kept, contiguous and in q's
    dtype by default; `config` overrides the choice of tiles; `out` is written where it is given, with any strides.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0 or (block_indices is not None and block_indices.shape[3] == 0):
        return out.zero_(), lse.fill_(-torch.inf)
    inputs = Inputs(q, k, v, cache or Cache(), sequences, scale)
    problem, target = problem_of(inputs, block_indices, block_size), target_of(q.device)
    config = config or tuned_config("forward", problem, target, default_config(problem, target), DEPENDS_ON)
    tiles = find_tile_unions(block_indices, sequences, q.shape[0], q.shape[2], problem, config)
    if config.query_major_only:
        # Tokens without a block to see are in no tile's union.
        out.zero_()
        lse.fill_(-torch.inf)
    results = Results(view(out), lse, problem.num_kv_heads, q.shape[2])
    implementation = choose(QUERY_MAJOR, problem, target, config)
    implementation.launch(inputs, tiles, results, problem, config, target).run()
    if block_indices is not None and not config.query_major_only:
        attend_key_major(inputs, block_indices, tiles, results, problem, config, target)
    return out, lse
