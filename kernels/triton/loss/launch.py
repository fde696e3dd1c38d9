"""The KL divergence that trains the index branch, fused with its closed-form gradient, key blocks in the outer loop.

For each query i and group, over the visible tokens j of its selected blocks, with G heads per group:

    P_j = mean over the heads of exp(scale <q, k_j> - lse)                       teacher
    L_j = index_scale <index_q, index_k_j> - index_lse,  exp(L_j)                student
    loss = sum_j P_j (log P_j - L_j) / count,   dS_j = exp(L_j) - P_j,   unit = index_scale / count
    grad_index_q = unit sum_j dS_j index_k_j,   grad_index_k_j = unit sum_i dS_ij index_q_i

count: the (batch, group, query) that see a key. Layouts: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], index_q [B, Hkv, Sq, Di],
index_k [B, 1, Sk, Di], any strides; the gradients fp32, contiguous, of the shapes of index_q and index_k.

The kernels work on one token range of one group at a time (see `inverse_index`), in up to five launches:

1. block_lse: a program owns a work item, and writes each entry's logsumexp over the item's block;
2. index_lse: the logsumexp of each token, over its top-k slots (both in `student`);
3. index_loss: a program owns a work item again, and computes its loss and gradients (`gradient`);
4. sum_items: adds up grad_index_k of the blocks whose lists have several work items;
5. sum_slots: adds up grad_index_q of each token (both in `reduce`).

A block too large for the registers is cut into `parts` of `columns` keys, each with programs and partial results of its
own. Every sum has a fixed order, and no two programs write one address: results repeat bit by bit.

Cost for E entries (topk per token and group), block size n: 2 G D n E FLOPs for the teacher and 8 Di n E for the
student, 4.4 + 1.1 TFLOP at 128K tokens of M3's shape, 7 ms at 783 TFLOP/s; the G n E exponentials take 5 ms more.
Bytes, in bf16: 2 G D E of q gathered, 34 GB, 8 ms if none of it stays in L2; 2 * 2 Di E of index_q gathered twice, and
2 * 4 Di E of partial results written and read back, 13 GB, 3 ms. 15 to 20 ms are expected. Memory beside inputs and
outputs: the workspace, the inverse index, and a copy of lse.
"""

import torch
import triton

from ...problem import Problem
from ...sequences import Sequence
from ...tuning import tuned_config
from ...workspace import tokens_per_range
from ..common.launch import View, view
from ..common.softmax import LOG2_E
from ..common.target import target_of
from ..schedule.inverse_index import InverseIndex, inverse_indexes
from ..schedule.work_items import cut_into_items
from .config import DEPENDS_ON, LossConfig, LossConstants, default_config, loss_constants
from .gradient import loss_and_gradients
from .loads import Buffers, Gradients, LossCall, Sizes
from .reduce import sum_items, sum_slots
from .student import block_lse, index_lse


def slot_bytes(config: LossConfig, constants: LossConstants, with_grad: bool, index_groups: int) -> int:
    """Bytes per top-k slot of a token: partial results, and the inverse index of `index_groups` groups.

    At most two work items for every `length` entries keep a grad_index_k; the index is counted with the memory that
    sorting it takes.
    """
    partial = 4 * constants.parts
    if with_grad:
        per_entry = constants.parts * constants.index_head_dim
        partial += 4 * per_entry * (config.length + 2 * config.columns) // config.length
    return partial + 32 * index_groups


def add_losses(
    index: InverseIndex,
    views: tuple[View, View, View, View],
    lse_rows: torch.Tensor,
    outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    sizes: Sizes,
    config: LossConfig,
    constants: LossConstants,
) -> torch.Tensor:
    """The loss of each work item of an index; fills grad_q for the tokens of the index, and adds to grad_k.

    views: of q, k, index_q and index_k; outputs: unit, grad_q and grad_k, or None without gradients.
    """
    topk, range_tokens, parts = index.topk, index.range_tokens, constants.parts
    items = cut_into_items(index, config.length)
    losses = lse_rows.new_zeros(index.num_ranges, items.num_items, parts)
    partial_lse, index_lse_rows = lse_rows.new_empty(range_tokens, topk, parts), lse_rows.new_empty(range_tokens)
    gradients, num_slots = None, 0
    if outputs is not None:
        num_slots = min(items.num_items, 2 * (range_tokens * topk // config.length))
        gradients = Gradients(
            *outputs,
            partial_q=lse_rows.new_empty(range_tokens, topk, parts, constants.index_head_dim),
            partial_k=lse_rows.new_empty(num_slots, parts, constants.columns, constants.index_head_dim),
        )
    buffers = Buffers(lse_rows, partial_lse, index_lse_rows, losses)
    x = LossCall(*views, buffers, index, items, gradients, sizes, config, constants)
    for number in range(index.num_ranges):
        block_lse(x, number).run()
        index_lse(x, number).run()
        loss_and_gradients(x, number).run()
        if gradients is not None:
            if num_slots > 0:
                sum_items(x, number).run()
            sum_slots(x, number).run()
    return losses


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
    config: LossConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, grad_index_q, grad_index_k), as the module's docstring defines them; no gradients unless `with_grad`.

    lse [B, Hq, Sq] is the main branch's, of the same blocks. block_indices [B, Hkv, Sq, topk] may be in any order and
    hold -1, repeats, ids out of range and blocks that the query does not see; None stands for every visible block.
    `config` overrides the choice of tiles.
    """
    loss = torch.zeros((), dtype=torch.float64, device=q.device)
    grad_q = torch.zeros(index_q.shape if with_grad else 0, dtype=torch.float32, device=q.device)
    grad_k = torch.zeros(index_k.shape if with_grad else 0, dtype=torch.float32, device=q.device)
    batch, num_heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1:3]
    topk = triton.cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    if q.numel() == 0 or topk == 0 or seqlen_k == 0:
        return loss.float(), grad_q, grad_k
    problem = Problem(
        num_kv_heads,
        q.dtype,
        group_size=num_heads // num_kv_heads,
        head_dim=head_dim,
        index_head_dim=index_q.shape[3],
        block_size=block_size,
        topk=None if block_indices is None else topk,
    )
    target = target_of(q.device)
    config = config or tuned_config("loss", problem, target, default_config(problem, target), DEPENDS_ON)
    constants = loss_constants(config, problem)
    table = Sequence(*sequences.unbind(1))
    with_keys = (table.k_end - table.k_start).minimum(table.q_end - table.q_start).clamp(min=0)
    count = (with_keys.sum() * num_kv_heads).clamp(min=1)
    unit = (index_scale / count).float()
    lse_rows = lse.transpose(1, 2).contiguous()
    index_groups = num_kv_heads if block_indices is None else 0
    range_tokens = tokens_per_range(batch * seqlen_q, topk * slot_bytes(config, constants, with_grad, index_groups))
    outputs = (unit, grad_q, grad_k) if with_grad else None
    scales = scale * LOG2_E.value, index_scale * LOG2_E.value
    sizes = Sizes(num_kv_heads, problem.group_size, seqlen_q, seqlen_k, *scales)
    views = view(q), view(k), view(index_q), view(index_k)
    for index in inverse_indexes(block_indices, sequences, q, k, block_size, range_tokens):
        losses = add_losses(index, views, lse_rows, outputs, sizes, config, constants)
        loss += losses.sum(dtype=torch.float64)
    return (loss / count).float(), grad_q, grad_k
