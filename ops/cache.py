"""Operators on a cache or an engine's pages: append in place, attend to given blocks, or select the blocks and attend.

Attention writes to the caller's out and ids, of any strides but the last. Scales of pages may be [block_size], of each
page. All are for inference and have no gradient. Autocast does not cast for them, which would copy the whole cache: new
tokens and queries must have the cache's dtype. docs/serving.md describes the layouts of contiguous and paged caches.
"""

from flexmsa.kernels.rules import SelectionRule

from .attention import statistics_dtype
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
    if backend != "triton":
        check_append(k.shape[2], lens, kv_lens, page_table, cache)
    run_kernel(backend, "append", *inputs)


def _empty_lse(q, *_):
    return q.new_empty(q.shape[:3], dtype=statistics_dtype(q))


@operator(
    "attend_blocks(Tensor q, Tensor k, Tensor v, Tensor? block_indices, Tensor sequences, int block_size, float scale, "
    "str backend, Tensor? page_table, Tensor? k_scale, Tensor? v_scale, Tensor(a!) out, int first_row=0) -> Tensor",
    fake=_empty_lse,
    has_gradient=False,
    cast=0,
)
def attend_blocks(*args):
    """Write out [B, Hq, Sq, D], return lse [B, Hq, Sq]; block_indices None selects every visible block.

    The schema names the arguments. first_row: the user's row that is the first of page_table, for errors.
    """
    *main, backend, page_table, k_scale, v_scale, out = args[:12]
    k, sequences, block_size = (main[i] for i in (1, 4, 5))
    check_page_table(page_table, sequences, block_size, k.shape[0], backend, *args[12:])
    return run_kernel(backend, "attend_blocks", *main, page_table, k_scale, v_scale, out)[1]


@operator(
    "select_and_attend(Tensor q, Tensor index_q, Tensor k, Tensor v, Tensor index_k, Tensor sequences, int block_size, "
    "int num_local_blocks, int num_init_blocks, float scale, str backend, Tensor? page_table, Tensor? k_scale, "
    "Tensor? v_scale, Tensor? index_k_scale, Tensor(a!) out, Tensor(b!) ids, int first_row=0) -> Tensor",
    fake=_empty_lse,
    has_gradient=False,
    cast=0,
)
def select_and_attend(*args):
    """`attend_blocks` to the block_indices of `select_blocks`, which are written to ids [B, Hkv, Sq, topk].

    The schema names the arguments.
    """
    *branches, sequences, block_size, num_local, num_init, scale, backend, page_table = args[:12]
    topk, num_pages = args[16].shape[3], branches[2].shape[0]
    check_topk(topk, backend)
    check_page_table(page_table, sequences, block_size, num_pages, backend, *args[17:])
    rule = SelectionRule(block_size, topk, num_local, num_init)
    return run_kernel(backend, "select_and_attend", *branches, sequences, rule, scale, *args[11:17])[1]
