"""Named pieces that the kernels of this folder are built of.

Ranked blocks travel as one int64 a block, so that sorting and ties need no second tensor:

    key = ordered(score) << 32 | (2^31 - 1 - id)

`ordered` maps fp32 to int32 monotonically, so a larger key is a better score and, among equal scores, the smaller
id. `-inf` marks a block that may not be chosen and `+inf` a forced one: scores proper are clamped to the finite
range. Tiles of keys are `[K, R]`, a query row a column, because Triton then gives all K keys of a row to one
thread, and a sorting network along K moves nothing between threads.
"""

import torch
import triton
import triton.language as tl

FLT_MAX = tl.constexpr(3.4028234663852886e38)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
ID_MASK = tl.constexpr(0x7FFFFFFF)
ORDERED_NEG_INF = tl.constexpr(-2139095041)
EMPTY_KEY = tl.constexpr(-2139095041 << 32)


@triton.constexpr_function
def log2(power_of_two):
    """The exponent of a power of two, at compile time."""
    return power_of_two.bit_length() - 1


@triton.jit
def pack_keys(scores, ids):
    """Sortable int64 keys of fp32 `scores` and int32 `ids` (one shape). -0.0 ties with 0.0."""
    bits = tl.where(scores == 0.0, 0.0, scores).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & ID_MASK)
    return (ordered.to(tl.int64) << 32) | (ids ^ ID_MASK).to(tl.int64)


@triton.jit
def key_scores(keys):
    """The fp32 scores of packed keys."""
    ordered = (keys >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & ID_MASK)).to(tl.float32, bitcast=True)


@triton.jit
def exchange(x, SPAN: tl.constexpr, STRIDE: tl.constexpr, descending):
    """Order the pairs of x `[N, R]` that lie STRIDE rows apart: one layer of a bitonic network.

    Runs of SPAN rows alternate between the given order and its reverse, as the next wider layer needs.
    `descending` is 0 or 1, or an int32 tensor [1, 1, 1, R] of them.
    """
    N: tl.constexpr = x.shape[0]
    R: tl.constexpr = x.shape[1]
    pairs = tl.reshape(x, [N // (2 * STRIDE), 2, STRIDE, R])
    upper = tl.max(pairs, axis=1, keep_dims=True)
    lower = tl.min(pairs, axis=1, keep_dims=True)
    second = tl.arange(0, 2)[None, :, None, None]
    reverse = (tl.arange(0, N // (2 * STRIDE)) // (SPAN // (2 * STRIDE)) % 2)[:, None, None, None]
    take_upper = second ^ reverse ^ descending
    return tl.reshape(tl.where(take_upper == 1, upper, lower), [N, R])


@triton.jit
def reverse_columns(x):
    """x `[N, R]` with its N rows in reverse order."""
    N: tl.constexpr = x.shape[0]
    R: tl.constexpr = x.shape[1]
    for step in tl.static_range(log2(N)):
        x = tl.reshape(x, [N >> (step + 1), 2, 1 << step, R])
        x = tl.reshape(tl.xor_sum(x, axis=1, keep_dims=True) ^ x, [N, R])
    return x


@triton.jit
def merge_bitonic(x, SPAN: tl.constexpr, descending):
    """Sort each bitonic run of SPAN rows of x `[N, R]`, every second run in reverse order."""
    STEPS: tl.constexpr = log2(SPAN)
    for step in tl.static_range(STEPS):
        x = exchange(x, SPAN, SPAN >> (step + 1), descending)
    return x


@triton.jit
def sort_columns(x, DESCENDING: tl.constexpr):
    """Sort x `[N, R]` along N."""
    STEPS: tl.constexpr = log2(x.shape[0])
    for step in tl.static_range(STEPS):
        x = merge_bitonic(x, 2 << step, DESCENDING)
    return x


@triton.jit
def keep_best(kept, fresh, first_id):
    """Merge new block scores into the kept keys of each column.

    kept `[K, R]` keys, descending; fresh `[P, R]` fp32, P <= K, row p being block `first_id + p`. A bitonic half
    merge: kept against reversed fresh, the larger of each pair, sorted again.
    """
    K: tl.constexpr = kept.shape[0]
    P: tl.constexpr = fresh.shape[0]
    R: tl.constexpr = kept.shape[1]
    keys = sort_columns(pack_keys(fresh, first_id + tl.arange(0, P)[:, None]), 0)
    runs = tl.reshape(kept, [K // P, P, R])
    last = (tl.arange(0, K // P) == K // P - 1)[:, None, None]
    best = tl.where(last, tl.maximum(runs, keys[None, :, :]), runs)
    return merge_bitonic(tl.reshape(best, [K, R]), K, 1)


@triton.jit
def keep_best_few(kept, fresh, first_id, LIVE: tl.constexpr):
    """As `keep_best`, where only the first LIVE columns are in use, and P >= K: all threads share their sorts."""
    K: tl.constexpr = kept.shape[0]
    P: tl.constexpr = fresh.shape[0]
    R: tl.constexpr = kept.shape[1]
    live = (tl.arange(0, R // LIVE) == 0)[None, :, None]
    keys = pack_keys(fresh, first_id + tl.arange(0, P)[:, None])
    keys = tl.max(tl.where(live, tl.reshape(keys, [P, R // LIVE, LIVE]), EMPTY_KEY), axis=1)
    keys = tl.sort(tl.trans(keys), descending=True)
    best = (tl.arange(0, P // K) == 0)[None, :, None]
    keys = tl.max(tl.where(best, tl.reshape(keys, [LIVE, P // K, K]), EMPTY_KEY), axis=1)
    old = tl.max(tl.where(live, tl.reshape(kept, [K, R // LIVE, LIVE]), EMPTY_KEY), axis=1)
    keys = tl.sort(tl.maximum(tl.flip(tl.trans(old), 1), keys), descending=True)
    return tl.reshape(tl.where(live, tl.trans(keys)[:, None, :], EMPTY_KEY), [K, R])


@triton.jit
def worst_kept(kept):
    """The score `[R]` that a new block has to beat: that of the last key of kept `[K, R]`."""
    return key_scores(tl.min(kept, axis=0))


@triton.jit
def ascending_ids(kept, topk):
    """Block ids `[K, R]` of the first `topk` keys of each column, ascending, -1 after the last."""
    rank = tl.arange(0, kept.shape[0])[:, None]
    chosen = ((kept >> 32) > ORDERED_NEG_INF) & (rank < topk)
    ids = tl.where(chosen, (kept & ID_MASK).to(tl.int32) ^ ID_MASK, ID_MASK)
    ids = sort_columns(ids, 0)
    return tl.where(ids == ID_MASK, -1, ids)


@triton.jit
def overlap_launches(OVERLAP: tl.constexpr):
    """Wait for the kernel before this one, beside whose end it was launched, and let the next one be launched so.

    To be called before anything is read or written.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
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
def softmax_update(acc, row_max, row_sum, scores, v):
    """Online softmax, base 2: fold scores `[M, N]` (-inf: not seen) and values `[N, D]` into the running state."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(row_max - shift)
    row_sum = row_sum * decay + tl.sum(weights, axis=1)
    precision: tl.constexpr = "ieee" if v.dtype == tl.float32 else "tf32"
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=precision)
    return acc, new_max, row_sum
