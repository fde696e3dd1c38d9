"""Rotation and quantisation to int8, with the bounds of docs/math.md."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...common.records import load_sequence
from .rows import TILE, load_rows

# The rotation is a product on tensor cores, whose sums are rougher than the tree of sums that docs/math.md allows for.
ROUNDED = tl.constexpr(2.0**-12)
SUMMED = tl.constexpr(2.0**-12)
SLACK = tl.constexpr(1 + 2.0**-10)
# Numbers outside this range might overflow or vanish in fp32: such vectors get no bound.
LARGEST, SMALLEST = tl.constexpr(2.0**40), tl.constexpr(2.0**-40)


class Queries(NamedTuple):
    """int8 rows and their scales; a bound, over the scale, is per_error * a block's error + per_norm * its norm."""

    numbers: Any
    scale: Any
    per_error: Any
    per_norm: Any


class Blocks(NamedTuple):
    """Scale, error and norm [B, num_blocks] of blocks of int8 keys; sums [B, 2] of finite errors and norms.

    Blocks that are not whole have zeros.
    """

    scale: Any
    error: Any
    norm: Any
    sums: Any
    num_blocks: Any


class Rounded(NamedTuple):
    """Rotated vectors in int8, with what math.md calls their scale, error and norm, [n]."""

    numbers: Any
    scale: Any
    error: Any
    norm: Any


@triton.constexpr_function
def half_log2(size):
    """The p of math.md."""
    return (size.bit_length() - 1) // 2


@triton.jit
def hadamard(size: tl.constexpr):
    """The matrix [size, size] of +-1."""
    common = tl.arange(0, size)[:, None] & tl.arange(0, size)[None, :]
    common = common ^ (common >> 4)
    common = common ^ (common >> 2)
    return 1.0 - 2.0 * ((common ^ (common >> 1)) & 1).to(tl.float32)


@triton.jit
def round_vectors(x, together: tl.constexpr):
    """Vectors x [n, Di] as Rounded; together: with one scale."""
    x = tl.dot(x, hadamard(x.shape[1]).to(x.dtype)) * 2.0 ** -half_log2(x.shape[1])
    largest = tl.max(tl.abs(x), 1)
    tame = (largest == 0) | ((largest >= SMALLEST) & (largest <= LARGEST))
    x = tl.where(tame[:, None], x, 0.0)
    largest = tl.where(tame, largest, 0.0)
    if together:
        largest = tl.zeros_like(largest) + tl.max(largest, 0)
    scale = tl.where(largest == 0, 1.0, largest / 127)
    numbers = tl.floor(x / scale[:, None] + 0.5)
    rest = x - numbers * scale[:, None]
    norm = tl.sqrt(tl.sum(x * x, 1))
    error = tl.sqrt(tl.sum(rest * rest, 1)) * SLACK + norm * ROUNDED
    infinite: tl.constexpr = float("inf")
    return Rounded(numbers.to(tl.int8), scale, tl.where(tame, error, infinite), tl.where(tame, norm, infinite))


@triton.jit
def quantise_queries_kernel(index_q, queries, sequences_ptr, tokens, C: tl.constexpr):
    """The int8 rows of a token range."""
    sequence = load_sequence(sequences_ptr, tokens.sequence)
    row, d = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, C.depth)
    q = load_rows(index_q, sequence.batch, tokens, row, row < tokens.count * C.num_kv_heads, C)
    x = round_vectors(q, False)
    tl.store(queries.numbers + row.to(tl.int64)[:, None] * C.depth + d[None, :], x.numbers)
    tl.store(queries.scale + row, x.scale)
    tl.store(queries.per_error + row, (x.norm + x.error) / x.scale * SLACK)
    tl.store(queries.per_norm + row, (x.error + x.norm * SUMMED) / x.scale * SLACK)


@triton.jit
def quantise_keys_kernel(index_k, numbers_ptr, blocks, sequences_ptr, seqlen_k, C: tl.constexpr):
    """The int8 keys [B, Sk, Di] of whole blocks, with a scale per block. Grid (blocks, B)."""
    block = tl.program_id(0)
    sequence = load_sequence(sequences_ptr, tl.program_id(1))
    at = tl.program_id(1) * blocks.num_blocks + block
    if (block + 1) * C.block_size > sequence.k_end - sequence.k_start:
        tl.store(blocks.scale + at, 0.0)
        tl.store(blocks.error + at, 0.0)
        tl.store(blocks.norm + at, 0.0)
        return
    key = (sequence.k_start + block * C.block_size + tl.arange(0, C.block_size)).to(tl.int64)[:, None]
    d = tl.arange(0, C.depth)[None, :]
    place = index_k.ptr + sequence.batch * index_k.stride_b + key * index_k.stride_s + d.to(tl.int64) * index_k.stride_d
    x = round_vectors(tl.load(place), True)
    tl.store(numbers_ptr + (sequence.batch * seqlen_k + key) * C.depth + d, x.numbers)
    tl.store(blocks.scale + at, tl.max(x.scale, 0))
    tl.store(blocks.error + at, tl.max(x.error, 0))
    tl.store(blocks.norm + at, tl.max(x.norm, 0) * SLACK)
