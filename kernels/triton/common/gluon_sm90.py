"""What the Gluon kernels for Hopper share: barriers, boxes of the bulk copy engine, layouts.

A box is the part of a tensor that one copy of the engine takes, and its place in shared memory. Triton's interpreter
cannot run Gluon: the checks of `benchmarks/gpu.py` compare these kernels with the oracle.
"""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .tiles import box_strides

# How many neighbouring 16-bit numbers of a row the tensor cores take from one place: a row of 128 has two halves.
HALF = gl.constexpr(64)
# The layout of rows in halves for the tensor cores: the first halves of all rows, then the second halves.
SIDE_BY_SIDE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# All warps of a part of a kernel wait for each other; Triton 3.7 changed the name.
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Copies of boxes, and of elements whose addresses a thread computes; Triton 3.8 changed the names.
load_box = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_box = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
load_each = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
# A buffer of shared memory, taken as of another shape and layout; Triton 3.9 changed the name.
Buffer = gl.shared_memory_descriptor
reinterpret = Buffer.reinterpret if hasattr(Buffer, "reinterpret") else Buffer._reinterpret


@gluon.constexpr_function
def lanes(num_warps):
    """The layout that gives each lane one number."""
    return gl.BlockedLayout([1], [32], [num_warps], [0])


@gluon.jit
def make_barriers(number: gl.constexpr, count: gl.constexpr):
    """`number` barriers in shared memory, each for `count` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit
def copy_block(k_boxes, v_boxes, at, ready, k, v):
    """Begin to copy a block's keys and values from `at` to the buffers k and v; barrier `ready` counts their bytes."""
    mbarrier.expect(ready, k_boxes.block_type.nbytes + v_boxes.block_type.nbytes)
    load_box(k_boxes, at, ready, k)
    load_box(v_boxes, at, ready, v)


@gluon.jit
def gather_rows(boxes, buffers, queries, batch, head, stage, ready, halves: gl.constexpr):
    """Begin to copy the vectors of queries to a stage of the buffers, in halves of the head dim: SIDE_BY_SIDE.

    A box is half of the vectors of all heads of a group, from `head` on, of one query.
    """
    ENTRIES: gl.constexpr = len(queries)
    for number in gl.static_range(ENTRIES):
        for half in gl.static_range(halves):
            box = buffers.index((stage * halves + half) * ENTRIES + number)
            load_box(boxes, [batch, head, queries[number], half * HALF], ready, box)


@gluon.jit
def clear_rows(x, count):
    """Zero the rows of x [N, D] in shared memory from `count` on, because a weight of 0 does not remove a NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    values = x.load(layout)
    seen = gl.arange(0, x.shape[0], gl.SliceLayout(1, layout)) < count
    x.store(gl.where(seen[:, None], values, gl.full(x.shape, 0.0, x.dtype, layout)))
    fence_async_shared()


@gluon.jit
def hide_unseen(scores, last):
    """The scores of a block, -inf beyond column last [ROWS] of each row."""
    column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    return gl.where(column[None, :] <= last[:, None], scores, float("-inf"))


@gluon.jit
def store_sum(sums_ptr, partial_ptr, grad, place, slot, count):
    """Add a block's gradient [BLOCK, D], of `count` keys, to the sums from key `place` on, or write it to a slot."""
    BLOCK: gl.constexpr = grad.shape[0]
    HEAD_DIM: gl.constexpr = grad.shape[1]
    key = gl.arange(0, BLOCK, gl.SliceLayout(1, grad.type.layout))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, grad.type.layout))
    tile = key[:, None] * HEAD_DIM + d[None, :]
    mask = (key < count)[:, None]
    if slot < 0:
        at = sums_ptr + place * HEAD_DIM + tile
        gl.store(at, grad + gl.load(at, mask=mask, other=0.0), mask=mask)
    else:
        gl.store(partial_ptr + slot * (BLOCK * HEAD_DIM) + tile, grad, mask=mask)


@functools.lru_cache
def box_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The layout of a box in shared memory: what the tensor cores take; a box of one dimension lies contiguous."""
    if len(box) == 1:
        return gl.NVMMASharedLayout(0, 8 * dtype.itemsize, 1)
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.float8e4nv if dtype.itemsize == 1 else gl.bfloat16)


def shared_box(x: torch.Tensor, box: list[int]) -> TensorDescriptor:
    """The descriptor with which the bulk copy engine copies boxes of x."""
    return TensorDescriptor(x, list(x.shape), box_strides(x), box, box_layout(tuple(box), x.dtype))
