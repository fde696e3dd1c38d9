"""Named pieces that the Gluon kernels for Hopper are built of: barriers, boxes of the bulk copy engine, layouts."""

import functools

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# Numbers of 16 bits that lie next to each other where the tensor cores take them.
HALF = gl.constexpr(64)
# How rows of halves, the first halves of all before the second ones, lie for the tensor cores.
SIDE_BY_SIDE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
# All warps of a part of a kernel meet; the name is another from Triton 3.7 on.
meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@gluon.constexpr_function
def lanes(num_warps):
    """One number to each lane."""
    return gl.BlockedLayout([1], [32], [num_warps], [0])


@gluon.jit
def make_barriers(number: gl.constexpr, count: gl.constexpr):
    """`number` barriers in shared memory, each of `count` arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(barriers.index(i), count=count)
    return barriers


@gluon.jit
def copy_block(k_tiles, v_tiles, at, ready, k_box, v_box):
    """Ask for a block's keys and values."""
    mbarrier.expect(ready, k_tiles.block_type.nbytes + v_tiles.block_type.nbytes)
    tma.async_copy_global_to_shared(k_tiles, at, ready, k_box)
    tma.async_copy_global_to_shared(v_tiles, at, ready, v_box)


@gluon.jit
def gather_rows(tiles, boxes, queries, batch, head, stage, ready, HALVES: gl.constexpr):
    """Ask for the vectors of queries, each of all heads from `head` on, in halves of the head dim: SIDE_BY_SIDE."""
    ENTRIES: gl.constexpr = len(queries)
    for number in gl.static_range(ENTRIES):
        for half in gl.static_range(HALVES):
            box = boxes.index((stage * HALVES + half) * ENTRIES + number)
            tma.async_copy_global_to_shared(tiles, [batch, head, queries[number], half * HALF], ready, box)


@gluon.jit
def clear_rows(x, count):
    """Zero the rows of x [N, D] in shared memory from `count` on: a weight of 0 does not silence a NaN."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    values = x.load(layout)
    seen = gl.arange(0, x.shape[0], gl.SliceLayout(1, layout)) < count
    x.store(gl.where(seen[:, None], values, gl.full(x.shape, 0.0, x.dtype, layout)))
    fence_async_shared()


@gluon.jit
def hide_unseen(scores, last):
    """The scores of a block, of which each row sees the columns up to last [ROWS]."""
    column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
    return gl.where(column[None, :] <= last[:, None], scores, float("-inf"))


@functools.lru_cache
def box_layout(box: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The layout of a box in shared memory: as the tensor cores take it, or of one dimension as it is."""
    if len(box) == 1:
        return gl.NVMMASharedLayout(0, 8 * dtype.itemsize, 1)
    return gl.NVMMASharedLayout.get_default_for(list(box), gl.float8e4nv if dtype.itemsize == 1 else gl.bfloat16)


def shared_box(x: torch.Tensor, box: list[int]) -> TensorDescriptor:
    """x as boxes for the bulk copy engine."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, box_layout(tuple(box), x.dtype))
