"""The reverse index on the device: for each KV block the (query, slot) pairs that chose it, in a fixed order.

An *entry* is one (group, token, slot) of block_indices, a token being a query of the flattened batch, b * Sq + i.
The tokens are worked through in *chunks*, so that what the kernels keep for each entry is bounded. A *list* is the
entries of one (group, chunk, block), and its number is

    lowest + (group * num_chunks + chunk) * num_blocks + block

where block counts through the blocks of all sequences. Entries are sorted by list, then token, with a stable sort, so
the order is always the same. A slot that holds no block, an id seen before in its row, or a block that the query does
not see, belongs to no list. Nothing is read back to the host. `pieces` then shares the lists out among programs.

Bytes for E entries: 2 E written for the numbers of up to 65,534 lists, about 2 * 10 * 2 E by the radix sort (4 E and
4 * 12 * 2 E for more lists), 8 E read back by each kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common.primitives import load_sequence


@triton.jit(do_not_specialize=["num_sequences", "num_blocks"])
def block_table_kernel(
    sequences_ptr,
    blocks_ptr,
    before_ptr,
    num_sequences,
    num_blocks,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
):
    """ROWS rows of `ReverseIndex.blocks`; before[n], how many rows come before those of sequence n, by program 0.

    Rows past the last sequence's are of no keys.
    """
    block = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    batch = tl.zeros([ROWS], tl.int32)
    first_key, stop_key, shift = batch, batch, batch
    total = num_sequences * 0
    for start in range(0, num_sequences, SEQUENCES):
        n = start + tl.arange(0, SEQUENCES)
        live = n < num_sequences
        row = sequences_ptr + n.to(tl.int64) * 5
        q_end = tl.load(row + 2, mask=live, other=0)
        k_start = tl.load(row + 3, mask=live, other=0)
        k_end = tl.load(row + 4, mask=live, other=0)
        counts = tl.cdiv(tl.maximum(k_end - k_start, 0), BLOCK)
        before = total + tl.cumsum(counts, axis=0) - counts
        if tl.program_id(0) == 0:
            tl.store(before_ptr + n, before, mask=live)
        # At most one sequence owns a row.
        owned = (block >= before[None, :]) & (block < (before + counts)[None, :])
        key = k_start[None, :] + (block - before[None, :]) * BLOCK
        batch += tl.sum(tl.where(owned, tl.load(row, mask=live, other=0)[None, :], 0), axis=1)
        first_key += tl.sum(tl.where(owned, key, 0), axis=1)
        stop_key += tl.sum(tl.where(owned, tl.minimum(key + BLOCK, k_end[None, :]), 0), axis=1)
        shift += tl.sum(tl.where(owned, (k_end - q_end)[None, :], 0), axis=1)
        total += tl.sum(counts, axis=0)
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = blocks_ptr + number.to(tl.int64) * 4
    tl.store(place, batch, mask=number < num_blocks)
    tl.store(place + 1, first_key, mask=number < num_blocks)
    tl.store(place + 2, stop_key, mask=number < num_blocks)
    tl.store(place + 3, shift, mask=number < num_blocks)


@triton.jit
def find_sequences(sequences_ptr, token, num_sequences, seqlen_q):
    """[ROWS] int32: the sequence of each token of the flattened batch, found by bisection."""
    low, high = token * 0, token * 0 + num_sequences
    size = num_sequences
    while size > 1:
        middle = (low + high) // 2
        row = sequences_ptr + middle.to(tl.int64) * 5
        # A sequence of no queries starts where the next one does, which is then found.
        below = tl.load(row).to(tl.int64) * seqlen_q + tl.load(row + 1) <= token
        low, high = tl.where(below, middle, low), tl.where(below, high, middle)
        size = tl.cdiv(size, 2)
    return low


@triton.jit(do_not_specialize=["num_sequences", "first_token", "num_tokens", "chunk_tokens", "num_blocks", "lowest"])
def list_numbers_kernel(
    ids_ptr,
    sequences_ptr,
    before_ptr,
    skip_ptr,
    numbers_ptr,
    stride_ib,
    stride_ih,
    stride_is,
    stride_ik,
    num_sequences,
    seqlen_q,
    first_token,
    num_tokens,
    chunk_tokens,
    num_blocks,
    lowest,
    topk,
    BLOCK: tl.constexpr,
    DENSE: tl.constexpr,
    SKIP: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """numbers[group, token, slot] = the entry's list, or the number past the last list if it belongs to none.

    Program (i, group) owns ROWS tokens. skip[group, token] leaves the token out.
    """
    group, num_groups = tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_tokens
    token = tl.where(live, first_token + row, 0)
    sequence = find_sequences(sequences_ptr, token, num_sequences, seqlen_q)
    batch, _, q_end, k_start, k_end = load_sequence(sequences_ptr, sequence)
    query = token % seqlen_q
    sees = tl.where(live, k_end - q_end + query + 1 - k_start, 0)
    if SKIP:
        skipped = tl.load(skip_ptr + group.to(tl.int64) * num_tokens + row, mask=live, other=1)
        sees = tl.where(skipped != 0, 0, sees)
    ids_row = ids_ptr + batch * stride_ib + group.to(tl.int64) * stride_ih + query.to(tl.int64) * stride_is
    num_chunks = tl.cdiv(num_tokens, chunk_tokens)
    none = lowest + num_groups * num_chunks * num_blocks
    first_list = lowest + (group * num_chunks + row // chunk_tokens) * num_blocks
    first_list += tl.load(before_ptr + sequence)
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
        number = tl.where(seen & ~repeated, first_list[:, None] + ids.to(tl.int32), none)
        place = (group.to(tl.int64) * num_tokens + row)[:, None] * topk + slot[None, :]
        tl.store(numbers_ptr + place, number.to(numbers_ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_block(blocks_ptr, block):
    """(batch as int64, first key, last key + 1) of a block."""
    row = blocks_ptr + tl.cast(block, tl.int64) * 4
    return tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def chunk_origin(chunk, first_token, num_tokens, chunk_tokens, TOPK):
    """(group, first entry before sorting, first token) of chunk `group * num_chunks + chunk`, all int64."""
    num_chunks = tl.cdiv(num_tokens, chunk_tokens)
    group = tl.cast(chunk // num_chunks, tl.int64)
    token = tl.cast(chunk % num_chunks, tl.int64) * chunk_tokens
    return group, (group * num_tokens + token) * TOPK, first_token + token


@dataclass(frozen=True)
class ReverseIndex:
    """Made by `reverse_index`.

    blocks: [num_blocks, 4] int32, (batch, first key, last key + 1, shift) of each block: query i of the sequence sees
    its keys j <= i + shift. There is room for as many blocks as the shapes allow; no list names those left over.
    numbers: [groups, num_tokens, topk] int16 or int32, the list of each entry, `none` for none.
    entries: [groups * num_tokens * topk] int64, entries in the order of their lists.
    offsets: [num_lists + 1] int64, where each list begins in `entries`.
    """

    blocks: torch.Tensor
    numbers: torch.Tensor
    entries: torch.Tensor
    offsets: torch.Tensor
    lowest: int
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

    @property
    def none(self) -> int:
        return self.lowest + self.num_chunks * self.num_blocks


def block_table(
    sequences: torch.Tensor, batch: int, seqlen_k: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ReverseIndex.blocks`, and [N] int32, how many of its rows come before each sequence's own."""
    num_sequences = sequences.shape[0]
    limit = batch * triton.cdiv(seqlen_k, block_size) + (num_sequences if num_sequences != batch else 0)
    blocks, before = sequences.new_empty(limit, 4), sequences.new_empty(num_sequences)
    block_table_kernel[(triton.cdiv(limit, 64),)](
        sequences, blocks, before, num_sequences, limit, BLOCK=block_size, ROWS=64, SEQUENCES=64, num_warps=4
    )
    return blocks, before


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
    topk = triton.cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    num_lists = num_kv_heads * triton.cdiv(len(tokens), chunk_tokens) * blocks.shape[0]
    # Numbers of 16 bits are sorted in half the time, and have a sign.
    dtype, lowest = (torch.int16, -(2**15)) if num_lists < 2**16 - 1 else (torch.int32, 0)
    numbers = sequences.new_empty(num_kv_heads, len(tokens), topk, dtype=dtype)
    ids = numbers if block_indices is None else block_indices
    slots = min(64, triton.next_power_of_2(max(topk, 1)))
    rows = max(16, 2048 // slots)
    if numbers.numel() > 0:
        list_numbers_kernel[(triton.cdiv(len(tokens), rows), num_kv_heads)](
            ids,
            sequences,
            before,
            numbers if skip is None else skip,
            numbers,
            *(ids.stride() if block_indices is not None else (0, 0, 0, 0)),
            sequences.shape[0],
            seqlen_q,
            tokens.start,
            len(tokens),
            chunk_tokens,
            blocks.shape[0],
            lowest,
            topk,
            BLOCK=block_size,
            DENSE=block_indices is None,
            SKIP=skip is not None,
            ROWS=rows,
            SLOTS=slots,
            num_warps=4,
        )
    ordered, entries = numbers.flatten().sort(stable=True)
    number = torch.arange(lowest, lowest + num_lists + 1, dtype=dtype, device=sequences.device)
    return ReverseIndex(
        blocks,
        numbers,
        entries,
        torch.searchsorted(ordered, number),
        lowest,
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
