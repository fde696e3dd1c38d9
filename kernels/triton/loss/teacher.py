"""The teacher's probabilities, as the backward's main kernel leaves them for the index loss.

For each entry and each key of its block, P is the mean of the main branch's probabilities over the group's heads. It
lies in [tiles, teacher_rows, block_size]: a tile has the P of `entries` neighbouring entries of a pass, in the order of
the lists, and room up to a power of two. With 16-bit queries, what lies there is 2^15 P in fp16, so that a P of down to
2^-29 keeps all of its bits.
"""

import torch
import triton
import triton.language as tl

SCALE = tl.constexpr(32768.0)


def new_teacher(q: torch.Tensor, num_tiles: int, teacher_rows: int, block_size: int) -> torch.Tensor:
    """Uninitialised room for the teacher of num_tiles tiles."""
    dtype = torch.float16 if q.dtype.itemsize == 2 else q.dtype
    return q.new_empty(num_tiles, teacher_rows, block_size, dtype=dtype)


@triton.jit
def load_teacher(teacher_ptr, entry, key, C: tl.constexpr):
    """P of entries [N] for keys [M] of their block, [N, M] fp32."""
    row = (entry // C.entries * C.teacher_rows + entry % C.entries).to(tl.int64)
    place = teacher_ptr + row[:, None] * C.block_size + key[None, :]
    values = tl.load(place, mask=(key < C.block_size)[None, :], other=0.0)
    if teacher_ptr.dtype.element_ty == tl.float32:
        return values
    else:
        return values.to(tl.float32) * (1.0 / SCALE)


@triton.jit
def store_teacher(teacher_ptr, tile, number, key, values, mask, C: tl.constexpr):
    """Write P [M, N] of entries `number` [N] of a tile, for keys [M] of their block."""
    # The tile's place is one number, so that elements need no addresses of 64 bits.
    base = teacher_ptr + tl.cast(tile, tl.int64) * (C.teacher_rows * C.block_size)
    place = base + (number[None, :] * C.block_size + key[:, None])
    if teacher_ptr.dtype.element_ty == tl.float32:
        tl.store(place, values, mask=mask)
    else:
        tl.store(place, (values * SCALE).to(tl.float16), mask=mask)
