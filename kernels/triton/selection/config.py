"""How the selection is cut up: pure functions of target and shape, as those of `configs`."""

from dataclasses import dataclass

import torch
import triton

from ..common.target import GLUON, Target, padded

# Longer lists of what a query keeps take minutes to compile, and more shared memory than there is.
MOST_BLOCKS = 512


@dataclass(frozen=True)
class SelectionConfig:
    """rows: query rows (tokens x groups) a tile; columns: keys a step, a whole block's, or, of fp32, a part's; period:
    blocks ranked at a time; kept: padded topk.

    clear: blocks that every row sees whole take a loop of their own, without masks; halves: there the products of one
    half of the rows run while the other half's maxima are taken, and the period is 1; swap: the keys are the rows of
    the product, as a few query rows would not fill them; fp8_product: e4m3 keys are multiplied as they are, as are e4m3
    queries; hopper: by `scoring_hopper`.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    period: int
    kept: int
    num_splits: int
    use_tma: bool
    clear: bool
    halves: bool
    swap: bool
    fp8_product: bool = False
    hopper: bool = False

    def tokens(self, num_kv_heads: int) -> int:
        """Query tokens a tile."""
        return self.rows // num_kv_heads


def split_count(
    num_tiles: int, num_blocks: int, num_sms: int, limit: int, per_sm: int = 1, overhead: float = 4.0
) -> int:
    """How many programs share the keys of a tile, so that the last wave of programs is full.

    Minimises waves * (time of the blocks of a split + overhead), in units of one block's time; `overhead` is what a
    program costs beside its blocks, and the merge launch after a split costs about as much. Up to `per_sm` programs
    share a multiprocessor: their blocks take their time in turns, and what they cost beside overlaps.
    """
    limit = max(1, min(limit, num_blocks // max(2, per_sm), max(1, 4 * num_sms // max(num_tiles, 1))))

    def cost(splits: int) -> float:
        waves = -(-num_tiles * splits // (num_sms * per_sm))
        sharing = min(per_sm, -(-num_tiles * splits // num_sms))
        return waves * (sharing * -(-num_blocks // splits) + overhead / sharing) + (overhead if splits > 1 else 0.0)

    return min(range(1, limit + 1), key=cost)


# Programs of `kernel_sm90` fill a multiprocessor each: more than this would leave lists to merge, and gain little.
SM90_SPLITS = 128


def split_limit(kept: int) -> int:
    """Splits of which the lists of `kept` keys, of one query, do not get too long to merge."""
    return max(1, 8192 // kept)


def most_splits(config: "SelectionConfig", target: Target) -> int:
    """The largest number of splits that a configuration of this kind has, whatever the lengths."""
    if config.hopper:
        return SM90_SPLITS
    return min(split_limit(config.kept), 4 * target.num_sms)


def selection_config(
    target: Target,
    *,
    num_sequences: int,
    num_kv_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    index_head_dim: int,
    block_size: int,
    topk: int,
    dtype: torch.dtype,
    key_size: int,
    tma_ready: bool,
    scales_ready: bool = True,
) -> SelectionConfig:
    """Tiles of the scorer: the largest row tile that registers and shared memory hold, no more than there are rows.

    dtype is that of the queries, key_size the bytes of a number of the index keys: 1 for e4m3. Those are decoded in
    registers, but where few queries meet many keys: there the tensor cores take them as they are. They take queries
    and keys that both are e4m3 so, where they can; else both are to be brought to fp16. The bulk copy engine can read
    what is `ready`.
    """
    if topk > MOST_BLOCKS:
        raise NotImplementedError(
            f"topk: expected at most {MOST_BLOCKS} for the Triton kernels, got {topk}; take larger blocks, or "
            "backend='cpu', which runs on any device"
        )
    kept = max(8, triton.next_power_of_2(topk))
    columns, depth = padded(block_size), padded(index_head_dim)
    few = padded(seqlen_q * num_kv_heads, least=4 if key_size == 1 else 8)
    plain = GLUON and target.arch == 90 and index_head_dim in (64, 128) and block_size in (64, 128)
    as_stored = key_size == 2 == dtype.itemsize or (key_size == 1 and dtype == torch.bfloat16)
    if plain and as_stored and tma_ready and scales_ready and few <= 64 and kept <= 32:
        num_splits = split_count(num_sequences, triton.cdiv(seqlen_k, block_size), target.num_sms, SM90_SPLITS)
        return hopper_scorer(few, columns, kept, num_splits, fp8_product=key_size == 1)
    as_they_are = dtype == torch.float8_e4m3fn and target.has_e4m3 and depth >= 32
    if dtype == torch.float8_e4m3fn and not as_they_are:
        dtype, key_size = torch.float16, 2
    element_size = dtype.itemsize
    hopper = target.backend == "cuda" and target.arch in (90, 100, 103)
    decoded = key_size < element_size
    rows = 256 if hopper else 128 if target.arch == 80 else 64
    if hopper and decoded:
        rows = 128 if target.arch == 90 else 64
    if element_size > 2:
        rows = 32 if depth <= 128 else 16
    elif depth > 256:
        rows = min(rows, 64)
    rows = min(rows, max(16, 256 * 128 // columns), max(16, 4096 // kept))
    rows = min(rows, padded(min(seqlen_q, 4096) * num_kv_heads))
    rows = max(rows, padded(num_kv_heads))
    if element_size > 2:
        # No tensor cores: what is multiplied passes through registers, which hold more keys beside few queries.
        room = rows == 16 and not decoded and target.backend == "cuda"
        columns = min(columns, 16 if depth > 128 else 64 if room else 32)

    # A decoding step waits for memory: its keys go from shared memory to the product without passing registers, and
    # several programs to a multiprocessor keep loads in flight while one of them merges.
    swap = target.arch == 90 and rows < 64 <= columns and element_size == 2
    fp8_product = as_they_are or (swap and decoded and dtype == torch.bfloat16 and depth >= 32)
    if swap:
        rows = min(rows, padded(seqlen_q * num_kv_heads, least=8))
    per_sm = 4 if fp8_product and rows == 8 else 2 if swap else 1
    if decoded and not swap:
        num_warps = 8 if rows >= 64 and target.arch != 90 else 4
    else:
        num_warps = 8 if (decoded and not fp8_product) or rows * columns > 128 * 64 else 4
    spare = target.shared_memory // per_sm - rows * (depth + (columns if swap else 0)) * element_size - 2048
    if decoded and not swap:
        spare -= columns * depth * element_size
    if kept > 128:
        # Sorts of long lists pass through shared memory.
        spare -= rows * kept * 8
    most = 4 if fp8_product else 6 if swap else 4 if rows <= 64 else 3
    num_stages = max(1, min(most, spare // (columns * depth * key_size)))
    if target.backend == "hip":
        num_stages = min(num_stages, 2)

    tiles = num_sequences * triton.cdiv(seqlen_q, rows // num_kv_heads)
    limit = split_limit(kept)
    num_splits = split_count(tiles, triton.cdiv(seqlen_k, block_size), target.num_sms, limit, per_sm)
    # Without the swap, ptxas spills a few bytes of a small tile with TMA.
    copies = hopper and tma_ready and (swap or rows >= 64)
    use_tma = copies and (element_size == 2 or fp8_product) and (columns, depth) == (block_size, index_head_dim)
    halves = target.arch == 90 and rows >= 128 and not decoded
    return SelectionConfig(
        rows=rows,
        columns=columns,
        num_warps=num_warps,
        num_stages=num_stages,
        # A few rows, or a row a thread, are ranked in registers; between these, a thread would have many rows to rank.
        period=1 if halves or (swap and rows <= 16 and kept <= 32) else 8,
        kept=kept,
        num_splits=num_splits,
        use_tma=use_tma,
        clear=rows >= 64,
        halves=halves,
        swap=swap,
        fp8_product=fp8_product,
    )


def hopper_scorer(rows: int, columns: int, kept: int, num_splits: int, fp8_product: bool) -> SelectionConfig:
    """The configuration of `scoring_hopper`. More copies in flight than four would only be in each other's way."""
    return SelectionConfig(
        rows=rows,
        columns=columns,
        num_warps=4,
        num_stages=4,
        period=1,
        kept=kept,
        num_splits=num_splits,
        use_tma=True,
        clear=False,
        halves=False,
        swap=True,
        fp8_product=fp8_product,
        hopper=True,
    )
