"""What a cache of int8 index keys stores and selects, in NumPy and plain PyTorch, one query after the other."""

import numpy as np
import torch

LIMIT = torch.finfo(torch.float32).max


def quantised(x):
    """(int8 numbers [..., D], float32 scales [...]) of vectors x [..., D]."""
    vectors = x.detach().to(torch.float32).numpy()
    largest = np.abs(vectors).max(-1)
    scale = np.maximum(largest / np.float32(127), np.float32(2.0**-126))
    with np.errstate(invalid="ignore"):
        numbers = np.rint(vectors / scale[..., None])
    bad = ~np.isfinite(largest)
    numbers[bad], scale[bad] = 0, np.nan
    return torch.from_numpy(numbers.astype(np.int8)), torch.from_numpy(scale)


def block_scores(query, numbers, scale, block_size):
    """float32 [blocks] of an int8 query [D] and the int8 keys [n, D] that it sees: integer sums times a scale each."""
    sums = (numbers.long() * query.long()).sum(-1)
    scores = torch.nan_to_num(sums.float() * scale, nan=-LIMIT, posinf=LIMIT, neginf=-LIMIT)
    return torch.stack([part.max() for part in scores.split(block_size)])


def best_blocks(scores, rule):
    """The ids of one query, ascending, then -1."""
    newest = len(scores) - 1
    rank = [(not rule.is_forced(block, newest), -float(score), block) for block, score in enumerate(scores)]
    chosen = sorted(block for _, _, block in sorted(rank)[: rule.topk])
    return torch.tensor(chosen + [-1] * (rule.topk - len(chosen)), dtype=torch.int32)


def selection(index_q, numbers, scale, sequences, rule):
    """block_indices [B, Hkv, Sq, topk] of index_q [B, Hkv, Sq, D] for a contiguous cache and a table of sequences."""
    ids = torch.full((*index_q.shape[:3], rule.topk), -1, dtype=torch.int32)
    queries, _ = quantised(index_q)
    for row, q_start, q_end, k_start, k_end in sequences.tolist():
        for token in range(q_start, q_end):
            stop = k_end - q_end + token + 1
            if stop <= k_start:
                continue
            keys, factors = numbers[row, 0, k_start:stop], scale[row, 0, k_start:stop]
            for group in range(index_q.shape[1]):
                scores = block_scores(queries[row, group, token], keys, factors, rule.block_size)
                ids[row, group, token] = best_blocks(scores, rule)
    return ids


def wild(count, size):
    """Vectors of any norm, with zeros, denormal numbers, halves between two integers, NaN and infinities."""
    x = torch.randn(count, size) * torch.exp2(torch.randint(-30, 30, (count, 1)))
    x[1], x[2], x[3], x[4] = 0, 1e-42, 3e38, 2.0**-125
    x[5, 2], x[6, 1], x[7, 0], x[8] = torch.nan, torch.inf, -torch.inf, torch.nan
    x[9] = torch.randint(-253, 254, (size,)) / 2
    x[9, 0], x[10] = 127, x[9] * 2.0**-100
    x[11] = torch.tensor([torch.finfo(torch.float32).max, *[1.0] * (size - 1)])
    return x
