"""How the selection is divided into tiles and splits: pure functions of problem, target and lengths."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton

from ...problem import Problem
from ...rules import SelectionRule
from ...tuning import Changes
from ..common.candidates import near, stages
from ..common.target import GLUON, Target, padded

# Programs of `kernel_sm90` fill a multiprocessor each: more than this would leave lists to merge, and gain little.
SM90_SPLITS = 128
# NVIDIA GPUs whose programs hold large tiles and have a bulk copy engine.
LARGE = (90, 100, 103)
# The most query rows that `kernel_sm90` takes as one tile.
SM90_ROWS = 64
# From so many queries, and so many keys of a query on average, `certified` was measured to be no slower, on an H200.
CERTIFIED_QUERIES, CERTIFIED_KEYS = 1 << 14, 1 << 16
# The fields of a Problem that a configuration depends on, and the fields of a configuration that tuning may change.
DEPENDS_ON = ("num_kv_heads", "index_head_dim", "block_size", "topk", "dtype", "key_size")
TUNABLE = ("rows", "num_warps", "num_stages", "period")


@dataclass(frozen=True)
class SelectionConfig:
    """rows: query rows (tokens x groups) per tile; columns: keys per step, a whole block's, or, of fp32, a part's;
    kept: padded topk; num_splits: programs that share the keys of a tile; period: blocks collected before they are
    merged into the top-k.

    clear: blocks that every row sees whole take a loop of their own, without masks; halves: there the products of one
    half of the rows run while the other half's maxima are taken, and the period is 1; swap: the keys are the rows of
    the product, as a few query rows would not fill them; fp8_product: e4m3 keys are multiplied as they are, as are e4m3
    queries; int8: keys are int8, and queries are quantized; sm90: `kernel_sm90` is launched; certified: `certified`
    selects by int8 scores, and the tiles are of rows that these do not decide.
    """

    rows: int
    columns: int
    kept: int
    num_splits: int
    num_warps: int = 4
    num_stages: int = 4
    period: int = 1
    use_tma: bool = True
    clear: bool = False
    halves: bool = False
    swap: bool = True
    fp8_product: bool = False
    int8: bool = False
    sm90: bool = False
    certified: bool = False

    def tokens(self, num_kv_heads: int) -> int:
        """Query tokens per tile."""
        return self.rows // num_kv_heads


# The most bytes of the lists of packed sequences.
PACKED_BYTES = 2**28
# What `merge` takes for the lists of one row, in units of the time of one block of a tile of 256 rows: 18 ns of 1.4 us
# on an H200.
MERGED_ROW = 0.0125


def split_count(
    num_tiles: int,
    num_blocks: int,
    num_sms: int,
    limit: int,
    per_sm: int = 1,
    overhead: float = 4.0,
    merged_rows: int = 0,
) -> int:
    """How many programs share the keys of a tile, so that the last wave of programs is full.

    Minimises waves * (time of the blocks of a split + overhead), in units of one block's time; `overhead` is what a
    program costs beside its blocks, and the merge launch after a split costs about as much. Up to `per_sm` programs
    share a multiprocessor: their blocks take their time in turns, and what they cost beside overlaps. merged_rows: rows
    whose lists have to be merged after a split.
    """
    merge = overhead + MERGED_ROW * merged_rows
    limit = max(1, min(limit, num_blocks // max(2, per_sm), max(1, 4 * num_sms // max(num_tiles, 1))))

    def cost(splits: int) -> float:
        waves = -(-num_tiles * splits // (num_sms * per_sm))
        sharing = min(per_sm, -(-num_tiles * splits // num_sms))
        return waves * (sharing * -(-num_blocks // splits) + overhead / sharing) + (merge if splits > 1 else 0.0)

    return min(range(1, limit + 1), key=cost)


def split_limit(kept: int) -> int:
    """Splits of which the lists of `kept` keys, of one query, do not get too long to merge."""
    return max(1, 8192 // kept)


def most_splits(config: SelectionConfig, target: Target) -> int:
    """The largest number of splits that a configuration of this kind has, whatever the lengths."""
    return SM90_SPLITS if config.sm90 else min(split_limit(config.kept), 4 * target.num_sms)


def row_tile(num_rows: int, num_kv_heads: int, least: int, most: int) -> int:
    """Rows of a tile for num_rows query rows of a sequence: those of one token, 16, 64 or the most.

    Tiles of a few sizes only, so that other numbers of tokens compile nothing; `least` is what the product takes.
    """
    sizes = padded(num_kv_heads, least=least), 16, 64
    return next((size for size in sizes if num_rows <= size <= most), max(most, sizes[0]))


def kept_blocks(topk: int) -> int:
    """Places of a query's list: topk, padded."""
    return max(8, triton.next_power_of_2(topk))


def fits_sm90(problem: Problem, target: Target) -> bool:
    """Whether `kernel_sm90` takes such a problem, if a tile holds all query rows of a sequence."""
    shape = problem.index_head_dim in (64, 128) and problem.block_size in (64, 128)
    e4m3 = problem.key_size == 1 and problem.dtype == torch.bfloat16
    dtypes = problem.key_size == 2 == problem.element_size or problem.int8 or e4m3
    topk = problem.topk is not None and kept_blocks(problem.topk) <= 32
    return GLUON and target.arch == 90 and shape and dtypes and topk and problem.bulk_copies


def gains_certified(problem: Problem, target: Target) -> bool:
    """Whether `certified` was measured to be faster for such a problem, of enough queries and keys."""
    sizes = problem.index_head_dim == problem.block_size == 128 and problem.num_kv_heads in (4, 8)
    bf16 = problem.dtype == torch.bfloat16 and problem.key_size == 2 and not problem.paged
    return target.arch == 90 and sizes and bf16 and problem.topk is not None and problem.topk <= 32


@functools.lru_cache(maxsize=4096)
def default_config(
    problem: Problem,
    target: Target,
    num_sequences: int,
    seqlen_q: int,
    seqlen_k: int,
    packed: bool = False,
    known_keys: int = 0,
) -> SelectionConfig:
    """Tiles of the scorer: the largest row tile that registers and shared memory hold, no more than there are rows.

    problem.dtype is that of the queries. e4m3 keys are decoded in registers, but where few queries meet many keys:
    there the tensor cores take them as they are. They take queries and keys that both are e4m3 so, where they can; else
    both are to be brought to fp16. int8 keys are multiplied as they are, on every GPU. On Hopper `kernel_sm90` takes a
    few rows of a problem that it fits.

    The lengths decide two things: rows, of the few sizes of `row_tile`, with all that follows them; and num_splits,
    which kernels take at run time, except that they are compiled once for one split and once for more. packed: the
    sequences have seqlen_q queries together. known_keys: if there is one sequence, how many keys it has at least. Where
    these are many, Hopper takes int8 scores first (`certified`).
    """
    assert problem.topk is not None
    kept = kept_blocks(problem.topk)
    num_rows = seqlen_q * problem.num_kv_heads
    num_blocks = triton.cdiv(seqlen_k, problem.block_size)
    # A query over e4m3 keys is two rows of the product, which has at least eight.
    least = 4 if problem.key_size == 1 and not problem.int8 else 8
    few = row_tile(num_rows, problem.num_kv_heads, least, SM90_ROWS)
    if num_rows <= SM90_ROWS and fits_sm90(problem, target):
        num_splits = split_count(num_sequences, num_blocks, target.num_sms, SM90_SPLITS)
        columns, fp8_product = padded(problem.block_size), problem.key_size == 1 and not problem.int8
        # More copies in flight than the default's four would only be in each other's way.
        return SelectionConfig(few, columns, kept, num_splits, fp8_product=fp8_product, int8=problem.int8, sm90=True)
    config = tile_config(problem, target, num_sequences, seqlen_q, num_blocks, kept, packed)
    # The scan saves time per query and key; the second scores cost it per query.
    long = seqlen_q >= CERTIFIED_QUERIES and known_keys - seqlen_q // 2 >= CERTIFIED_KEYS
    return replace(config, certified=long and gains_certified(problem, target))


def tile_config(
    problem: Problem,
    target: Target,
    num_sequences: int,
    seqlen_q: int,
    num_blocks: int,
    kept: int,
    packed: bool = False,
) -> SelectionConfig:
    """The configuration of `kernel`."""
    num_kv_heads, dtype, key_size = problem.num_kv_heads, problem.dtype, problem.key_size
    int8 = problem.int8
    columns, depth = padded(problem.block_size), padded_depth(problem.index_head_dim, int8)
    as_they_are = dtype == torch.float8_e4m3fn and target.has_e4m3 and depth >= 32
    if dtype == torch.float8_e4m3fn and not as_they_are:
        dtype, key_size = torch.float16, 2
    element_size = 1 if int8 else dtype.itemsize
    large = target.backend == "cuda" and target.arch in LARGE
    decoded = key_size < element_size
    most = most_rows(target, element_size, decoded, int8, columns, depth, kept)
    rows = row_tile(seqlen_q * num_kv_heads, num_kv_heads, 16, most)
    if element_size > 2:
        # No tensor cores: what is multiplied passes through registers, which hold more keys beside few queries.
        room = rows == 16 and not decoded and target.backend == "cuda"
        columns = min(columns, 16 if depth > 128 else 64 if room else 32)

    # A decoding step waits for memory: its keys go from shared memory to the product without passing registers, and
    # several programs to a multiprocessor keep loads in flight while one of them merges.
    swap = target.arch == 90 and rows < 64 <= columns and (element_size == 2 or int8)
    fp8_product = as_they_are or (swap and decoded and dtype == torch.bfloat16 and depth >= 32)
    if swap:
        rows = min(rows, row_tile(seqlen_q * num_kv_heads, num_kv_heads, 8, rows))
    # Keys that do not pass registers take a byte per number.
    narrow = fp8_product or int8
    per_sm = 4 if narrow and rows == 8 else 2 if swap else 1
    if decoded and not swap:
        num_warps = 8 if rows >= 64 and target.arch != 90 else 4
    else:
        num_warps = 8 if (decoded and not fp8_product) or rows * columns > 128 * 64 else 4
    # What a program holds beside the keys in flight: queries, scores, decoded keys, and sorts of long lists.
    held = rows * (depth + (columns if swap else 0)) * element_size + (rows * kept * 8 if kept > 128 else 0)
    held += columns * depth * element_size if decoded and not swap else 0
    spare = target.shared_memory // per_sm - held - 2048
    most_stages = 2 if target.backend == "hip" else 4 if narrow else 6 if swap else 4 if rows <= 64 else 3
    num_stages = max(1, min(most_stages, spare // (columns * depth * key_size)))

    tiles = triton.cdiv(seqlen_q, rows // num_kv_heads)
    tiles = tiles + num_sequences if packed else tiles * num_sequences
    merged_rows = num_kv_heads * seqlen_q * (1 if packed else num_sequences)
    limit = split_limit(kept)
    if packed:
        # There is room for the lists of all tokens in each sequence.
        limit = max(1, min(limit, PACKED_BYTES // (8 * kept * merged_rows * (num_sequences + 1))))
    num_splits = split_count(tiles, num_blocks, target.num_sms, limit, per_sm, merged_rows=merged_rows)
    # Without the swap, ptxas spills a few bytes of a small tile with TMA.
    copies = large and problem.bulk_copies and (swap or rows >= 64)
    whole = (columns, depth) == (problem.block_size, problem.index_head_dim)
    halves = target.arch == 90 and rows >= 128 and not decoded
    return SelectionConfig(
        rows=rows,
        columns=columns,
        num_warps=num_warps,
        num_stages=num_stages,
        # The top-k of a few rows, or of one row per thread, is kept in lists; between these, a thread would have many
        # rows to keep.
        period=1 if halves or (swap and rows <= 16 and kept <= 32) else 8,
        kept=kept,
        num_splits=num_splits,
        use_tma=copies and (element_size == 2 or narrow) and whole,
        clear=rows >= 64,
        halves=halves,
        swap=swap,
        fp8_product=fp8_product,
        int8=int8,
    )


def padded_depth(index_head_dim: int, int8: bool) -> int:
    """Di, padded to what a product takes."""
    return padded(index_head_dim, least=32 if int8 else 16)


def most_rows(target: Target, element_size: int, decoded: bool, int8: bool, columns: int, depth: int, kept: int) -> int:
    """The largest row tile whose scores and top-k registers and shared memory hold."""
    large = target.backend == "cuda" and target.arch in LARGE
    rows = 256 if large else 128 if target.arch == 80 else 64
    if large and decoded:
        rows = 128 if target.arch == 90 else 64
    if int8 and target.arch != 90:
        # Triton puts no int8 products into Blackwell's tensor memory: sums live in registers, as on older GPUs.
        rows = min(rows, 128)
    if element_size > 2:
        rows = 32 if depth <= 128 else 16
    elif depth > 256:
        rows = min(rows, 64)
    return min(rows, max(16, 256 * 128 // columns), max(16, 4096 // kept))


@dataclass(frozen=True)
class SelectionConstants:
    """Constants of the scorers.

    tokens: per tile; depth: Di, padded; unscored: a query that sees no more blocks than these keeps all of them without
    scores; native: the GPU converts e4m3 numbers by itself; stages: blocks of keys in flight in `kernel_sm90`; the
    other fields are the problem's and those of `SelectionConfig`.
    """

    num_kv_heads: int
    topk: int
    block_size: int
    head_dim: int
    depth: int
    rows: int
    tokens: int
    columns: int
    kept: int
    unscored: int
    period: int
    stages: int
    clear: bool
    halves: bool
    use_tma: bool
    swap: bool
    fp8_product: bool
    int8: bool
    native: bool
    overlap: bool


@functools.lru_cache
def selection_constants(
    config: SelectionConfig,
    num_kv_heads: int,
    index_head_dim: int,
    rule: SelectionRule,
    target: Target,
    with_scores: bool = False,
) -> SelectionConstants:
    """The constants of a configuration; of the rule only block_size and topk are constants.

    with_scores: every block is scored, however few there are.
    """
    as_chosen = "rows", "columns", "kept", "period", "clear", "halves", "use_tma", "swap", "fp8_product", "int8"
    return SelectionConstants(
        num_kv_heads=num_kv_heads,
        topk=rule.topk,
        block_size=rule.block_size,
        head_dim=index_head_dim,
        depth=padded_depth(index_head_dim, config.int8),
        tokens=config.tokens(num_kv_heads),
        unscored=0 if with_scores else rule.topk,
        stages=config.num_stages,
        native=target.has_e4m3,
        overlap=target.overlaps,
        **{name: getattr(config, name) for name in as_chosen},
    )


def candidates(problem: Problem, target: Target, config: SelectionConfig) -> Iterator[Changes]:
    """Changes of a configuration that are worth timing. All leave results right, and some may not fit the GPU."""
    if config.sm90:
        yield from stages(target, "num_stages", config.num_stages)
        return
    yield from near("num_warps", config.num_warps, 2, 16)
    yield from stages(target, "num_stages", config.num_stages)
    if config.period > 1:
        yield from near("period", config.period, 2, config.kept)
    if config.swap:
        return
    for rows, warps in ((config.rows // 2, config.num_warps // 2), (config.rows * 2, config.num_warps * 2)):
        if padded(problem.num_kv_heads) <= rows <= min(512, 8192 // config.kept):
            yield {"rows": rows}
            yield {"rows": rows, "num_warps": warps}
