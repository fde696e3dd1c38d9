"""The kernels of a decoding step certified from int8 scores, as a prototype: see `gpu_selection_8_bits`."""

import triton
import triton.language as tl

from flexmsa.kernels.triton.selection.topk import pack_keys

BLOCK = tl.constexpr(128)
DOUBT = tl.constexpr(0.1768)


@triton.jit
def decode_scan_kernel(
    q8_ptr, k8_ptr, key_scale_ptr, rough_ptr, num_blocks, ROWS: tl.constexpr, D: tl.constexpr, STAGES: tl.constexpr
):
    """Rough scores [ROWS, num_blocks] of the first ROWS of 16 rows q8; every program takes every so many blocks."""
    d, column, row = tl.arange(0, D), tl.arange(0, BLOCK), tl.arange(0, 16)
    q = tl.load(q8_ptr + row[:, None] * D + d[None, :])
    for block in tl.range(tl.program_id(0), num_blocks, tl.num_programs(0), num_stages=STAGES):
        k = tl.load(k8_ptr + (tl.cast(block, tl.int64) * BLOCK + column)[:, None] * D + d[None, :])
        best = tl.max(tl.dot(k, tl.trans(q), out_dtype=tl.int32), 0).to(tl.float32) * tl.load(key_scale_ptr + block)
        tl.store(rough_ptr + row * num_blocks + block, best, mask=row < ROWS)


@triton.jit
def decode_again_kernel(
    rough_ptr,
    per_error_ptr,
    per_norm_ptr,
    worst_ptr,
    q_ptr,
    k_ptr,
    places_ptr,
    num_blocks,
    EACH: tl.constexpr,
    COUNT: tl.constexpr,
    D: tl.constexpr,
    SHARES: tl.constexpr,
    MOST: tl.constexpr,
):
    """Of one row: the threshold, and of every SHARES-th block, those near it, scored in 16 bits; at most MOST."""
    share, row = tl.program_id(0), tl.program_id(1)
    block = tl.arange(0, EACH)[:, None] * SHARES + tl.arange(0, SHARES)[None, :]
    score = tl.load(rough_ptr + row * num_blocks + block, mask=block < num_blocks, other=float("-inf"))
    groups = tl.max(score, 1)
    threshold = tl.max(groups, 0)
    for _ in range(COUNT - 1):
        groups = tl.where(groups == threshold, float("-inf"), groups)
        threshold = tl.max(groups, 0)
    bound = tl.load(per_error_ptr + row) * tl.load(worst_ptr) + tl.load(per_norm_ptr + row) * tl.load(worst_ptr + 1)
    own = tl.arange(0, EACH) * SHARES + share
    score = tl.load(rough_ptr + row * num_blocks + own, mask=own < num_blocks, other=float("-inf"))
    left = tl.where(score + bound * (1 + DOUBT) >= threshold, own, -1)
    d, column = tl.arange(0, D), tl.arange(0, BLOCK)
    q = tl.load(q_ptr + row * D + d).to(tl.float32)
    taken = 0
    mine = tl.max(left, 0)
    while (mine >= 0) & (taken < MOST):
        k = tl.load(k_ptr + (mine.to(tl.int64) * BLOCK + column)[:, None] * D + d[None, :]).to(tl.float32)
        best = tl.max(tl.sum(k * q[None, :], 1), 0)
        tl.store(places_ptr + (row * SHARES + share) * MOST + taken, pack_keys(best, mine))
        left = tl.where(left == mine, -1, left)
        mine = tl.max(left, 0)
        taken += 1
