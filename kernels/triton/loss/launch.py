"""The KL divergence that trains the index branch, fused with its closed-form gradient, key blocks in the outer loop.

For each query i and group, over the visible tokens j of its selected blocks, G heads to a group:

    P_j = mean over the heads of exp(scale <q, k_j> - lse)                       teacher
    L_j = index_scale <index_q, index_k_j> - index_lse,  exp(L_j)                student
    loss = sum_j P_j (log P_j - L_j) / count,   dS_j = exp(L_j) - P_j,   unit = index_scale / count
    grad_index_q = unit sum_j dS_j index_k_j,   grad_index_k_j = unit sum_i dS_ij index_q_i

count: the (batch, group, query) that see a key. Layouts: q [B, Hq, Sq, D], k [B, Hkv, Sk, D], index_q [B, Hkv, Sq, Di],
index_k [B, 1, Sk, Di], any strides; the gradients fp32, contiguous, of the shapes of index_q and index_k.

Tokens are worked through in chunks of one group (see `inverse_index`), each in up to five launches:

1. block_lse: a program owns a piece of one block's list, and writes each entry's logsumexp over the block;
2. index_lse: that of each token, over its slots (both in `loss_student`);
3. index_loss: a program owns a piece again, and makes its loss and gradients (`loss_gradient`);
4. sum_pieces: adds up grad_index_k of the blocks whose lists were cut into several pieces;
5. sum_slots: adds up grad_index_q of each token (both in `loss_sums`).

A block too large for the registers is cut into `parts` of `columns` keys, which are programs and partial results of
their own. Every sum has a fixed order, and no two programs write one address: results repeat bit by bit.

Cost for E entries (topk a token and group), block size n: 2 G D n E FLOPs for the teacher and 8 Di n E for the student,
4.4 + 1.1 TFLOP at 128K tokens of M3's shape, 7 ms at 783 TFLOP/s; the G n E exponentials take 5 ms more. Bytes, in
bf16: 2 G D E of q gathered, 34 GB, 8 ms if none of it stays in L2; 2 * 2 Di E of index_q gathered twice, and 2 * 4 Di E
of partial results written and read back, 13 GB, 3 ms. 15 to 20 ms are expected. Memory beside inputs and outputs: the
workspace, the reverse index, and a copy of lse.
"""

import torch
import triton

from ...tuning import tuned
from ...workspace import chunk_tokens
from ..common.primitives import LOG2_E
from ..common.target import padded, target_of
from ..schedule.inverse_index import InverseIndex, inverse_indexes
from ..schedule.work_items import cut_into_items
from .config import LossConfig, loss_config
from .gradient import index_loss_kernel, loss_constants
from .reduce import sum_pieces_kernel, sum_slots_kernel
from .student import block_lse_kernel, index_lse_kernel, lse_constants


def slot_bytes(config: LossConfig, parts: int, index_dim: int, with_grad: bool, index_groups: int) -> int:
    """Bytes that one slot of one token takes: partial results, and the reverse index of `index_groups` groups.

    At most two pieces for every `length` entries keep a grad_index_k; the index is taken with what sorting it takes.
    """
    partial = 4 * parts
    if with_grad:
        partial += 4 * parts * index_dim * (config.length + 2 * config.columns) // config.length
    return partial + 32 * index_groups


def run_chunks(
    index: InverseIndex,
    q: torch.Tensor,
    k: torch.Tensor,
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    lse_rows: torch.Tensor,
    unit: torch.Tensor,
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    block_size: int,
    scale: float,
    index_scale: float,
    with_grad: bool,
    config: LossConfig,
) -> torch.Tensor:
    """The loss of each piece of an index; fills grad_q for the tokens of the index, and adds to grad_k."""
    num_kv_heads, seqlen_q, index_dim = index_q.shape[1:]
    seqlen_k, topk, size = k.shape[2], index.topk, index.range_tokens
    parts = triton.cdiv(block_size, config.columns)
    pieces = cut_into_items(index, config.length)
    losses = lse_rows.new_zeros(index.num_ranges, pieces.num_items, parts)
    partial_lse = lse_rows.new_empty(size, topk, parts)
    index_lse = lse_rows.new_empty(size)
    partial_q = lse_rows.new_empty(size if with_grad else 0, topk, parts, index_dim)
    num_slots = min(pieces.num_items, 2 * (size * topk // config.length)) if with_grad else 0
    partial_k = lse_rows.new_empty(num_slots, parts, config.columns, index_dim)
    lists = (index.entries, index.offsets, pieces.table)
    shares = min(64, triton.next_power_of_2(topk * parts))
    rows = max(16, 1024 // shares)
    dims = {"INDEX_DIM": index_dim, "INDEX_DEPTH": padded(index_dim)}
    for chunk in range(index.num_ranges):
        tokens = (chunk, index.first_token, index.num_tokens, size)
        items = (*tokens, index.num_blocks, pieces.num_items, topk)
        entries = (*tokens, index.none, topk)
        block_lse_kernel[(pieces.num_items, parts)](
            index_q,
            index_k,
            *lists,
            partial_lse,
            *index_q.stride(),
            index_k.stride(0),
            *index_k.stride()[2:],
            seqlen_q,
            *items,
            index_scale * LOG2_E.value,
            **lse_constants(config, index_dim),
            num_warps=4,
            num_stages=config.num_stages,
        )
        index_lse_kernel[(triton.cdiv(size, rows),)](
            partial_lse, index.numbers, index_lse, *entries, PARTS=parts, ROWS=rows, SHARES=shares, num_warps=4
        )
        index_loss_kernel[(pieces.num_items, parts)](
            q,
            k,
            index_q,
            index_k,
            lse_rows,
            index_lse,
            *lists,
            unit,
            losses,
            partial_q,
            partial_k,
            grad_k,
            *q.stride(),
            *k.stride(),
            *index_q.stride(),
            index_k.stride(0),
            *index_k.stride()[2:],
            num_kv_heads,
            q.shape[1] // num_kv_heads,
            seqlen_q,
            seqlen_k,
            *items,
            scale * LOG2_E.value,
            index_scale * LOG2_E.value,
            **loss_constants(config, q.shape[3], index_dim, with_grad),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        if num_slots > 0:
            sum_pieces_kernel[(index.num_blocks, triton.cdiv(block_size, 16))](
                index.blocks,
                pieces.shares,
                partial_k,
                grad_k,
                seqlen_k,
                chunk,
                index.num_blocks,
                **dims,
                SIZE=parts * config.columns,
                ROWS=16,
                num_warps=4,
            )
        if with_grad:
            sum_slots_kernel[(triton.cdiv(size, 16),)](
                index.numbers,
                unit,
                partial_q,
                grad_q,
                num_kv_heads,
                seqlen_q,
                *entries,
                **dims,
                PARTS=parts,
                ROWS=16,
                num_warps=4,
            )
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
    batch, _, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k, index_dim = k.shape[1], k.shape[2], index_q.shape[3]
    topk = triton.cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    if q.numel() == 0 or topk == 0 or seqlen_k == 0:
        return loss.float(), grad_q, grad_k
    config = config or tuned(
        "loss",
        loss_config,
        target_of(q.device),
        head_dim=head_dim,
        index_head_dim=index_dim,
        block_size=block_size,
        element_size=q.element_size(),
    )
    _, q_start, q_end, k_start, k_end = sequences.unbind(1)
    count = ((k_end - k_start).minimum(q_end - q_start).clamp(min=0).sum() * num_kv_heads).clamp(min=1)
    unit = (index_scale / count).float()
    lse_rows = lse.transpose(1, 2).contiguous()
    parts = triton.cdiv(block_size, config.columns)
    index_groups = num_kv_heads if block_indices is None else 0
    size = chunk_tokens(batch * seqlen_q, topk * slot_bytes(config, parts, index_dim, with_grad, index_groups))
    for index in inverse_indexes(block_indices, sequences, q, k, block_size, size):
        losses = run_chunks(
            index,
            q,
            k,
            index_q,
            index_k,
            lse_rows,
            unit,
            grad_q,
            grad_k,
            block_size,
            scale,
            index_scale,
            with_grad,
            config,
        )
        loss += losses.sum(dtype=torch.float64)
    return (loss / count).float(), grad_q, grad_k
