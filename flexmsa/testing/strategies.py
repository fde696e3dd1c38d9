"""Hypothesis strategies for inputs of `flexmsa.attention` (ragged, tied, strided, packed, padded) and for serving.

A GPU's kernels are compiled for a shape: head counts, head dims, block size, topk, dtype, strides. `shapes`,
`schedule_shapes` and `paged_shapes` draw these; `variations`, `schedule_variations` and `paged_variations` draw all
else, for which nothing is compiled.
"""

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from flexmsa.testing.cases import VALUES, Case
from flexmsa.testing.paged_steps import SCALES, PagedStep
from flexmsa.testing.schedules import INDEX_DTYPES, Schedule

__all__ = [
    "cases",
    "packed_lengths",
    "paged_shapes",
    "paged_steps",
    "paged_variations",
    "schedule_shapes",
    "schedule_variations",
    "schedules",
    "shapes",
    "variations",
]

GROUP_SIZES = (1, 2, 3, 4, 5, 6, 8, 16)
HEAD_DIMS = (16, 32, 64, 80, 96, 128)
BLOCK_SIZES = (16, 32, 48, 64, 128)
TOPKS = (1, 2, 3, 4, 5, 6, 7)


@st.composite
def packed_lengths(draw: st.DrawFn, total: int, *, documents: int | None = None) -> tuple[int, ...]:
    """Offsets of documents that fill `total` tokens; a document may have 1 token, or none.

    documents: their number, up to 7 by default.
    """
    least, most = (0, 6) if documents is None else (documents - 1, documents - 1)
    cuts = draw(st.lists(st.integers(0, total), min_size=least, max_size=most))
    return (0, *sorted(cuts), total)


def _sizes(
    draw: st.DrawFn, group_sizes: tuple[int, ...], head_dims: tuple[int, ...], block_sizes: tuple[int, ...]
) -> dict[str, Any]:
    return {
        "num_kv_heads": draw(st.integers(1, 3)),
        "group_size": draw(st.sampled_from(group_sizes)),
        "head_dim": draw(st.sampled_from(head_dims)),
        "index_head_dim": draw(st.sampled_from(head_dims)),
        "block_size": draw(st.sampled_from(block_sizes)),
    }


@st.composite
def shapes(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = ("float32",),
    group_sizes: tuple[int, ...] = GROUP_SIZES,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    block_sizes: tuple[int, ...] = BLOCK_SIZES,
    topks: tuple[int, ...] = TOPKS,
    warmup: bool = True,
    usual: bool = False,
) -> Case:
    """A `Case` of one query, all of whose `variations` share its kernels.

    `warmup` lets topk be None; `usual` takes aligned tensors and the default scale, which Hopper's kernels need.

    >>> from hypothesis import given
    >>> @given(shapes())
    ... def test_sizes(case):
    ...     assert case.head_dim in HEAD_DIMS
    >>> test_sizes()
    """
    return Case(
        **_sizes(draw, group_sizes, head_dims, block_sizes),
        topk=None if warmup and draw(st.integers(0, 5)) == 5 else draw(st.sampled_from(topks)),
        dtype=draw(st.sampled_from(dtypes)),
        strided=draw(st.booleans()),
        # One element before the first leaves no address aligned.
        offset=0 if usual else draw(st.sampled_from([0, 0, 0, 1])),
        scale=None if usual else draw(st.sampled_from([None, None, None, None, None, -0.1])),
    )


@st.composite
def variations(
    draw: st.DrawFn,
    shape: Case,
    *,
    max_blocks: int = 5,
    max_tokens: int = 320,
    long_keys: int = 0,
    garbage: bool = False,
    values: tuple[str, ...] = VALUES,
) -> Case:
    """A `Case` of the same shape, of other lengths, masks, selections and values.

    The keys span up to `max_blocks` blocks and `max_tokens` tokens; one case in twelve has up to `long_keys` keys, and
    few queries. `garbage` lets given ids be out of range, which raises on a CPU.
    """
    seqlen_k = draw(st.integers(1, min(max_blocks * shape.block_size, max_tokens)))
    layout = draw(st.sampled_from(["plain", "packed", "ragged", "padded", "cache"]))
    batch = 1 if layout in ("packed", "ragged") else draw(st.integers(1, 2))
    seqlen_q = seqlen_k if layout in ("packed", "padded") else draw(st.integers(1, seqlen_k))
    if layout in ("plain", "cache") and long_keys and draw(st.integers(0, 5)) == 5:
        seqlen_k, seqlen_q = draw(st.integers(seqlen_k, long_keys)), min(seqlen_q, 24)
    cu_seqlens = draw(packed_lengths(seqlen_k)) if layout == "packed" else None
    cu_seqlens_q = cu_seqlens_k = kv_starts = kv_lens = None
    if layout == "ragged":
        cu_seqlens_q = draw(packed_lengths(seqlen_q))
        cu_seqlens_k = draw(packed_lengths(seqlen_k, documents=len(cu_seqlens_q) - 1))
    if layout == "cache":
        kv_lens = tuple(draw(st.integers(0, seqlen_k)) for _ in range(batch))
    if layout in ("padded", "cache"):
        kv_starts = tuple(draw(st.integers(0, end)) for end in kv_lens or (seqlen_k,) * batch)
    topk = shape.topk or 1
    num_local_blocks = draw(st.integers(1, min(2, topk)))
    return replace(
        shape,
        batch=batch,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        num_local_blocks=num_local_blocks,
        num_init_blocks=draw(st.integers(0, min(2, topk - num_local_blocks))),
        cu_seqlens=cu_seqlens,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        kv_starts=kv_starts,
        kv_lens=kv_lens,
        scale=draw(st.sampled_from([None, 0.3, 0.01] if shape.scale is None else [shape.scale, -0.3])),
        index_scale=draw(st.sampled_from([None, None, 0.3])),
        values=draw(st.sampled_from(values)),
        ids=draw(st.sampled_from(["selected", "selected", "garbage" if garbage else "given"])),
        lse_gradient=draw(st.booleans()),
        deferred=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = ("float32",),
    group_sizes: tuple[int, ...] = GROUP_SIZES,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    block_sizes: tuple[int, ...] = BLOCK_SIZES,
    max_blocks: int = 5,
    max_tokens: int = 320,
    warmup: bool = True,
    values: tuple[str, ...] = VALUES,
) -> Case:
    """A `Case`: one of the `variations` of one of the `shapes`.

    >>> from hypothesis import given
    >>> @given(cases())
    ... def test_lengths(case):
    ...     assert case.seqlen_k >= 1
    >>> test_lengths()
    """
    sizes: dict[str, Any] = {"group_sizes": group_sizes, "head_dims": head_dims, "block_sizes": block_sizes}
    shape = draw(shapes(dtypes=dtypes, topks=tuple(range(1, max_blocks + 3)), warmup=warmup, **sizes))
    return draw(variations(shape, max_blocks=max_blocks, max_tokens=max_tokens, values=values))


@st.composite
def schedule_shapes(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = ("float32",),
    group_sizes: tuple[int, ...] = (1, 3, 4),
    head_dims: tuple[int, ...] = (16, 32),
    block_sizes: tuple[int, ...] = (8, 16, 32),
    capacity: int = 128,
) -> Schedule:
    """A `Schedule` without steps, all of whose `schedule_variations` share its kernels."""
    return Schedule(
        steps=(),
        **_sizes(draw, group_sizes, head_dims, block_sizes),
        topk=draw(st.sampled_from([1, 2, 4, None])),
        capacity=capacity,
        paged=draw(st.booleans()),
        fp8_keys=draw(st.booleans()),
        index_dtype=draw(st.sampled_from(INDEX_DTYPES)),
        dtype=draw(st.sampled_from(dtypes)),
    )


@st.composite
def schedule_variations(draw: st.DrawFn, shape: Schedule, *, max_steps: int = 8) -> Schedule:
    """A `Schedule` of appends (one token, a few, or a chunk of a prompt) and of the other operations on a cache."""
    batch = draw(st.integers(1, 3))
    steps = _draw_steps(draw, batch, shape.paged, max_steps, shape.capacity)
    num_init_blocks = draw(st.integers(0, min(2, (shape.topk or 1) - 1)))
    return replace(shape, steps=steps, batch=batch, num_init_blocks=num_init_blocks, seed=draw(st.integers(0, 2**16)))


@st.composite
def schedules(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = ("float32",),
    group_sizes: tuple[int, ...] = (1, 3, 4),
    head_dims: tuple[int, ...] = (16, 32),
    max_steps: int = 8,
    capacity: int = 128,
) -> Schedule:
    """A `Schedule`: one of the `schedule_variations` of one of the `schedule_shapes`.

    >>> from hypothesis import given
    >>> @given(schedules())
    ... def test_steps(schedule):
    ...     assert schedule.steps[0][0] == "append"
    >>> test_steps()
    """
    sizes = {"group_sizes": group_sizes, "head_dims": head_dims}
    shape = draw(schedule_shapes(dtypes=dtypes, capacity=capacity, **sizes))
    return draw(schedule_variations(shape, max_steps=max_steps))


def _draw_steps(draw: st.DrawFn, batch: int, paged: bool, max_steps: int, capacity: int) -> tuple[tuple, ...]:
    names = ["append", "append", "append", "trim", "reorder", "reset", *(["share"] if paged else [])]
    row = st.integers(0, batch - 1)
    arguments = {
        "trim": st.tuples(*[st.integers(0, 9)] * batch),
        "reorder": st.tuples(*[row] * batch),
        "share": st.tuples(row, row),
    }
    steps: list[tuple] = []
    # Rows only copy each other, so no row is longer than all appends together.
    longest = 0
    for number in range(draw(st.integers(1, max_steps))):
        name = "append" if number == 0 else draw(st.sampled_from(names))
        if name == "append":
            most = min(draw(st.sampled_from([1, 16, 60])), capacity - longest)
            even = draw(st.booleans())
            lens = st.just((most,) * batch) if even else st.tuples(*[st.integers(0, most)] * batch)
            steps.append((name, draw(lens)))
            longest += most
        elif name == "reset":
            steps.append((name,))
            longest = 0
        else:
            steps.append((name, draw(arguments[name])))
        if longest == capacity:
            break
    return tuple(steps)


@st.composite
def paged_shapes(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = ("float32",),
    group_sizes: tuple[int, ...] = (1, 3, 4),
    head_dims: tuple[int, ...] = (16, 32),
    block_sizes: tuple[int, ...] = (8, 12, 16, 32),
) -> PagedStep:
    """A `PagedStep` without sequences, all of whose `paged_variations` share its kernels."""
    return PagedStep(
        **_sizes(draw, group_sizes, head_dims, block_sizes),
        topk=draw(st.sampled_from([1, 2, 4, 16, None])),
        fp8_keys=draw(st.booleans()),
        index_dtype=draw(st.sampled_from(INDEX_DTYPES)),
        scales=draw(st.sampled_from(SCALES)),
        dtype=draw(st.sampled_from(dtypes)),
    )


@st.composite
def paged_variations(draw: st.DrawFn, shape: PagedStep, *, max_queries: int = 40, max_keys: int = 160) -> PagedStep:
    """A `PagedStep` of other sequences: decodes or drafts without offsets, or all kinds, up to chunks of prompts."""
    count, most = draw(st.integers(1, 6)), draw(st.sampled_from([3, max_queries]))
    uniform, decodes = draw(st.booleans()), draw(st.integers(0, count))
    if uniform:
        queries: tuple[int, ...] = (draw(st.sampled_from([1, 1, most])),) * count
    else:
        queries = (1,) * decodes + tuple(draw(st.integers(0, most)) for _ in range(count - decodes))
    padding = 0 if uniform else draw(st.integers(0 if any(queries) else 1, 3))
    topk = shape.topk or 1
    num_local_blocks = draw(st.integers(1, min(2, topk)))
    return replace(
        shape,
        queries=queries,
        kv_lens=tuple(draw(st.integers(0, max_keys)) for _ in queries),
        padding=padding,
        uniform=uniform,
        num_decodes=0 if uniform else draw(st.sampled_from([0, decodes])),
        own_out=draw(st.booleans()),
        num_local_blocks=num_local_blocks,
        num_init_blocks=draw(st.integers(0, min(2, topk - num_local_blocks))),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def paged_steps(draw: st.DrawFn, *, dtypes: tuple[str, ...] = ("float32",)) -> PagedStep:
    """A `PagedStep`: one of the `paged_variations` of one of the `paged_shapes`.

    >>> from hypothesis import given
    >>> @given(paged_steps())
    ... def test_tokens(step):
    ...     assert step.num_tokens >= 1
    >>> test_tokens()
    """
    return draw(paged_variations(draw(paged_shapes(dtypes=dtypes))))
