"""The lists of a FlexAttention BlockMask from block_indices, in plain PyTorch on any device, without a host sync.

FlexAttention selects per block of rows, MSA per token. A row block is `tokens` neighbouring tokens times the G heads of
a group; it lists the union of its tokens' blocks, and mask_mod reads each token's own blocks from `membership`.
Memory grows with queries times blocks: for the membership table, and for the transposed lists, whose width BlockMask
requires to be the number of row blocks.
"""

import torch
from torch import Tensor

from .sequences import key_ranges


def valid_blocks(block_indices: Tensor, start: Tensor, end: Tensor, block_size: int) -> Tensor:
    """Return block_indices as int64, with -1 for ids that repeat, are negative, or name a block not yet visible."""
    ids = block_indices.long().sort(-1).values
    repeated = torch.cat([torch.zeros_like(ids[..., :1], dtype=torch.bool), ids[..., 1:] == ids[..., :-1]], -1)
    length = (end - start).long()[:, None, :, None]
    return ids.masked_fill(repeated | (ids < 0) | (ids * block_size >= length), -1)


def membership_table(ids: Tensor, num_blocks: int) -> Tensor:
    """Return [B, Hkv, Sq, num_blocks] bool: whether the query chose the block.

    One byte per entry, although a bit would do: extracting bits in mask_mod more than doubles its time.
    """
    table = torch.zeros((*ids.shape[:-1], num_blocks), dtype=torch.uint8, device=ids.device)
    return table.scatter_add_(-1, ids.clamp(min=0), (ids >= 0).to(torch.uint8)).view(torch.bool)


def _covered_blocks(ids: Tensor, start: Tensor, end: Tensor, block_size: int, mask_block: int, aligned: bool) -> Tensor:
    """Return [B, Hkv, Sq, n] int64: the blocks of the mask that hold keys of each chosen block, or -1."""
    first_key = start.long()[:, None, :, None] + ids * block_size
    last_key = torch.minimum(first_key + block_size, end.long()[:, None, :, None]) - 1
    first = first_key // mask_block
    longest = block_size - 1 if aligned and block_size % mask_block == 0 else block_size + mask_block - 2
    most = 1 if aligned and mask_block % block_size == 0 else longest // mask_block + 1
    covered = first[..., None] + torch.arange(most, device=ids.device)
    outside = (ids < 0)[..., None] | (covered * mask_block > last_key[..., None])
    return covered.masked_fill(outside, -1).flatten(-2)


def _listed_by_all(union: Tensor, tokens: int) -> Tensor:
    """Return for each entry of sorted unions [..., n] whether it begins a run of `tokens` equal entries.

    Each token lists a block once, so a block that begins such a run is listed by all tokens of the row block.
    """
    shared = torch.zeros_like(union, dtype=torch.bool)
    num_runs = union.shape[-1] - tokens + 1
    shared[..., :num_runs] = union[..., tokens - 1 :] == union[..., :num_runs]
    return shared


def _compress(values: Tensor, keep: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Move the kept values of each row to its left: return their count, and [..., width] int32 padded with 0."""
    position = (keep.cumsum(-1) - 1).masked_fill(~keep, width)
    rows = torch.zeros((*values.shape[:-1], width + 1), dtype=torch.int32, device=values.device)
    rows.scatter_(-1, position, values.int())
    return keep.sum(-1, dtype=torch.int32), rows[..., :width].contiguous()


def _transpose(count: Tensor, indices: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Return how many row blocks list each key block, and which: [B, Hkv, blocks], [B, Hkv, blocks, rows]."""
    batch, heads, rows, width = indices.shape
    listed = torch.arange(width, device=indices.device) < count[..., None]
    numbers = torch.arange(rows, device=indices.device).expand(num_blocks, rows)
    lists = []
    for present, ids in zip(listed.flatten(0, 1), indices.flatten(0, 1).long(), strict=True):
        table = torch.zeros((rows, num_blocks + 1), dtype=torch.bool, device=ids.device)
        table.scatter_(-1, ids.masked_fill(~present, num_blocks), True)
        lists.append(_compress(numbers, table[:, :num_blocks].t(), rows))
    counts, transposed = (torch.stack(part) for part in zip(*lists, strict=True))
    return counts.view(batch, heads, num_blocks), transposed.view(batch, heads, num_blocks, rows)


def block_mask_lists(
    block_indices: Tensor,
    sequences: Tensor,
    seqlen_k: int,
    block_size: int,
    mask_block: int,
    tokens: int,
    width: int,
    aligned: bool,
    with_backward: bool,
) -> list[Tensor]:
    """Return the lists of a BlockMask for rows packed as (token, head in group).

    Args:
        mask_block: keys per block of the mask (block_size, or a size that FlexAttention's kernels require).
        tokens: tokens per row block.
        width: width of the key lists.
        aligned: every sequence starts at key 0, so blocks of equal size coincide with those of the mask.
        with_backward: make the transposed lists too; otherwise they are empty.

    Returns:
        kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, the same four transposed, and the tensors for
        mask_mod: membership [B, Hkv, Sq, blocks], start [B, Sq], end [B, Sq].
    """
    batch, _, seqlen_q, _ = block_indices.shape
    num_blocks = -(-seqlen_k // mask_block)
    start, end = key_ranges(sequences, batch, seqlen_q)
    ids = valid_blocks(block_indices, start, end, block_size)
    covered = _covered_blocks(ids, start, end, block_size, mask_block, aligned)

    # Copies of the last token fill the last row block; they add nothing to its union.
    rows = -(-seqlen_q // tokens)
    token = torch.arange(rows * tokens, device=ids.device).clamp(max=seqlen_q - 1)
    union = covered[:, :, token].unflatten(2, (rows, tokens)).flatten(-2).sort(-1).values
    first = torch.cat([torch.ones_like(union[..., :1], dtype=torch.bool), union[..., 1:] != union[..., :-1]], -1)
    first &= union >= 0

    full = torch.zeros_like(first)
    if aligned and mask_block == block_size:
        earliest_end = end[:, token].unflatten(1, (rows, tokens)).amin(-1)
        seen_whole = (union + 1) * mask_block <= earliest_end[:, None, :, None]
        full = first & _listed_by_all(union, tokens) & seen_whole
    partial_lists = _compress(union, first & ~full, width)
    full_lists = _compress(union, full, width)

    if with_backward:
        transposed = [*_transpose(*partial_lists, num_blocks), *_transpose(*full_lists, num_blocks)]
    else:
        transposed = [ids.new_empty(0, dtype=torch.int32) for _ in range(4)]
    membership = membership_table(ids, -(-seqlen_k // block_size))
    return [*partial_lists, *full_lists, *transposed, membership, start, end]


def dense_mask_lists(
    sequences: Tensor, batch: int, seqlen_q: int, seqlen_k: int, mask_block: int, tokens: int, with_backward: bool
) -> list[Tensor]:
    """Return the lists of the BlockMask in which a token sees its whole sequence up to itself.

    As `block_mask_lists` with one head for all, but without the membership, which mask_mod does not need.
    """
    start, end = key_ranges(sequences, batch, seqlen_q)
    rows = -(-seqlen_q // tokens)
    token = torch.arange(rows * tokens, device=start.device).clamp(max=seqlen_q - 1)
    block = torch.arange(-(-seqlen_k // mask_block), device=start.device)
    first, last = (x[:, token].unflatten(1, (rows, tokens))[:, None, :, None] for x in (start, end))
    lower, upper = block * mask_block, (block + 1) * mask_block
    touched = (upper > first.amin(-1)) & (lower < last.amax(-1))
    full = (lower >= first.amax(-1)) & (upper <= last.amin(-1))
    numbers = block.expand(touched.shape)
    tables = [touched & ~full, full]
    lists = [part for table in tables for part in _compress(numbers, table, len(block))]
    if with_backward:
        numbers = torch.arange(rows, device=start.device).expand(batch, 1, len(block), rows)
        lists += [part for table in tables for part in _compress(numbers, table.transpose(2, 3), rows)]
    else:
        lists += [start.new_empty(0) for _ in range(4)]
    return [*lists, start, end]
