"""The KL divergence that trains the index branch, fused with its closed-form gradient, key blocks in the outer loop.

For each query i and group, over the visible tokens j of its selected blocks, with G heads per group:

    P_j = mean over the heads of exp(scale <q, k_j> - lse)                       teacher
    L_j = index_scale <index_q, index_k_j> - index_lse,  exp(L_j)                student
    loss = sum_j P_j (log P_j - L_j) / count,   dS_j = exp(L_j) - P_j,   unit = index_scale / count
    grad_index_q = unit sum_j dS_j index_k_j,   grad_index_k_j = unit sum_i dS_ij index_q_i

count: the (batch, group, query) that see a key. Layouts: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], index_q [B, Hkv, Sq, Di],
index_k [B, 1, Sk, Di], any strides; the gradients fp32, contiguous, of the shapes of index_q and index_k.

The kernels work in passes (see `work_items`), each of up to five launches:

1. block_lse: a program owns a work item, and writes each entry's logsumexp over the item's block;
2. index_lse: the logsumexp of each token, over its top-k slots (both in `student`);
3. index_loss: a program owns a work item again, and computes its loss and gradients (`gradient`);
4. sum_items: adds up grad_index_k of the blocks whose lists have several work items;
5. sum_slots: adds up grad_index_q of each token (both in `reduce`).

The backward of the main branch leaves the teacher (see `teacher`), and runs the same launches without computing it.

A block too large for the registers is cut into `parts` of `columns` keys, each with programs and partial results of its
own. Every sum has a fixed order, and no two programs write one address: results repeat bit by bit.

Cost for E entries (topk per token and group), block size n: 2 G D n E FLOPs for the teacher and 8 Di n E for the
student, 4.4 + 1.1 TFLOP at 128K tokens of M3's shape, 7 ms at 783 TFLOP/s; the G n E exponentials take 5 ms more.
Bytes, in bf16: 2 G D E of q gathered, 34 GB, 8 ms if none of it stays in L2; 2 * 2 Di E of index_q gathered twice, and
2 * 4 Di E of partial results written and read back, 13 GB, 3 ms. 15 to 20 ms are expected. With the teacher given:
1.1 TFLOP, 1.5 ms, and 2 * 2 n E bytes of it, 2 * 2 Di E of index_q and 2 * 2 Di E of partial results in 16 bits, 13 GB,
3 ms, about 5 ms in all. Memory beside inputs and outputs: the workspace, the inverse index, and a copy of lse.
"""

import torch

from ...problem import Problem
from ...tuning import tuned_config
from ...workspace import ranges_per_pass, tokens_per_range
from ..common.launch import Launch, View, view
from ..common.passes import PassLaunch, of_passes, run_pass
from ..common.sizes import cdiv
from ..common.softmax import LOG2_E
from ..common.target import GLUON, target_of
from ..schedule.inverse_index import InverseIndex
from ..schedule.make_index import inverse_indexes
from ..schedule.work_items import WorkItems, cut_into_items
from .config import DEPENDS_ON, LossConfig, LossConstants, default_config, loss_constants
from .given_teacher import given_teacher
from .gradient import loss_and_gradients
from .loads import Buffers, Gradients, LossCall, Sizes
from .reduce import loss_scale, sum_items, sum_slots
from .student import block_lse, index_lse

if GLUON:
    from . import given_teacher_sm90


def slot_bytes(constants: LossConstants, length: int, size: int) -> int:
    """Bytes of partial results per top-k slot of a token, with grad_index_q in `size` bytes, 0 without gradients.

    At most two work items for every `length` entries keep a grad_index_k.
    """
    shares = 4 + size * constants.index_head_dim
    keys = 8 * constants.columns * constants.index_head_dim // length if size else 0
    return constants.parts * (shares + keys)


def loss_config(problem: Problem, device: torch.device) -> LossConfig:
    """The configuration for a problem on a device: the default, or what tuning found."""
    target = target_of(device)
    return tuned_config("loss", problem, target, default_config(problem, target), DEPENDS_ON)


def make_call(
    views: tuple[View | None, View | None, View, View],
    teacher: torch.Tensor | None,
    lse: torch.Tensor | None,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    index: InverseIndex,
    items: WorkItems,
    num_ranges: int,
    sizes: Sizes,
    config: LossConfig,
    constants: LossConstants,
) -> LossCall:
    """The call for the passes of an index, of up to num_ranges token ranges each, with partial results of its own.

    views: of q, k, index_q and index_k; teacher, lse: see `Buffers`; outputs: unit, grad_q and grad_k of `Gradients`,
    or None without gradients.
    """
    tokens, parts, blocks = num_ranges * index.range_tokens, constants.parts, index.blocks
    gradients = None
    if outputs is not None:
        keys = num_ranges * items.num_slots, parts, constants.columns, constants.index_head_dim
        queries = tokens, index.topk, parts, constants.index_head_dim
        partial_k = blocks.new_empty(keys, dtype=torch.float32)
        gradients = Gradients(*outputs, outputs[1].new_empty(queries), partial_k)
    buffers = Buffers(
        lse,
        teacher,
        partial_lse=blocks.new_empty((tokens, index.topk, parts), dtype=torch.float32),
        index_lse=blocks.new_empty(tokens, dtype=torch.float32),
        losses=blocks.new_zeros((index.num_ranges, items.num_items, parts), dtype=torch.float32),
    )
    return LossCall(*views, buffers, index, items, gradients, sizes, config, constants)


def with_teacher(x: LossCall, index_k: torch.Tensor, limits: torch.Tensor) -> Launch:
    """The main launch where the teacher is given; limits: see `given_teacher_sm90.Tensors`."""
    target = target_of(index_k.device)
    if GLUON and given_teacher_sm90.supports(x, index_k, target):
        return given_teacher_sm90.given_teacher_sm90(x, index_k, limits, target)
    return given_teacher(x)


def launches_of(x: LossCall, main: Launch) -> list[PassLaunch]:
    """The launches of a pass. They compute its losses, fill grad_q and add to grad_k; main: the third of them."""
    sums = [] if x.gradients is None else [sum_items, sum_slots] if x.items.num_slots > 0 else [sum_slots]
    return of_passes([block_lse(x), index_lse(x), main, *(step(x) for step in sums)], axis=2)


def index_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    block_indices: torch.Tensor | None,
    lse: torch.Tensor,
    sequences: torch.Tensor,
    block_size: int,
    scale: float,
    index_scale: float,
    with_grad: bool,
    count: torch.Tensor | None = None,
    config: LossConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, grad_index_q, grad_index_k), as the module's docstring defines them; no gradients unless `with_grad`.

    lse [B, Hq, Sq] is the main branch's, of the same blocks. block_indices [B, Hkv, Sq, topk] may be in any order and
    hold -1, repeats, ids out of range and blocks that the query does not see; None stands for every visible block.
    `count`, a scalar, replaces the count; `config` overrides the choice of tiles.
    """
    loss = torch.zeros((), dtype=torch.float64, device=q.device)
    grad_q = torch.zeros(index_q.shape if with_grad else 0, dtype=torch.float32, device=q.device)
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1:3]
    topk = cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    if q.numel() == 0 or topk == 0 or seqlen_k == 0:
        return loss.float(), grad_q, torch.zeros_like(index_k if with_grad else grad_q, dtype=torch.float32)
    problem = Problem(
        num_kv_heads,
        q.dtype,
        group_size=num_heads // num_kv_heads,
        head_dim=head_dim,
        index_head_dim=index_q.shape[3],
        block_size=block_size,
        topk=None if block_indices is None else topk,
    )
    config = config or loss_config(problem, q.device)
    constants = loss_constants(config, problem)
    mean = loss_scale(sequences, None, count, num_kv_heads, index_scale)
    # The inverse index of all tokens, with the memory that sorting it takes, is there whatever the range.
    index_bytes = 32 * num_kv_heads if block_indices is not None else 0
    bytes_per_token = topk * (slot_bytes(constants, config.length, 4 if with_grad else 0) + index_bytes)
    range_tokens = tokens_per_range(batch * seqlen_q, bytes_per_token)
    scales = scale * LOG2_E.value, index_scale * LOG2_E.value
    sizes = Sizes(batch, num_kv_heads, problem.group_size, seqlen_q, seqlen_k, *scales)
    views, lse_rows = (view(q), view(k), view(index_q), view(index_k)), lse.transpose(1, 2).contiguous()
    key_grads, per_pass = grad_q, 0
    for index in inverse_indexes(block_indices, sequences, q, k, block_size, range_tokens):
        items = cut_into_items(index, config.length)
        if per_pass == 0:
            # No later index has more tokens.
            tokens = index.num_tokens, index.range_tokens
            per_pass = ranges_per_pass(num_kv_heads, *tokens, bytes_per_token, topk * constants.parts)
            if with_grad:
                key_grads = index_k.new_zeros((per_pass, *index_k.shape), dtype=torch.float32)
        outputs = (mean.unit, grad_q, key_grads) if with_grad else None
        x = make_call(views, None, lse_rows, outputs, index, items, per_pass, sizes, config, constants)
        launches = launches_of(x, loss_and_gradients(x))
        for first in range(0, index.num_ranges, per_pass):
            run_pass(launches, first, min(per_pass, index.num_ranges - first))
        loss += x.buffers.losses.sum(dtype=torch.float64)
    return (loss / mean.number).float(), grad_q, key_grads.sum(0) if with_grad else key_grads
