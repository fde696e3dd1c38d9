"""What kernels are chosen, configured and compiled for."""

from dataclasses import dataclass

import torch

# Of vectors of 8 bits that have a scale each: the dtype of the scales. e4m3's are codes of e8m0.
SCALE_DTYPES = {torch.float8_e4m3fn: torch.uint8, torch.int8: torch.float32}


@dataclass(frozen=True)
class Problem:
    """Sizes, dtypes and storage of a call: all that a launch may depend on, but for the lengths.

    num_kv_heads: groups; group_size: query heads per group; head_dim, index_head_dim: D and Di, 0 where a task does not
    read such vectors; topk: None where every visible block is taken; dtype: of the queries; key_dtype: of the keys (and
    values) as they are stored, in some caches e4m3, or int8 for index keys; paged: keys lie in pages of block_size;
    bulk_copies: alignment and strides let the bulk copy engine (TMA) read all that the task reads; positive_scale: the
    sign of the main scores' scale, whose maximum is found before the scale is multiplied in.

    >>> Problem(num_kv_heads=4, dtype=torch.bfloat16, index_head_dim=128, topk=16).element_size
    2
    """

    num_kv_heads: int
    dtype: torch.dtype
    group_size: int = 1
    head_dim: int = 0
    index_head_dim: int = 0
    block_size: int = 128
    topk: int | None = None
    key_dtype: torch.dtype | None = None
    paged: bool = False
    bulk_copies: bool = True
    positive_scale: bool = True

    @property
    def element_size(self) -> int:
        """Bytes of a number of the queries."""
        return self.dtype.itemsize

    @property
    def key_size(self) -> int:
        """Bytes of a number of the keys as they are stored."""
        return (self.key_dtype or self.dtype).itemsize

    @property
    def int8(self) -> bool:
        """Whether keys are int8 numbers with a scale each."""
        return self.key_dtype == torch.int8

    @property
    def scaled(self) -> bool:
        """Whether keys are e4m3 numbers with a scale each, for queries of another dtype."""
        return self.key_size == 1 and self.element_size > 1
