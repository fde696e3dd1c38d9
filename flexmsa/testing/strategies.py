"""Hypothesis strategies for inputs of `flexmsa.attention` (ragged, tied, strided, packed, padded) and for serving."""

from hypothesis import strategies as st

from flexmsa.testing.cases import Case
from flexmsa.testing.schedules import Schedule

__all__ = ["cases", "packed_lengths", "schedules"]

GROUP_SIZES = (1, 2, 3, 4, 5, 6, 8, 16)
HEAD_DIMS = (16, 32, 64, 80, 96, 128)
BLOCK_SIZES = (16, 32, 48, 64, 128)


@st.composite
def packed_lengths(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    """Offsets of documents that fill `total` tokens; a document may have 1 token."""
    cuts = draw(st.sets(st.integers(1, max(1, total - 1)), max_size=6)) if total > 1 else set()
    return (0, *sorted(cuts), total)


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
) -> Case:
    """A `Case`. The keys span up to `max_blocks` blocks and `max_tokens` tokens; `warmup` lets topk be None.

    >>> from hypothesis import given
    >>> @given(cases())
    ... def test_lengths(case):
    ...     assert case.seqlen_k >= 1
    >>> test_lengths()
    """
    block_size = draw(st.sampled_from(block_sizes))
    seqlen_k = draw(st.integers(1, min(max_blocks * block_size, max_tokens)))
    layout = draw(st.sampled_from(["plain", "packed", "padded", "cache"]))
    batch = 1 if layout == "packed" else draw(st.integers(1, 2))
    seqlen_q = seqlen_k if layout in ("packed", "padded") else draw(st.integers(1, seqlen_k))
    cu_seqlens = draw(packed_lengths(seqlen_k)) if layout == "packed" else None
    kv_starts = kv_lens = None
    if layout == "cache":
        kv_lens = tuple(draw(st.integers(0, seqlen_k)) for _ in range(batch))
    if layout in ("padded", "cache"):
        kv_starts = tuple(draw(st.integers(0, end)) for end in kv_lens or (seqlen_k,) * batch)
    num_local_blocks = draw(st.integers(1, 2))
    num_init_blocks = draw(st.integers(0, 2))
    topk = draw(st.integers(num_local_blocks + num_init_blocks, max_blocks + 2))
    return Case(
        batch=batch,
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.sampled_from(group_sizes)),
        head_dim=draw(st.sampled_from(head_dims)),
        index_head_dim=draw(st.sampled_from(head_dims)),
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        block_size=block_size,
        topk=None if warmup and draw(st.integers(0, 5)) == 5 else topk,
        num_local_blocks=num_local_blocks,
        num_init_blocks=num_init_blocks,
        cu_seqlens=cu_seqlens,
        kv_starts=kv_starts,
        kv_lens=kv_lens,
        dtype=draw(st.sampled_from(dtypes)),
        ties=draw(st.booleans()),
        strided=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


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
    """A `Schedule` of appends (one token, a few, or a chunk of a prompt) and of the other operations on a cache.

    >>> from hypothesis import given
    >>> @given(schedules())
    ... def test_steps(schedule):
    ...     assert schedule.steps[0][0] == "append"
    >>> test_steps()
    """
    batch = draw(st.integers(1, 3))
    paged = draw(st.booleans())
    return Schedule(
        steps=_draw_steps(draw, batch, paged, max_steps, capacity),
        batch=batch,
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.sampled_from(group_sizes)),
        head_dim=draw(st.sampled_from(head_dims)),
        index_head_dim=draw(st.sampled_from(head_dims)),
        block_size=draw(st.sampled_from([8, 16, 32])),
        topk=draw(st.sampled_from([1, 2, 4, None])),
        capacity=capacity,
        paged=paged,
        fp8_keys=draw(st.booleans()),
        fp8_index=draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(st.integers(0, 2**16)),
    )


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
