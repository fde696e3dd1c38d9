"""MSA in NumPy float64, one query at a time: written from the paper, without code of any other implementation."""

import itertools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Oracle", "attention"]

Array = NDArray[np.float64]


class Oracle(NamedTuple):
    """out [B, Hq, Sq, D], lse [B, Hq, Sq], block_indices [B, Hkv, Sq, topk] (None in warm-up), index_loss.

    block_indices are those given, if any were.
    """

    out: Array
    lse: Array
    block_indices: NDArray[np.int64] | None
    index_loss: float


def attention(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    index_q: ArrayLike,
    index_k: ArrayLike,
    *,
    block_size: int = 128,
    topk: int | None = 16,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    scale: float | None = None,
    index_scale: float | None = None,
    cu_seqlens: ArrayLike | None = None,
    cu_seqlens_q: ArrayLike | None = None,
    cu_seqlens_k: ArrayLike | None = None,
    kv_starts: ArrayLike | None = None,
    kv_lens: ArrayLike | None = None,
    block_indices: ArrayLike | None = None,
) -> Oracle:
    """Compute the right results of `flexmsa.attention`, from arrays of the same layout.

    block_indices replace the selection, as in `flexmsa.block_sparse_attention`: ids of no visible block are ignored.

    >>> rng = np.random.default_rng(0)
    >>> q, k, v, iq, ik = (rng.normal(size=(1, 1, 6, 4)) for _ in range(5))
    >>> attention(q, k, v, iq, ik, block_size=2, topk=1).block_indices[0, 0].ravel().tolist()
    [0, 0, 1, 1, 2, 2]
    """
    q, k, v, index_q, index_k = (np.asarray(x, dtype=np.float64) for x in (q, k, v, index_q, index_k))
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    scale = head_dim**-0.5 if scale is None else scale
    index_scale = index_q.shape[3] ** -0.5 if index_scale is None else index_scale

    out = np.zeros(q.shape)
    lse = np.full(q.shape[:3], -np.inf)
    indices = None if topk is None else np.full((batch, num_kv_heads, seqlen_q, topk), -1)
    indices = indices if block_indices is None else np.array(block_indices, dtype=np.int64)
    losses = []
    for b, i in itertools.product(range(batch), range(seqlen_q)):
        offsets = (cu_seqlens, cu_seqlens) if cu_seqlens_q is None else (cu_seqlens_q, cu_seqlens_k)
        first, last = _visible(b, i, seqlen_q, k.shape[2], offsets, kv_starts, kv_lens)
        if last < first:
            continue
        for r in range(num_kv_heads):
            keys = np.arange(first, last + 1)
            index_scores = _product(index_k[b, 0, keys], index_q[b, r, i])
            if indices is not None:
                if block_indices is None:
                    chosen = _choose(index_scores, block_size, topk, num_local_blocks, num_init_blocks)
                    indices[b, r, i, : len(chosen)] = chosen
                kept = np.isin((keys - first) // block_size, indices[b, r, i])
                keys, index_scores = keys[kept], index_scores[kept]
            if len(keys) == 0:
                losses.append(0.0)
                continue
            heads = slice(r * group, (r + 1) * group)
            probabilities, lse[b, heads, i] = _softmax(q[b, heads, i] @ k[b, r, keys].T * scale)
            out[b, heads, i] = probabilities @ v[b, r, keys]
            losses.append(_divergence(probabilities.mean(0), index_scores * index_scale))
    return Oracle(out, lse, indices, float(np.mean(losses)) if losses else 0.0)


def _visible(
    b: int,
    i: int,
    seqlen_q: int,
    seqlen_k: int,
    offsets: tuple[ArrayLike | None, ArrayLike | None],
    kv_starts: ArrayLike | None,
    kv_lens: ArrayLike | None,
) -> tuple[int, int]:
    """The first and the last key that query i of row b sees; if it sees none, the last is before the first.

    offsets: of the documents' queries and of their keys.
    """
    if offsets[0] is not None:
        queries, keys = (np.asarray(x) for x in offsets)
        document = max(n for n, offset in enumerate(queries) if offset <= i)
        return int(keys[document]), int(keys[document + 1] - queries[document + 1]) + i
    first = 0 if kv_starts is None else int(np.asarray(kv_starts)[b])
    end = seqlen_k if kv_lens is None else int(np.asarray(kv_lens)[b])
    return first, end - seqlen_q + i


def _product(x: Array, y: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        return x @ y


def _choose(scores: Array, block_size: int, topk: int | None, num_local: int, num_init: int) -> list[int]:
    """The ids of the best blocks, ascending: forced ones first, then by score, then by the smaller id."""
    blocks = [scores[j : j + block_size] for j in range(0, len(scores), block_size)]

    def rank(block: int) -> tuple[bool, float, int]:
        forced = block < num_init or block >= len(blocks) - num_local
        numbers = [s for s in blocks[block] if not np.isnan(s)]
        return not forced, -max(numbers, default=-np.inf), block

    return sorted(sorted(range(len(blocks)), key=rank)[:topk])


def _divergence(teacher: Array, scores: Array) -> float:
    """The KL divergence of the softmax of scores [keys] from the teacher's probabilities [keys]."""
    # The probability of a score far below the largest may be too small for a number; its logarithm is not.
    student = scores - _softmax(scores)[1]
    seen = teacher > 0
    return float(np.sum(teacher[seen] * (np.log(teacher[seen]) - student[seen])))


def _softmax(scores: Array) -> tuple[Array, Array]:
    largest = scores.max(-1, keepdims=True)
    weights = np.exp(scores - largest)
    total = weights.sum(-1, keepdims=True)
    return weights / total, (largest + np.log(total))[..., 0]
