"""Named pieces that the kernels of this folder are built of: sequences, blocks and pages, tiles, the softmax."""

import torch
import triton
import triton.language as tl

FLT_MAX = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def await_previous(OVERLAP: tl.constexpr):
    """Wait for the kernel before this one, beside whose end it was launched: before anything is read or written."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def announce_next(OVERLAP: tl.constexpr):
    """Have the kernel after this one launched now, to wait; where it would not be in the way of this one's programs."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_sequence(sequences_ptr, sequence):
    """One row of the table of sequences: (batch as int64, q_start, q_end, k_start, k_end)."""
    row = sequences_ptr + sequence.to(tl.int64) * 5
    return tl.load(row).to(tl.int64), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)


@triton.jit
def locate_block(page_table_ptr, max_pages, batch, k_start, block, num_pages, BLOCK: tl.constexpr, PAGED: tl.constexpr):
    """Where block `block` of a sequence lies in a cache: (index of the first dimension as int64, first key).

    PAGED: in the page that page_table [B, max_pages] names, all of it; an id that names no page is pulled into range.
    `block` may be a tensor. Blocks that the sequence has not are not to be asked for.
    """
    if PAGED:
        page = tl.load(page_table_ptr + batch * max_pages + block)
        return tl.minimum(tl.maximum(page, 0), num_pages - 1).to(tl.int64), block * 0
    else:
        return batch, k_start + block * BLOCK


@triton.jit
def find_tile(tile, tile_ends_ptr, num_sequences, seqlen_q, TOKENS: tl.constexpr, TABLE: tl.constexpr):
    """(sequence, tile within it) of the program's number, the tiles with the most keys coming first.

    TABLE: `tile_ends` holds the running count of tiles, searched by bisection; a number past its end gives a
    sequence past the table's. Otherwise every sequence has cdiv(seqlen_q, TOKENS) tiles.
    """
    if TABLE:
        total = tl.load(tile_ends_ptr + num_sequences - 1)
        tile = total - 1 - tile
        low = tile * 0
        high = low + num_sequences
        while low < high:
            middle = (low + high) // 2
            below = tl.load(tile_ends_ptr + middle) <= tile
            low = tl.where(below, middle + 1, low)
            high = tl.where(below, high, middle)
        before = tl.load(tile_ends_ptr + low - 1, mask=(low > 0) & (low < num_sequences), other=0)
        return tl.where(tile < 0, num_sequences, low), tile - before
    else:
        return tile % num_sequences, tl.cdiv(seqlen_q, TOKENS) - 1 - tile // num_sequences


@triton.jit
def tile_ends_kernel(sequences_ptr, tile_ends_ptr, num_sequences, TOKENS: tl.constexpr, CHUNK: tl.constexpr):
    """tile_ends[n] = sum over m <= n of cdiv(queries of sequence m, TOKENS). One program does all."""
    total = num_sequences * 0
    for start in range(0, num_sequences, CHUNK):
        n = start + tl.arange(0, CHUNK)
        row = sequences_ptr + n.to(tl.int64) * 5
        q_start = tl.load(row + 1, mask=n < num_sequences, other=0)
        q_end = tl.load(row + 2, mask=n < num_sequences, other=0)
        tiles = tl.cdiv(tl.maximum(q_end - q_start, 0), TOKENS)
        tl.store(tile_ends_ptr + n, total + tl.cumsum(tiles, axis=0), mask=n < num_sequences)
        total += tl.sum(tiles, axis=0)


def page_arguments(
    page_table: torch.Tensor | None, sequences: torch.Tensor, cache: torch.Tensor
) -> tuple[torch.Tensor, int, int]:
    """(page_table, max_pages, num_pages) as `locate_block` takes them; without pages, a table that is not read."""
    return (sequences, 0, 0) if page_table is None else (page_table, page_table.shape[1], cache.shape[0])


def key_limit(page_table: torch.Tensor | None, cache: torch.Tensor) -> int:
    """Keys that a row of a cache [.., .., capacity or block_size, D] has room for."""
    return cache.shape[2] * (1 if page_table is None else page_table.shape[1])


def tma_ready(x: torch.Tensor) -> bool:
    """Whether the bulk copy engine can read x [..., D]: 16-byte alignment throughout, dense last dimension."""
    strides = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in strides)
    return x.numel() > 0 and x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and aligned


def tile_ends(sequences: torch.Tensor, batch: int, seqlen_q: int, tokens: int) -> tuple[torch.Tensor, int, bool]:
    """The table that `find_tile` searches, the number of tiles to launch, and whether the table is needed.

    Without packing, or when no sequence is longer than a tile, every sequence has the same number of tiles. Where a row
    has two sequences, new tokens and none, half the programs return at once, for less than a launch costs.
    """
    num_sequences = sequences.shape[0]
    per_row = triton.cdiv(seqlen_q, tokens)
    if num_sequences <= 2 * batch or per_row == 1:
        return sequences, num_sequences * per_row, False
    ends = sequences.new_empty(num_sequences)
    tile_ends_kernel[(1,)](sequences, ends, num_sequences, TOKENS=tokens, CHUNK=1024)
    return ends, batch * per_row + num_sequences, True


@triton.jit
def load_tile(
    base, first, count, stride_s, stride_d, COLUMNS: tl.constexpr, HEAD_DIM: tl.constexpr, DEPTH: tl.constexpr
):
    """Rows first .. first + count - 1 of a matrix [S, HEAD_DIM] as a tile [COLUMNS, DEPTH], zero beyond."""
    row, d = tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    place = base + (first + row).to(tl.int64)[:, None] * stride_s + d.to(tl.int64)[None, :] * stride_d
    return tl.load(place, mask=(row < count)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def softmax_update(acc, row_max, row_sum, scores, v, v_scales):
    """Online softmax, base 2: fold scores `[M, N]` (-inf: not seen) and values `[N, D]` into the running state.

    v_scales [1, N], or 1: what the values are still to be multiplied by.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    precision: tl.constexpr = "ieee" if v.dtype == tl.float32 else "tf32"
    acc = tl.dot((weights * v_scales).to(v.dtype), v, acc * decay[:, None], input_precision=precision)
    return acc, new_max, row_sum
