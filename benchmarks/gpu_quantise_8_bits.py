"""Rotation and quantisation to int8, with the bounds of docs/math.md: a part of `gpu_selection_8_bits`."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

BLOCK = tl.constexpr(128)
# The rotation is a product on tensor cores, whose sums are rougher than the tree of sums that docs/math.md allows for.
ROUNDED = tl.constexpr(2.0**-12)
SUMMED = tl.constexpr(2.0**-12)
SLACK = tl.constexpr(1 + 2.0**-10)


class Queries(NamedTuple):
    """int8 rows and their scales; a bound is per_error * a block's error + per_norm * its norm."""

    numbers: Any
    scale: Any
    per_error: Any
    per_norm: Any


class Keys(NamedTuple):
    """int8 keys; scale, error and norm of each block; the worst error and norm."""

    numbers: Any
    scale: Any
    error: Any
    norm: Any
    worst: Any


@triton.jit
def rotate_rows(x, hadamard_ptr, D: tl.constexpr):
    """Rows [R, D] of bf16 times a Hadamard matrix of +-1, over 8: scores double."""
    d = tl.arange(0, D)
    return tl.dot(x, tl.load(hadamard_ptr + d[:, None] * D + d[None, :])) * 0.125


@triton.jit
def nearest(x):
    """x, |x| <= 127, as int8."""
    return tl.floor(x + 0.5).to(tl.int8)


@triton.jit
def quantise_queries_kernel(
    q_ptr, hadamard_ptr, queries, seqlen, GROUPS: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr
):
    """int8 rows of index_q [1, GROUPS, S, D]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    place = (row % GROUPS).to(tl.int64) * seqlen + row // GROUPS
    x = rotate_rows(tl.load(q_ptr + place[:, None] * D + d[None, :]), hadamard_ptr, D)
    largest = tl.max(tl.abs(x), 1)
    scale = tl.where(largest == 0, 1.0, largest / 127)
    n = nearest(x / scale[:, None])
    rest = x - n.to(tl.float32) * scale[:, None]
    norm = tl.sqrt(tl.sum(x * x, 1))
    error = tl.sqrt(tl.sum(rest * rest, 1)) * SLACK + norm * ROUNDED
    tl.store(queries.numbers + row[:, None] * D + d[None, :], n)
    tl.store(queries.scale + row, scale)
    tl.store(queries.per_error + row, (norm + error) / scale * SLACK)
    tl.store(queries.per_norm + row, (error + norm * SUMMED) / scale * SLACK)


@triton.jit
def quantise_keys_kernel(k_ptr, hadamard_ptr, keys, D: tl.constexpr):
    """int8 keys of index_k [S, D], with a scale, an error and a norm per block."""
    block = tl.program_id(0)
    key = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    x = rotate_rows(tl.load(k_ptr + key[:, None] * D + d[None, :]), hadamard_ptr, D)
    largest = tl.max(tl.max(tl.abs(x), 1), 0)
    scale = tl.where(largest == 0, 1.0, largest / 127)
    n = nearest(x / scale)
    rest = x - n.to(tl.float32) * scale
    norm = tl.sqrt(tl.sum(x * x, 1))
    error = tl.sqrt(tl.sum(rest * rest, 1)) * SLACK + norm * ROUNDED
    tl.store(keys.numbers + key[:, None] * D + d[None, :], n)
    tl.store(keys.scale + block, scale)
    tl.store(keys.error + block, tl.max(error, 0))
    tl.store(keys.norm + block, tl.max(norm, 0) * SLACK)
