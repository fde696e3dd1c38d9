"""Ranking in registers: lists that blocks are inserted into, and tiles of packed keys.

Lists are tuples, (scores, ids), of a tensor [rows] for each place: for a few rows, or a thread for each. Tiles take any
number of places and rows. In tiles and in memory a block is one int64, so that sorting and ties need no second tensor:

    key = ordered(score) << 32 | (2^31 - 1 - id)

`ordered` maps fp32 to int32 monotonically, so a larger key is a better score and, among equal scores, the smaller
id. `-inf` marks a block that may not be chosen and `+inf` a forced one: scores proper are clamped to the finite
range. Tiles of keys are `[K, R]`, a query row a column, because Triton then gives all K keys of a row to one
thread, if there are rows enough, and a sorting network along K moves nothing between threads.
"""

# Kernels let tuples grow, which is another type to mypy each time.
# mypy: disable-error-code="assignment"

import triton
import triton.language as tl

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
def first_blocks(K: tl.constexpr, forced, visible, BLOCK: tl.constexpr):
    """Lists of K blocks, (scores, ids), tuples of [rows]: of the first `forced` blocks those that a row sees.

    visible [rows] in keys. What a list is short of has the score -inf and the id ID_MASK.
    """
    scores = ()
    ids = ()
    for rank in tl.static_range(K):
        given = (rank < forced) & (rank * BLOCK < visible)
        scores += (tl.where(given, float("inf"), float("-inf")),)
        ids += (tl.where(given, rank, ID_MASK),)
    return scores, ids


@triton.jit
def insert_block(lists, score, id):
    """The lists, best first, with one more block in its place and without their last.

    score [rows], id [rows] or one number. A block goes behind those that score the same, and nowhere with -inf.
    """
    scores, ids = lists
    new_scores = ()
    new_ids = ()
    moved = score
    for rank in tl.static_range(len(scores)):
        before = score > scores[rank]
        new_scores += (tl.maximum(moved, scores[rank]),)
        new_ids += (tl.where(before, id, ids[rank]),)
        moved, id = tl.minimum(moved, scores[rank]), tl.where(before, ids[rank], id)
    return new_scores, new_ids


@triton.jit
def ascending(ids, COUNT: tl.constexpr):
    """The first COUNT of a tuple of [rows], each row sorted."""
    found = ()
    for rank in tl.static_range(COUNT):
        id = ids[rank]
        longer = ()
        for place in tl.static_range(rank):
            longer += (tl.minimum(id, found[place]),)
            id = tl.maximum(id, found[place])
        longer += (id,)
        found = longer
    return found


@triton.jit
def start_ranking(forced, visible, KEPT: tl.constexpr, PERIOD: tl.constexpr, BLOCK: tl.constexpr):
    """What `collect` keeps of the blocks so far, to begin with the first `forced` that a row sees; visible [rows].

    With PERIOD 1 the lists of `first_blocks`, which are short enough for a thread to hold; else tiles: the kept keys
    [KEPT, rows], the scores of a period's blocks [PERIOD, rows], and those that a new block has to beat [rows].
    """
    if PERIOD == 1:
        return first_blocks(KEPT, forced, visible, BLOCK)
    else:
        rank = tl.arange(0, KEPT)[:, None]
        given = (rank < forced) & (rank * BLOCK < visible[None, :])
        kept = tl.where(given, pack_keys(tl.where(given, float("inf"), 0.0), rank), EMPTY_KEY)
        return kept, tl.full([PERIOD, visible.shape[0]], float("-inf"), tl.float32), worst_kept(kept)


@triton.jit
def collect(ranking, best, block, flush, PERIOD: tl.constexpr):
    """The ranking with block's maxima `best` [rows]; a period's are merged when it is full, or when told to flush."""
    if PERIOD == 1:
        return insert_block(ranking, best, block)
    else:
        kept, fresh, worst = ranking
        slot = block % PERIOD
        fresh = tl.where(tl.arange(0, PERIOD)[:, None] == slot, best[None, :], fresh)
        if (slot == PERIOD - 1) | flush:
            if tl.max((tl.max(fresh, axis=0) > worst).to(tl.int32), axis=0) > 0:
                kept = keep_best(kept, fresh, block - slot)
                worst = worst_kept(kept)
            fresh = tl.full(fresh.shape, float("-inf"), tl.float32)
        return kept, fresh, worst


@triton.jit
def list_row(sequence, offset, group, seqlen_q, GROUPS: tl.constexpr):
    """The row of lists of the offset-th query of a sequence, and of a group: to be known without any load."""
    return (sequence.to(tl.int64) * seqlen_q + offset) * GROUPS + group


@triton.jit
def store_ranking(
    ranking, ids_ptr, lists_ptr, ids_row, lists_row, live, num_splits,
    TOPK: tl.constexpr, KEPT: tl.constexpr, PERIOD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write each live row's ids, ascending; or, of a SPLIT, its KEPT keys, descending, for `merge.merge_lists`."""
    place = ids_row * TOPK
    if SPLIT:
        place = (lists_row * num_splits + tl.program_id(1)) * KEPT
    if PERIOD == 1:
        scores, ids = ranking
        if SPLIT:
            for rank in tl.static_range(KEPT):
                tl.store(lists_ptr + place + rank, pack_keys(scores[rank], ids[rank]), mask=live)
        else:
            ids = ascending(ids, TOPK)
            for rank in tl.static_range(TOPK):
                tl.store(ids_ptr + place + rank, tl.where(ids[rank] == ID_MASK, -1, ids[rank]), mask=live)
    else:
        rank = tl.arange(0, KEPT)[:, None]
        if SPLIT:
            tl.store(lists_ptr + place[None, :] + rank, ranking[0], mask=live[None, :])
        else:
            ids = ascending_ids(ranking[0], TOPK)
            tl.store(ids_ptr + place[None, :] + rank, ids, mask=live[None, :] & (rank < TOPK))
