"""The kernels of flexmsa: tensors in, tensors out; no autograd, no dispatch, no checks of user input.

Every kernel takes the same table of sequences, which makes batches, left padding, part-filled caches and packed
documents one case:

    sequences [N, 5] int32, columns (batch, q_start, q_end, k_start, k_end)

Sequence n consists of the queries q_start .. q_end-1 and the keys k_start .. k_end-1 of one batch row. Attention is
causal and aligned at the end: query i sees the keys k_start .. k_end - q_end + i (no key if that is before k_start).
Blocks are anchored at k_start: block b of a sequence begins at key k_start + b*block_size. Every query of the batch
belongs to exactly one sequence, and sequences have no keys in common.

A rank of context parallel has all keys of a document and some of its queries: *fragments* of the document, whose keys
overlap. Their table is [documents, fragments, 5]. The rows of a document have one batch row and one k_start, so that
they share its blocks; each sees as far as its own k_end. Queries ascend through the rows, and within a document so do
the keys that they see. A row without queries fills up a document of fewer fragments.

In a paged cache, keys are numbered through the rows of page_table: key j of batch row b is in page page_table[0].flat[
b * stride + j // block_size] for rows `stride` numbers apart. A batch row has a row of the table, and k_start 0. Packed
sequences, all of batch row 0, have a row each: sequence r begins at key r * stride * block_size.

A few queries that each have a row of their own, `q_end = q_start + 1`, may see any keys: `scored_blocks`, and
`attend_blocks` of up to 16 queries per batch row, read the rows one by one. So decode processes that share a cache.
"""
