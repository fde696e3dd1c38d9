"""The index loss's main kernel where the main branch's backward leaves the teacher: the same as `gradient`, lighter.

Program (i, part, n) owns work item i of range n of a pass, and one part of its block. It keeps its part of index_k, and
takes the entries `rows` at a time. Scores are [keys, entries], so that grad_index_k takes them from registers.
"""

import triton
import triton.language as tl

from ..common.launch import Launch, Options
from ..common.softmax import LN_2, LOG2_E
from ..schedule.inverse_index import count_seen
from .gradient import TINY, fast_log2, store_key_gradients
from .loads import LossCall, find_entries, load_entries, load_index_keys, load_part, load_rows
from .teacher import load_teacher


@triton.jit
def given_teacher_kernel(index_q, index_k, buffers, index, items, gradients, sizes, first_range, C: tl.constexpr):
    """losses; partial_q without its factor; partial_k, or an addition to grad_k."""
    COLUMNS: tl.constexpr = C.columns
    ROWS: tl.constexpr = C.rows
    INDEX_DEPTH: tl.constexpr = C.index_depth
    part = load_part(items, first_range, COLUMNS)
    if part.begin >= part.stop:
        return
    own = find_entries(part, index_q, index, items, sizes, first_range)
    num_entries, num_keys = own.number, part.stop_key - part.first_key
    y = load_index_keys(index_k, part, C)
    precision: tl.constexpr = "ieee" if y.dtype == tl.float32 else "tf32"
    lead = part.shift + 1 - part.first_key
    column, depth = tl.arange(0, COLUMNS), tl.arange(0, INDEX_DEPTH)
    key = tl.program_id(1) * COLUMNS + column
    grad_k = tl.zeros([COLUMNS, INDEX_DEPTH], tl.float32)
    loss, entropy = tl.zeros([COLUMNS], tl.float32), tl.zeros([ROWS], tl.float32)
    for step in range(0, num_entries, ROWS):
        number = step + tl.arange(0, ROWS)
        entry = load_entries(own.entries_ptr, number, num_entries, own.first_entry)
        query = own.first_query + entry // index.topk
        x = load_rows(own.x_base, query, index_q.stride_s, index_q.stride_d, C.index_head_dim, INDEX_DEPTH)
        given = load_teacher(buffers.teacher, part.begin + tl.minimum(number, num_entries - 1), key, C)
        index_lse = tl.load(buffers.index_lse + entry // index.topk)
        scores = tl.dot(y, tl.trans(x), input_precision=precision)
        log_student = scores * sizes.index_scale - index_lse[None, :]
        num_seen = count_seen(index, query + lead, part.batch, query, part.first_key, sizes.seqlen_q)
        num_seen = tl.where(number < num_entries, tl.minimum(num_seen, num_keys), 0)
        seen = column[:, None] < num_seen[None, :]
        # P log P apart from P L: each is summed as it lies. Of a key that is not seen, P is 0. P and the student have
        # equal sums but for rounding: with their difference, the loss hardly depends on how P is rounded.
        given = tl.where((number < num_entries)[:, None], given, 0.0)
        entropy += tl.sum(given * fast_log2(tl.maximum(given, TINY)), axis=1)
        teacher = tl.trans(given)
        student = tl.where(seen, tl.exp2(log_student), 0.0)
        loss += tl.sum(student * LOG2_E - teacher * (log_student + LOG2_E), axis=1)
        grad_scores = (student - teacher).to(y.dtype)
        grad_k = tl.dot(grad_scores, x, grad_k, input_precision=precision)
        grad_q = tl.dot(tl.trans(grad_scores), y, input_precision=precision)
        share = entry * tl.num_programs(1) + tl.program_id(1)
        place = gradients.partial_q + share.to(tl.int64)[:, None] * C.index_head_dim + depth[None, :]
        mask = (number < num_entries)[:, None] & (depth < C.index_head_dim)[None, :]
        tl.store(place, grad_q.to(gradients.partial_q.dtype.element_ty), mask=mask)
    item = tl.cast(first_range + tl.program_id(2), tl.int64) * items.num_items + tl.program_id(0)
    tl.store(
        buffers.losses + item * tl.num_programs(1) + tl.program_id(1),
        (tl.sum(loss, axis=0) + tl.sum(entropy, axis=0)) * LN_2,
    )
    # Loaded again, so that no registers are held for it in the loop.
    part = load_part(items, first_range, COLUMNS)
    store_key_gradients(grad_k * tl.load(gradients.unit), part, gradients, sizes, C.index_head_dim)


def given_teacher(x: LossCall) -> Launch:
    """Fills the losses and partial gradients of a pass."""
    grid = x.items.num_items, x.constants.parts, 1
    arguments = x.arguments(given_teacher_kernel)
    # Copies ahead of the products take more than they save.
    options = Options(x.config.num_warps, num_stages=1)
    return Launch(given_teacher_kernel, grid, arguments, {"C": x.constants}, options)
