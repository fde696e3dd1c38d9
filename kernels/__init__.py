"""The kernels of flexmsa: tensors in, tensors out; no autograd, no dispatch, no checks of user input.

Every kernel takes the same table of sequences, which makes batches, left padding, part-filled caches and packed
documents one case:

    sequences [N, 5] int32, columns (batch, q_start, q_end, k_start, k_end)

Sequence n consists of the queries q_start .. q_end-1 and the keys k_start .. k_end-1 of one batch row. Attention is
causal and aligned at the end: query i sees the keys k_start .. k_end - q_end + i (no key if that is before k_start).
Blocks are anchored at k_start: block b of a sequence begins at key k_start + b*block_size. Every query of the batch
belongs to exactly one sequence.
"""
