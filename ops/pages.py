"""Operators on the pages of a server that assigns them itself: what a step of an engine calls.

- flexmsa::paged_table: the table of sequences of a step;
- flexmsa::write_pages: new tokens to their slots;
- flexmsa::select_pages: selection into the caller's buffer.

Attention is that to a cache. All are for inference and have no gradient.
"""

from flexmsa.kernels import sequences as kernel
from flexmsa.kernels.rules import SelectionRule

from .checks import check_cu_seqlens, check_page_table, check_range, check_topk
from .dispatch import run_kernel
from .library import operator


@operator(
    "paged_table(Tensor? cu_seqlens_q, Tensor kv_lens, Tensor page_table, int num_tokens, int page_size, "
    "int num_decodes, Tensor(a!) table) -> ()",
    fake=lambda *args: None,
    has_gradient=False,
)
def paged_table(cu_seqlens_q, kv_lens, page_table, num_tokens, page_size, num_decodes, table):
    """Write `sequences` (see flexmsa.kernels) of kv_lens [R] to table [R + 4, 5].

    The first num_decodes rows are a table of their own, of sequences of one query each. The table of the others begins
    at `second_part`; with cu_seqlens_q it has a row more.
    """
    check_range("kv_lens", kv_lens, 0, page_table.shape[1] * page_size)
    if cu_seqlens_q is not None:
        check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, num_tokens, padded=True)
    first_row, first_pages = second_part(num_decodes)
    if num_decodes:
        first = kv_lens[:num_decodes], page_table[:num_decodes], num_decodes, page_size
        kernel.paged_table(None, *first, table[:num_decodes])
        cu_seqlens_q = cu_seqlens_q[num_decodes:]
    others = kv_lens[num_decodes:], page_table[first_pages:], num_tokens - num_decodes, page_size
    rows = kv_lens.shape[0] - num_decodes + (cu_seqlens_q is not None)
    kernel.paged_table(cu_seqlens_q, *others, table[first_row : first_row + rows], num_decodes - first_pages)


def second_part(num_decodes: int) -> tuple[int, int]:
    """The first rows of table and page_table for what does not decode, at multiples of 16 bytes.

    Kernels are compiled for alignment. Rows of page_table may belong to decodes, which the table says.
    """
    return -(-num_decodes // 4) * 4, num_decodes // 4 * 4


@operator(
    "write_pages(Tensor k, Tensor v, Tensor index_k, Tensor slots, Tensor(a!) pages_k, Tensor(b!) pages_v, "
    "Tensor(c!) pages_index_k, Tensor(d!)? k_scale, Tensor(e!)? v_scale, Tensor(f!)? index_k_scale, float k_factor, "
    "float v_factor, float index_k_factor, str backend) -> ()",
    fake=lambda *args: None,
    has_gradient=False,
)
def write_pages(*args):
    """Write k, v [1, Hkv, T, D] and index_k [1, 1, T, Di] to slots [T]; the schema names the arguments.

    A scale of one dimension belongs to e4m3 pages without scales, whose numbers are multiplied by the factor.
    """
    *inputs, k_factor, v_factor, index_k_factor, backend = args
    tensors = inputs[:7] + [None if x is None or x.dim() == 1 else x for x in inputs[7:]]
    run_kernel(backend, "write_pages", *tensors, (k_factor, v_factor, index_k_factor))


@operator(
    "select_pages(Tensor index_q, Tensor index_k, Tensor sequences, Tensor page_table, Tensor? index_k_scale, "
    "Tensor(a!) ids, int num_local_blocks, int num_init_blocks, str backend, int first_row=0) -> ()",
    fake=lambda *args: None,
    has_gradient=False,
)
def select_pages(index_q, index_k, sequences, page_table, scale, ids, num_local, num_init, backend, first_row=0):
    """Write the block_indices of `select_blocks` to ids [B, Hkv, Sq, topk], of any strides but the last."""
    block_size, topk = index_k.shape[2], ids.shape[3]
    check_topk(topk, backend)
    check_page_table(page_table, sequences, block_size, index_k.shape[0], backend, first_row)
    rule = SelectionRule(block_size, topk, num_local, num_init)
    run_kernel(backend, "select_blocks", index_q, index_k, sequences, rule, page_table, scale, ids)
