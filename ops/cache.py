"""Operators on a cache: append to it in place, attend to given blocks of it, or select the blocks and attend.

All are for inference and have no gradient. Autocast does not cast for them, which would copy the whole cache: new
tokens and queries must have the cache's dtype. docs/serving.md describes the layouts of contiguous and paged caches.
"""

import torch

from flexmsa.kernels.rules import SelectionRule

from .attention import empty_out_and_lse
from .checks import check_append, check_page_table, check_range, check_topk
from .dispatch import run_kernel
from .library import operator


@operator(
    "append(Tensor k, Tensor v, Tensor index_k, Tensor? lens, Tensor(a!) cache_k, Tensor(b!) cache_v, "
    "Tensor(c!) cache_index_k, Tensor(d!)? cache_k_scale, Tensor(e!)? cache_v_scale, "
    "Tensor(f!)? cache_index_k_scale, Tensor? page_table, Tensor kv_starts, Tensor(g!) kv_lens, "
    "Tensor(h!) sequences, Tensor(i!) status, str backend) -> ()",
    fake=lambda *args: None,
    has_gradient=False,
    cast=0,
)
def append(*args):
    """Write n new tokens of each row after its kv_lens tokens; update kv_lens and the table `sequences`.

    The schema names the arguments.
    """
    *inputs, backend = args
    k, lens, cache, page_table, kv_lens = (args[i] for i in (0, 3, 4, 10, 12))
    if lens is not None:
        check_range("lens", lens, 0, k.shape[2])
    if backend == "torch":
        check_append(k.shape[2], lens, kv_lens, page_table, cache)
    run_kernel(backend, "append", *inputs)


@operator(
    "attend_blocks(Tensor q, Tensor k, Tensor v, Tensor? block_indices, Tensor sequences, int block_size, float scale, "
    "str backend, Tensor? page_table=None, Tensor? k_scale=None, Tensor? v_scale=None) -> (Tensor, Tensor)",
    fake=empty_out_and_lse,
    cast=0,
)
def attend_blocks(q, k, v, block_indices, sequences, block_size, scale, backend, page_table=None, *scales):
    """Return out [B, Hq, Sq, D] and lse [B, Hq, Sq]; block_indices None selects every visible block."""
    check_page_table(page_table, sequences, block_size, k.shape[0], backend)
    main = q, k, v, block_indices, sequences, block_size, scale
    return run_kernel(backend, "attend_blocks", *main, page_table, *scales)


def _empty_out_lse_and_ids(q, index_q, k, v, index_k, sequences, block_size, topk, *_):
    return *empty_out_and_lse(q), index_q.new_empty((*index_q.shape[:3], topk), dtype=torch.int32)


@operator(
    "select_and_attend(Tensor q, Tensor index_q, Tensor k, Tensor v, Tensor index_k, Tensor sequences, int block_size, "
    "int topk, int num_local_blocks, int num_init_blocks, float scale, str backend, Tensor? page_table=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? index_k_scale=None) -> (Tensor, Tensor, Tensor)",
    fake=_empty_out_lse_and_ids,
    cast=0,
)
def select_and_attend(
    q, index_q, k, v, index_k, sequences, block_size, topk, num_local, num_init, scale, backend, pages=None, *scales
):
    """Return out and lse of `attend_blocks`, and the block_indices of `select_blocks` that it attended to."""
    check_topk(topk, backend)
    check_page_table(pages, sequences, block_size, k.shape[0], backend)
    main = q, index_q, k, v, index_k, sequences, SelectionRule(block_size, topk, num_local, num_init), scale
    return run_kernel(backend, "select_and_attend", *main, pages, *scales)
