"""The reverse index on the device: for each KV block the (query, slot) pairs that chose it, in a fixed order.

An *entry* is one (group, token, slot) of block_indices, a token being a query of the flattened batch, b * Sq + i.
The tokens are worked through in *chunks*, so that what the kernels keep for each entry is bounded. A *list* is the
entries of one (group, chunk, block), and its number is

    (group * num_chunks + chunk) * num_blocks + block

where block counts through the blocks of all sequences. Entries are sorted by list, then token, with a stable sort, so
the order is always the same. A slot that holds no block, an id seen before in its row, or a block that the query does
not see, belongs to no list. Lists are cut into *pieces* of bounded length, one program each, so that a block that every
query chose is shared by many programs. Nothing is read back to the host: launches are sized by upper bounds, and
programs beyond the last piece return at once.

Bytes for E entries: 4 E written for the numbers, about 4 * 12 * 2 E by the radix sort, 8 E read back by each kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..sequences import query_sequences


@triton.jit
def list_numbers_kernel(
    ids_ptr,
    sees_ptr,
    first_block_ptr,
    skip_ptr,
    numbers_ptr,
    stride_ib,
    stride_ih,
    stride_is,
    stride_ik,
    seqlen_q,
    first_token,
    num_tokens,
    chunk_tokens,
    num_blocks,
    topk,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """numbers[group, token, slot] = the entry's list, or the number of lists if it belongs to none.

    Program (i, group) owns ROWS tokens. sees[token] counts the keys the token sees, first_block[token] the blocks of
    the sequences before its own, skip[group, token] leaves the token out.
    """
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_tokens
    token = first_token + row
    sees = tl.load(sees_ptr + token, mask=live, other=0)
    first_block = tl.load(first_block_ptr + token, mask=live, other=0)
    if SKIP:
        skipped = tl.load(skip_ptr + group.to(tl.int64) * num_tokens + row, mask=live, other=1)
        sees = tl.where(skipped != 0, 0, sees)
    batch = (token // seqlen_q).to(tl.int64)
    query = (token % seqlen_q).to(tl.int64)
    ids_row = ids_ptr + batch * stride_ib + group.to(tl.int64) * stride_ih + query * stride_is
    num_chunks = tl.cdiv(num_tokens, chunk_tokens)
    first_list = (group * num_chunks + row // chunk_tokens) * num_blocks + first_block
    for first_slot in range(0, topk, SLOTS):
        slot = first_slot + tl.arange(0, SLOTS)
        inside = live[:, None] & (slot < topk)[None, :]
        if DENSE:
            ids = tl.broadcast_to(slot[None, :], [ROWS, SLOTS])
            repeated = ids < 0
        else:
            ids = tl.load(ids_row[:, None] + slot[None, :].to(tl.int64) * stride_ik, mask=inside, other=-1).to(tl.int64)
            repeated = ids < 0
            for earlier in range(0, tl.minimum(first_slot + SLOTS, topk) - 1):
                other = tl.load(ids_row + tl.cast(earlier, tl.int64) * stride_ik, mask=live, other=-1).to(tl.int64)
                repeated |= (ids == other[:, None]) & (slot > earlier)[None, :]
        # Compared in 64 bits: an id of any size is out of range, never wrapped into it.
        seen = ids.to(tl.int64) * BLOCK < sees[:, None]
        number = tl.where(
            seen & ~repeated, first_list[:, None] + ids.to(tl.int32), num_groups * num_chunks * num_blocks
        )
        place = (group.to(tl.int64) * num_tokens + row)[:, None] * topk + slot[None, :]
        tl.store(numbers_ptr + place, number, mask=inside)


@triton.jit
def load_piece(offsets_ptr, ends_ptr, items_ptr, chunk, num_blocks, num_items, LENGTH: tl.constexpr):
    """(block, first entry, last entry + 1) of program 0's item; block is num_blocks past the last.

    `chunk` is group * num_chunks + chunk. The pieces of one list are neighbouring items.
    """
    item = tl.program_id(0)
    chunk = tl.cast(chunk, tl.int64)
    block = tl.load(items_ptr + chunk * num_items + item)
    live = block < num_blocks
    place = chunk * num_blocks + block
    before = tl.load(ends_ptr + place - 1, mask=live & (block > 0), other=0)
    begin = tl.load(offsets_ptr + place, mask=live, other=0)
    stop = tl.load(offsets_ptr + place + 1, mask=live, other=0)
    begin += (item - before).to(tl.int64) * LENGTH
    return block, begin, tl.minimum(begin + LENGTH, stop)


@triton.jit
def load_block(blocks_ptr, block):
    """(batch as int64, first key, last key + 1, shift) of a block: query i sees its keys j <= i + shift."""
    row = blocks_ptr + tl.cast(block, tl.int64) * 4
    return tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)


@triton.jit
def chunk_origin(chunk, first_token, num_tokens, chunk_tokens, TOPK):
    """(the chunk's group, its first entry before sorting, its first token), all int64."""
    num_chunks = tl.cdiv(num_tokens, chunk_tokens)
    group = tl.cast(chunk // num_chunks, tl.int64)
    token = tl.cast(chunk % num_chunks, tl.int64) * chunk_tokens
    return group, (group * num_tokens + token) * TOPK, first_token + token


@dataclass(frozen=True)
class Pieces:
    """ends [groups * chunks, num_blocks]: running count of pieces; items [groups * chunks, max]: the block of each."""

    length: int
    ends: torch.Tensor
    items: torch.Tensor

    @property
    def num_items(self) -> int:
        return self.items.shape[1]

    def slots(self) -> torch.Tensor:
        """[groups * chunks, max] int32: a number for each piece of a list of several, -1 for a list's only piece.

        They count through a chunk, so that they can name the places of a workspace.
        """
        counts = torch.nn.functional.pad(self.ends, (1, 0)).diff(dim=1)
        several = torch.nn.functional.pad(counts, (0, 1)).gather(1, self.items.long()) > 1
        return torch.where(several, several.cumsum(1) - 1, -1).int()


@dataclass(frozen=True)
class ReverseIndex:
    """Made by `reverse_index`.

    blocks: [num_blocks, 4] int32, (batch, first key, last key + 1, shift) of each block, see `load_block`.
    numbers: [groups, num_tokens, topk] int32, the list of each entry, num_lists for none.
    entries: [groups * num_tokens * topk] int64, entries in the order of their lists.
    offsets: [num_lists + 1] int64, where each list begins in `entries`.
    """

    blocks: torch.Tensor
    numbers: torch.Tensor
    entries: torch.Tensor
    offsets: torch.Tensor
    first_token: int
    chunk_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.numbers.shape[1]

    @property
    def topk(self) -> int:
        return self.numbers.shape[2]

    @property
    def num_blocks(self) -> int:
        return self.blocks.shape[0]

    @property
    def num_chunks(self) -> int:
        """Chunks of tokens of all groups: kernels run once for each."""
        return self.numbers.shape[0] * triton.cdiv(self.num_tokens, self.chunk_tokens)

    def pieces(self, length: int) -> Pieces:
        """Cut every list into pieces of at most `length` entries."""
        counts = (self.offsets[1:] - self.offsets[:-1]).view(self.num_chunks, self.num_blocks)
        ends = ((counts + (length - 1)) // length).cumsum(1, dtype=torch.int32)
        limit = self.num_blocks + self.chunk_tokens * self.topk // length
        item = torch.arange(limit, dtype=torch.int32, device=ends.device).expand(self.num_chunks, limit).contiguous()
        return Pieces(length, ends, torch.searchsorted(ends, item, right=True, out_int32=True))


def block_table(
    sequences: torch.Tensor, batch: int, seqlen_k: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows of `ReverseIndex.blocks`, and [N] int32, how many of them come before each sequence's own.

    There is room for as many blocks as the shapes allow; no list names the rows that are left over.
    """
    num_sequences = sequences.shape[0]
    row, _, q_end, k_start, k_end = sequences.unbind(1)
    counts = (k_end - k_start).clamp(min=0).add_(block_size - 1).div_(block_size, rounding_mode="floor")
    ends = counts.cumsum(0, dtype=torch.int32)
    before = ends - counts
    limit = batch * triton.cdiv(seqlen_k, block_size) + (num_sequences if num_sequences != batch else 0)
    block = torch.arange(limit, dtype=torch.int32, device=sequences.device)
    owner = torch.searchsorted(ends, block, right=True).clamp_(max=num_sequences - 1)
    first_key = k_start[owner] + (block - before[owner]) * block_size
    stop_key = torch.minimum(first_key + block_size, k_end[owner])
    return torch.stack([row[owner], first_key, stop_key, (k_end - q_end)[owner]], 1), before


def reverse_index(
    block_indices: torch.Tensor | None,
    sequences: torch.Tensor,
    *,
    batch: int,
    num_kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    block_size: int,
    chunk_tokens: int,
    tokens: range | None = None,
    skip: torch.Tensor | None = None,
) -> ReverseIndex:
    """The reverse index of block_indices [B, Hkv, Sq, topk], or of every visible block if None.

    `tokens` are those to index, all by default; `skip` [Hkv, len(tokens)] int8 leaves out those where it is not 0.
    """
    tokens = tokens or range(batch * seqlen_q)
    blocks, before = block_table(sequences, batch, seqlen_k, block_size)
    owner = query_sequences(sequences, batch, seqlen_q)
    _, _, q_end, k_start, k_end = sequences[owner].unbind(1)
    query = torch.arange(seqlen_q, device=sequences.device, dtype=torch.int32).repeat(batch)
    sees = k_end - q_end + query + 1 - k_start
    topk = triton.cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    numbers = sequences.new_empty(num_kv_heads, len(tokens), topk)
    ids = numbers if block_indices is None else block_indices
    slots = min(64, triton.next_power_of_2(max(topk, 1)))
    rows = max(16, 2048 // slots)
    if numbers.numel() > 0:
        list_numbers_kernel[(triton.cdiv(len(tokens), rows), num_kv_heads)](
            ids,
            sees,
            before[owner],
            numbers if skip is None else skip,
            numbers,
            *(ids.stride() if block_indices is not None else (0, 0, 0, 0)),
            seqlen_q,
            tokens.start,
            len(tokens),
            chunk_tokens,
            blocks.shape[0],
            topk,
            BLOCK=block_size,
            DENSE=block_indices is None,
            SKIP=skip is not None,
            ROWS=rows,
            SLOTS=slots,
            num_warps=4,
        )
    num_lists = num_kv_heads * triton.cdiv(len(tokens), chunk_tokens) * blocks.shape[0]
    ordered, entries = numbers.flatten().sort(stable=True)
    number = torch.arange(num_lists + 1, dtype=torch.int32, device=sequences.device)
    return ReverseIndex(
        blocks,
        numbers,
        entries,
        torch.searchsorted(ordered, number),
        tokens.start,
        min(chunk_tokens, max(1, len(tokens))),
    )


def chunked_indexes(
    block_indices: torch.Tensor | None,
    sequences: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int,
    size: int,
) -> Iterator[ReverseIndex]:
    """The reverse index of all tokens of q [B, Hq, Sq, D] over k [B, Hkv, Sk, D], in chunks of `size` tokens.

    Where block_indices is None, and so every visible block an entry, an index of one chunk after the other, so that
    memory stays bounded by the chunk.
    """
    num_tokens = q.shape[0] * q.shape[2]
    reach = size if block_indices is None else num_tokens
    for start in range(0, num_tokens, reach):
        yield reverse_index(
            block_indices,
            sequences,
            batch=q.shape[0],
            num_kv_heads=k.shape[1],
            seqlen_q=q.shape[2],
            seqlen_k=k.shape[2],
            block_size=block_size,
            chunk_tokens=size,
            tokens=range(start, min(start + reach, num_tokens)),
        )
