"""flexmsa::select_blocks: the blocks that the index branch selects; flexmsa::scored_blocks: with their scores."""

import torch

from flexmsa.kernels.rules import SelectionRule

from .attention import statistics_dtype
from .checks import check_page_table, check_topk
from .dispatch import run_kernel
from .library import operator


def _empty_ids(index_q, index_k, sequences, block_size, topk, *_):
    return index_q.new_empty((*index_q.shape[:3], topk), dtype=torch.int32)


@operator(
    "select_blocks(Tensor index_q, Tensor index_k, Tensor sequences, int block_size, int topk, int num_local_blocks, "
    "int num_init_blocks, str backend, Tensor? page_table=None, Tensor? index_k_scale=None) -> Tensor",
    fake=_empty_ids,
    has_gradient=False,
    cast=2,
)
def select_blocks(
    index_q, index_k, sequences, block_size, topk, num_local, num_init, backend, page_table=None, index_k_scale=None
):
    """Return block_indices [B, Hkv, Sq, topk] int32 for index_q [B, Hkv, Sq, Di], index_k [B, 1, Sk, Di] or pages."""
    check_topk(topk, backend)
    check_page_table(page_table, sequences, block_size, index_k.shape[0], backend)
    rule = SelectionRule(block_size, topk, num_local, num_init)
    return run_kernel(backend, "select_blocks", index_q, index_k, sequences, rule, page_table, index_k_scale)


def _empty_scored_blocks(index_q, index_k, sequences, block_size, topk, *_):
    ids = index_q.new_empty((*index_q.shape[:3], topk), dtype=torch.int32)
    return ids, ids.new_empty(ids.shape, dtype=statistics_dtype(index_q))


@operator(
    "scored_blocks(Tensor index_q, Tensor index_k, Tensor sequences, int block_size, int topk, str backend, "
    "Tensor? page_table=None, Tensor? index_k_scale=None) -> (Tensor, Tensor)",
    fake=_empty_scored_blocks,
    has_gradient=False,
    cast=2,
)
def scored_blocks(index_q, index_k, sequences, block_size, topk, backend, page_table=None, index_k_scale=None):
    """Return the topk best blocks, and their scores, [B, Hkv, Sq, topk] each, best first, then -1 and -inf.

    No block is forced: whoever has other keys of the same sequences merges them, and then forces blocks.
    """
    check_topk(topk, backend)
    check_page_table(page_table, sequences, block_size, index_k.shape[0], backend)
    rule = SelectionRule(block_size, topk, 0, 0)
    return run_kernel(backend, "scored_blocks", index_q, index_k, sequences, rule, page_table, index_k_scale)
