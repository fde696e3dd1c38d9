"""Makes an inverse index: numbers the entries by their lists, then sorts them, in one of two ways.

Few entries of few blocks are sorted by counting, in four launches. A *chunk* is SIZE neighbouring entries of a token
range. `count_entries_kernel` counts a chunk's entries of each block, and numbers them by comparing all pairs;
`offsets_kernel` adds up the counts of the chunks before; `place_entries_kernel` then knows each entry's place. The
counts are a number per chunk and block: of many blocks they would take more memory than the entries. All others are
sorted by torch's radix sort, in more than ten launches, which then take less time than these kernels.

Bytes for E entries: 4 E written for the numbers, and 8 E read back by each kernel. By counting: at most 8 E of counts,
written and read, 2 E of ranks; by radix: 2 E in 16 bits, which suffice for up to 65,534 lists, and about 2 * 10 * 2 E
by the sort (4 * 12 * 2 E for more lists).
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..common.launch import Launch, Options, is_ahead, view
from ..common.sizes import cdiv
from .inverse_index import InverseIndex, block_table, find_token_range, list_numbers_kernel

# Entries of a chunk, and how many each of them is compared with at a time.
SIZE, COMPARED = tl.constexpr(256), tl.constexpr(32)
# Of more entries the radix sort takes less time on an H200, though it takes more launches.
MOST_COUNTED = 2**19


@triton.jit
def count_entries_kernel(index, ranks_ptr, counts_ptr):
    """Program (chunk, token range): ranks[entry], how many entries of the chunk precede it in its list, and counts.

    counts [num_ranges, chunks, num_blocks] int32: the chunk's entries of each list; they are 0 before.
    """
    chunk, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = find_token_range(index, number, index.topk)
    place = tl.arange(0, SIZE)
    live = chunk * SIZE + place < tokens.num_tokens * index.topk
    first_entry = tokens.first_entry + chunk * SIZE
    listed = tl.load(index.numbers + first_entry + place, mask=live, other=index.none)
    used = listed < index.none
    rank = tl.zeros([SIZE], tl.int32)
    for start in range(0, SIZE, COMPARED):
        earlier = start + tl.arange(0, COMPARED)
        inside = chunk * SIZE + earlier < tokens.num_tokens * index.topk
        other = tl.load(index.numbers + first_entry + earlier, mask=inside, other=index.none)
        precedes = (listed[:, None] == other[None, :]) & (place[:, None] > earlier[None, :])
        rank += tl.sum(precedes.to(tl.int32), axis=1)
    tl.store(ranks_ptr + first_entry + place, rank.to(tl.int16), mask=used)
    row = counts_ptr + (number * tl.num_programs(0) + chunk) * index.num_blocks
    # A sum of integers is the same in any order.
    tl.atomic_add(row + (listed - number * index.num_blocks), 1, mask=used, sem="relaxed")


@triton.jit
def offsets_kernel(index, counts_ptr, num_chunks, chunks: tl.constexpr, blocks: tl.constexpr):
    """Program r: `InverseIndex.offsets` of token range r; counts become those of the chunks before."""
    number = tl.program_id(0).to(tl.int64)
    begin = find_token_range(index, number, index.topk).first_entry
    offsets_ptr = index.offsets + number * (index.num_blocks + 1)
    counts_ptr += number * num_chunks * index.num_blocks
    for first_block in range(0, index.num_blocks, blocks):
        block = first_block + tl.arange(0, blocks)
        total = tl.zeros([blocks], tl.int32)
        for first_chunk in range(0, num_chunks, chunks):
            chunk = first_chunk + tl.arange(0, chunks)
            inside = (chunk < num_chunks)[:, None] & (block < index.num_blocks)[None, :]
            place = counts_ptr + chunk.to(tl.int64)[:, None] * index.num_blocks + block[None, :]
            count = tl.load(place, mask=inside, other=0)
            tl.store(place, total[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
            total += tl.sum(count, axis=0)
        stop = begin + tl.cumsum(total, axis=0)
        tl.store(offsets_ptr + block, stop - total, mask=block < index.num_blocks)
        begin += tl.sum(total, axis=0)
    tl.store(offsets_ptr + index.num_blocks, begin)


@triton.jit
def place_entries_kernel(index, ranks_ptr, counts_ptr):
    """`InverseIndex.entries` of one chunk: program (chunk, token range), as in `count_entries_kernel`."""
    chunk, number = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = find_token_range(index, number, index.topk)
    local = chunk * SIZE + tl.arange(0, SIZE)
    live = local < tokens.num_tokens * index.topk
    entry = tokens.first_entry + local
    listed = tl.load(index.numbers + entry, mask=live, other=index.none)
    used = listed < index.none
    block = listed - number * index.num_blocks
    offset = tl.load(index.offsets + number * (index.num_blocks + 1) + block, mask=used, other=0)
    before = counts_ptr + (number * tl.num_programs(0) + chunk) * index.num_blocks
    place = offset + tl.load(before + block, mask=used, other=0) + tl.load(ranks_ptr + entry, mask=used, other=0)
    tl.store(index.entries + place, entry, mask=used)


def sort_by_counting(index: InverseIndex, ranks: torch.Tensor) -> None:
    """Fill entries and offsets by counting; ranks: room for a number of 16 bits per entry."""
    num_ranges, num_chunks = index.num_ranges, chunks_per_range(index)
    counts = index.blocks.new_zeros(num_ranges, num_chunks, index.num_blocks)
    chunks = {"index": index, "ranks_ptr": ranks, "counts_ptr": counts}
    Launch(count_entries_kernel, (num_chunks, num_ranges, 1), chunks, {}).run()
    arguments = {"index": index, "counts_ptr": counts, "num_chunks": num_chunks}
    Launch(offsets_kernel, (num_ranges, 1, 1), arguments, {"chunks": 128, "blocks": 64}, Options(8)).run()
    Launch(place_entries_kernel, (num_chunks, num_ranges, 1), chunks, {}).run()


def sort_by_radix(index: InverseIndex, short_numbers: torch.Tensor) -> None:
    """Fill entries and offsets by torch's sort; short_numbers: the lists of the entries, as `list_numbers_kernel` left
    them.
    """
    # Numbers of 16 bits, which have a sign, are sorted in half the time.
    first, keys = (-(2**15), short_numbers) if index.none < 2**16 - 1 else (0, index.numbers.flatten())
    ordered, _ = torch.sort(keys, stable=True, out=(torch.empty_like(keys), index.entries))
    lists = torch.arange(first, first + index.none + 1, dtype=keys.dtype, device=keys.device)
    # Where a range ends, the next one begins.
    lists = lists.as_strided(index.offsets.shape, (index.num_blocks, 1)).contiguous()
    torch.searchsorted(ordered, lists, out=index.offsets)


def chunks_per_range(index: InverseIndex) -> int:
    """Chunks of a token range."""
    return cdiv(index.range_tokens * index.topk, SIZE.value)


def inverse_index(
    block_indices: torch.Tensor | None,
    sequences: torch.Tensor,
    *,
    batch: int,
    num_kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    block_size: int,
    range_tokens: int,
    tokens: range | None = None,
    skip: torch.Tensor | None = None,
) -> InverseIndex:
    """The inverse index of block_indices [B, Hkv, Sq, topk], or of every visible block if None.

    `tokens` are those to index, all by default; `skip` [Hkv, len(tokens)] int8 leaves out those where it is not 0.
    """
    tokens = tokens or range(batch * seqlen_q)
    blocks, before = block_table(sequences, batch, seqlen_k, block_size)
    topk = cdiv(seqlen_k, block_size) if block_indices is None else block_indices.shape[3]
    num_ranges = num_kv_heads * cdiv(len(tokens), range_tokens)
    numbers = sequences.new_empty(num_kv_heads, len(tokens), topk)
    entries = sequences.new_empty(numbers.numel(), dtype=torch.int64)
    offsets = sequences.new_empty((num_ranges, blocks.shape[0] + 1), dtype=torch.int64)
    shorts = sequences.new_empty(numbers.numel(), dtype=torch.int16)
    sizes = blocks.shape[0], tokens.start, len(tokens), min(range_tokens, max(1, len(tokens))), topk
    index = InverseIndex(blocks, numbers, entries, offsets, *sizes, none=num_ranges * blocks.shape[0])
    if numbers.numel() == 0:
        offsets.zero_()
        return index
    # Every visible block is a number that grows with the length, and is not to be compiled for.
    slots = 64 if block_indices is None else min(64, triton.next_power_of_2(topk))
    Launch(
        list_numbers_kernel,
        (cdiv(len(tokens) * slots, 2048), num_kv_heads, 1),
        {
            "ids": None if block_indices is None else view(block_indices),
            "index": index,
            "sequences_ptr": sequences,
            "before_ptr": before,
            "skip_ptr": skip,
            "short_ptr": shorts,
            "num_sequences": sequences.shape[0],
            "seqlen_q": seqlen_q,
        },
        {"block_size": block_size, "slots": slots},
    ).run()
    counts = num_ranges * chunks_per_range(index) * index.num_blocks
    by_counting = numbers.numel() <= MOST_COUNTED and counts <= 2 * numbers.numel()
    if by_counting or is_ahead():
        sort_by_counting(index, shorts)
    if not by_counting:
        sort_by_radix(index, shorts)
    return index


def inverse_indexes(
    block_indices: torch.Tensor | None,
    sequences: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int,
    range_tokens: int,
) -> Iterator[InverseIndex]:
    """The inverse index of all tokens of q [B, Hq, Sq, D] over k [B, Hkv, Sk, D], in ranges of `range_tokens` tokens.

    Where block_indices is None, every visible block is an entry: then the index of one token range after the other, so
    that memory stays bounded by the range.
    """
    num_tokens = q.shape[0] * q.shape[2]
    reach = range_tokens if block_indices is None else num_tokens
    for start in range(0, num_tokens, reach):
        yield inverse_index(
            block_indices,
            sequences,
            batch=q.shape[0],
            num_kv_heads=k.shape[1],
            seqlen_q=q.shape[2],
            seqlen_k=k.shape[2],
            block_size=block_size,
            range_tokens=range_tokens,
            tokens=range(start, min(start + reach, num_tokens)),
        )
