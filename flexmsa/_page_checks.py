"""Checks of what an engine passes with its pages; they read no values."""

from typing import Any

import torch
from torch import Tensor

from flexmsa import validation

__all__ = ["check_buffer", "check_one_scale", "check_paged_batch", "check_pair", "check_table", "check_tokens"]

_NUMBERS = 2**31


def check_pair(pools: Any, batch: Any, pools_type: type, batch_type: type) -> None:
    """Check that the batch can be attended to with these pools."""
    for name, x, kind in (("pools", pools, pools_type), ("batch", batch, batch_type)):
        if not isinstance(x, kind):
            raise TypeError(f"{name}: expected a {kind.__name__}, got {type(x).__name__}")
    if batch.page_size != pools.page_size:
        raise ValueError(f"batch: expected page_size={pools.page_size}, that of the pools, got {batch.page_size}")


def check_one_scale(name: str, scale: float | None, pool: Tensor) -> None:
    """Check a scale that is no tensor."""
    if pool.dtype == torch.int8:
        raise TypeError(f"{name}: expected a tensor of float32 [num_pages, 1, page_size] for an int8 pool, got {scale}")
    if scale is None:
        return
    if pool.dtype != torch.float8_e4m3fn or not (isinstance(scale, float) and 0 < scale < float("inf")):
        raise ValueError(f"{name}: expected a positive float, for an e4m3 pool, got {scale} for {pool.dtype}")


def check_table(table: Tensor, rows: int, device: torch.device) -> None:
    """Check where the table of sequences is to be written."""
    if not isinstance(table, Tensor):
        raise TypeError(f"table: expected that of an earlier batch, got {type(table).__name__}")
    if table.shape != (rows, 5) or table.dtype != torch.int32 or table.device != device or not table.is_contiguous():
        raise ValueError(
            f"table: expected contiguous int32 {[rows, 5]} on {device}, got {table.dtype} {list(table.shape)} on "
            f"{table.device}"
        )


def check_tokens(
    name: str, x: Tensor, num_tokens: int | None, pool: Tensor, num_heads: int, groups: bool = False
) -> None:
    """Check new tokens or queries [T, H, D] against the pool that they meet.

    num_tokens: T, if it is known; groups: H is a multiple of num_heads.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor [T, H, D], got {type(x).__name__}")
    head_dim, heads = pool.shape[3], x.shape[1] if x.dim() == 3 else 0
    num_tokens = x.shape[0] if num_tokens is None else num_tokens
    matches = heads > 0 and heads % num_heads == 0 if groups else heads == num_heads
    if x.dim() != 3 or (x.shape[0], x.shape[2]) != (num_tokens, head_dim) or not matches:
        multiple = "a multiple of " if groups else ""
        raise ValueError(
            f"{name}: expected [T={num_tokens}, H={multiple}{num_heads}, D={head_dim}] for these pages, got "
            f"{list(x.shape)}"
        )
    if x.device != pool.device:
        raise ValueError(f"{name}: expected the device of the pages, {pool.device}, got {x.device}")
    if x.dtype.itemsize == 1 or not x.is_floating_point() or (pool.element_size() > 1 and x.dtype != pool.dtype):
        wanted = "a floating dtype of 16 bits or more" if pool.element_size() == 1 else str(pool.dtype)
        raise TypeError(f"{name}: expected {wanted} for pages of {pool.dtype}, got {x.dtype}; cast it")


def check_buffer(
    name: str,
    x: Tensor,
    shape: tuple[int | None, ...],
    dtype: torch.dtype,
    device: torch.device,
    is_written: bool = True,
) -> None:
    """Check a tensor [T, H, n] that a kernel writes, or ids that it reads, of which n may be any."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {type(x).__name__}")
    if x.dim() != 3:
        raise ValueError(f"{name}: expected [T, H, n], got {list(x.shape)}")
    expected = tuple(size if wanted is None else wanted for size, wanted in zip(x.shape, shape, strict=True))
    validation.check_shape(name, x, expected, "[T, H, n]")
    if x.dtype != dtype or x.device != device or x.stride(2) != 1:
        raise TypeError(
            f"{name}: expected {dtype} on {device} with a dense last dimension, got {x.dtype} on {x.device} with "
            f"strides {list(x.stride())}"
        )
    if is_written and any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(
            f"{name}: expected memory of its own for each number, got strides {list(x.stride())}; pass a tensor that "
            "is not expanded"
        )


def check_paged_batch(
    page_table: Tensor, kv_lens: Tensor, cu_seqlens_q: Tensor | None, num_tokens: int, num_decodes: int, page_size: int
) -> None:
    """Check the arguments of a `PagedBatch`."""
    validation.check_int("num_tokens", num_tokens, 1)
    validation.check_int("page_size", page_size, 1)
    validation.check_int("num_decodes", num_decodes, 0)
    if not isinstance(page_table, Tensor):
        raise TypeError(f"page_table: expected a tensor [R, max_pages], got {type(page_table).__name__}")
    validation.check_lengths("page_table", page_table, page_table.device)
    validation.check_lengths("kv_lens", kv_lens, page_table.device)
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or 0 in page_table.shape:
        raise ValueError(f"page_table: expected int32 [R, max_pages], got {page_table.dtype} {list(page_table.shape)}")
    count, max_pages = page_table.shape
    if page_table.stride(1) != 1 or (count > 1 and page_table.stride(0) < max_pages):
        raise ValueError(
            f"page_table: expected dense rows that do not overlap, got strides {list(page_table.stride())} for "
            f"{list(page_table.shape)}"
        )
    validation.check_shape("kv_lens", kv_lens, (count,), "[R] with page_table's R")
    if num_decodes > (0 if cu_seqlens_q is None else min(count, num_tokens)):
        raise ValueError(
            f"num_decodes: expected cu_seqlens_q, and at most its {count} sequences and {num_tokens} tokens, got "
            f"{num_decodes}"
        )
    if cu_seqlens_q is None:
        if num_tokens % count:
            raise ValueError(
                f"num_tokens: expected a multiple of {count} sequences without cu_seqlens_q, got {num_tokens}"
            )
        return
    validation.check_lengths("cu_seqlens_q", cu_seqlens_q, page_table.device)
    validation.check_shape("cu_seqlens_q", cu_seqlens_q, (count + 1,), "[R + 1] with page_table's R")
    # Kernels number the keys of all sequences, in 32 bits.
    if count * page_table.stride(0) * page_size >= _NUMBERS:
        raise ValueError(
            f"page_table: expected R * row stride * page_size below 2^31, got {count} * {page_table.stride(0)} * "
            f"{page_size}; pass a narrower table"
        )
