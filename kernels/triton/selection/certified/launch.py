"""A selection whose ids are certified from int8 scores: those of the 16-bit kernel, ties included, in less time.

Tensor cores multiply int8 numbers twice as fast as bf16 numbers. For each token range whose buffers fit
the workspace:

1. `quantise` rotates queries and keys, and rounds them to int8, with bounds on what is lost.
2. `scan` multiplies them, and keeps the maximum of each row and block.
3. `choose` guesses a number that all selected blocks of a row score above, and rules out the blocks that the bounds
   prove to be below it.
4. `again` scores the blocks that are left in 16 bits, as `selection.kernel` does, a block's rows at a time.
5. `certify` takes the best of them. If the last one taken scores at least the guess, the ids are certain; if not, or
   if more blocks are left than there are places for, the row is marked.

Marked rows are then scored as if there were no int8 (`marked`). docs/math.md proves the bounds, and
docs/notes/selection-8-bits.md says what each step takes.

A block has rough scores for a tile of rows if all of them see it whole and none is forced to keep it. Others that a row
sees, and is not forced to keep, are scored again. Rows that see no more than topk blocks take them all.

Cost: 2 Hkv Di operations of int8 per (query, visible key), and 17 bits of memory per row and block of a token range:
16 are written once and read twice, one is written once and read once.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton

from ....problem import Problem
from ....rules import SelectionRule
from ....workspace import workspace_limit
from ...common.launch import Launch, Options, view
from ...common.records import pages_of
from ...common.target import Target, target_of
from ..config import SelectionConfig, selection_constants
from ..kernel import key_arguments
from ..merge import Lists, MergeKernelConstants
from ..rule import ForcedBlocks
from ..scoring import RowList
from ..topk import Outputs, ids_of
from .again import ROWS, BlockLists, again_kernel, list_kernel
from .certify import certify_kernel
from .choose import choose_kernel
from .marked import marked_kernel, merge_marked_kernel
from .quantise import Blocks, Queries, quantise_keys_kernel, quantise_queries_kernel
from .rows import PLACES, TILE, Rows, TokenRange
from .scan import scan_kernel

# Rounds of the scan in a token range, at most: the rows of more leave the L2 cache before they are read again.
MOST_ROUNDS = 4
# About how many blocks of a row are scored again.
NEAR = 40
# Products that a program of `again` makes with a block, about.
PRODUCTS = 8
# Tiles of the scan that a multiprocessor works on at a time.
TILES_AT_ONCE = 2
# Warps that rotate vectors, which are fp32 numbers in registers while their product is summed up.
ROTATING = 8
# Warps of a program of the scan: two warp groups, of which one multiplies while the other takes maxima.
SCANNING = 8
# Tiles of marked rows whose keys are shared out to programs, and to how many: a program with all keys of a tile takes
# long, and normal keys mark fewer rows.
SHARED_TILES, SHARES = 8, 32


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 3
) -> None:
    """Launch a kernel on those of the arguments that it takes, by name."""
    given = {name: arguments[name] for name in kernel.arg_names}
    constants = {"C": given.pop("C")}
    Launch(kernel, grid, given, constants, Options(num_warps, num_stages)).run()


def tokens_per_round(target: Target, num_kv_heads: int) -> int:
    """Tokens that the scan works on at a time, a multiple of 16."""
    return max(16, TILE.value * TILES_AT_ONCE * target.num_sms // num_kv_heads // 16 * 16)


def fitting_tokens(num_kv_heads: int, num_blocks: int, depth: int) -> int:
    """Tokens whose buffers, those of `range_buffers`, fit the workspace."""
    bytes_per_row = num_blocks * 17 // 8 + PLACES.value * 12 + depth + 32
    return workspace_limit() // (num_kv_heads * bytes_per_row)


def range_size(target: Target, num_kv_heads: int, num_blocks: int, depth: int) -> int:
    """Tokens of a range: whole rounds of the scan, whose buffers may take a third more than the workspace's limit.

    A round that is not full takes as long as one that is. If none fits, the tokens that do, at least 16.
    """
    fit, at_once = fitting_tokens(num_kv_heads, num_blocks, depth), tokens_per_round(target, num_kv_heads)
    rounds = min(MOST_ROUNDS, fit * 4 // (at_once * 3))
    return rounds * at_once or max(16, fit // 16 * 16)


def token_ranges(num_tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """First token and number of tokens of each range. The short one is the first, whose queries see the fewest keys.

    All begin at multiples of 16, so the last may be up to 15 tokens shorter than the others.

    >>> list(token_ranges(100, 48))
    [(0, 16), (16, 48), (64, 36)]
    """
    first = 0
    while first < num_tokens:
        rest = triton.cdiv(num_tokens - first, 16) * 16
        count = min(rest % size or size, num_tokens - first)
        yield first, count
        first += count


def fills(target: Target, problem: Problem, seqlen_k: int) -> bool:
    """Whether token ranges fill the GPU: a low workspace limit, or very many keys, leave room for too few rows."""
    num_blocks = triton.cdiv(seqlen_k, problem.block_size)
    fit = fitting_tokens(problem.num_kv_heads, num_blocks, problem.index_head_dim)
    return fit >= tokens_per_round(target, problem.num_kv_heads)


def range_buffers(num_rows: int, num_blocks: int, depth: int, device: torch.device) -> dict[str, Any]:
    """What the kernels keep of num_rows rows, whole tiles, by the names of their arguments."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    queries = Queries(
        empty(num_rows, depth, dtype=torch.int8), *(empty(num_rows, dtype=torch.float32) for _ in range(3))
    )
    lists = BlockLists(empty(PLACES.value * num_rows), empty(num_blocks), empty(num_blocks), empty(1))
    over, bits = empty(num_rows // 32), empty(num_blocks, num_rows // 32)
    low, places = empty(num_rows, dtype=torch.float32), empty(PLACES.value, num_rows, dtype=torch.int64)
    return {
        "queries": queries,
        "numbers_ptr": queries.numbers,
        "scale_ptr": queries.scale,
        "maxima_ptr": empty(num_blocks, num_rows, dtype=torch.int16),
        "rows": Rows(low, empty(num_rows), empty(num_rows), places, over),
        "bits_ptr": bits,
        "over_ptr": over,
        "lists": lists,
        "total_ptr": lists.total,
    }


def quantise_keys(index_k: torch.Tensor, arguments: dict[str, Any], block_size: int) -> tuple[torch.Tensor, Blocks]:
    """int8 index keys, and the Blocks of all sequences."""
    batch, _, seqlen_k, depth = index_k.shape
    num_blocks = triton.cdiv(seqlen_k, block_size)
    numbers = index_k.new_empty(batch, 1, seqlen_k, depth, dtype=torch.int8)
    scale, error, norm = (index_k.new_empty(batch, num_blocks, dtype=torch.float32) for _ in range(3))
    sums = index_k.new_empty(batch, 2, dtype=torch.float32)
    blocks = Blocks(scale, error, norm, sums, num_blocks)
    given = arguments | {"index_k": view(index_k), "numbers_ptr": numbers, "blocks": blocks, "seqlen_k": seqlen_k}
    launch(quantise_keys_kernel, (num_blocks, batch, 1), given, ROTATING)
    for place, bound in enumerate((error, norm)):
        torch.sum(bound.nan_to_num(posinf=0.0), 1, out=sums[:, place])
    return numbers, blocks


def select_certified(
    index_q: torch.Tensor,
    index_k: torch.Tensor,
    sequences: torch.Tensor,
    rule: SelectionRule,
    config: SelectionConfig,
    ids: torch.Tensor,
) -> None:
    """Write block_indices [B, Hkv, Sq, topk]; sequences: one per batch row, of all its queries."""
    batch, num_kv_heads, seqlen_q, depth = index_q.shape
    assert sequences.shape == (batch, 5), "packed documents are shorter than their buffer says"
    target = target_of(ids.device)
    constants = selection_constants(config, num_kv_heads, depth, rule, target)
    outputs = Outputs(ids_of(ids), None, 1)
    arguments = {
        "index_q": view(index_q),
        "pages": pages_of(None, index_k),
        "sequences_ptr": sequences,
        "forced": ForcedBlocks(rule.num_local_blocks, rule.num_init_blocks),
        "ids": outputs.ids,
        "outputs": outputs,
        "C": constants,
    }
    numbers, blocks = quantise_keys(index_k, arguments, rule.block_size)
    size = range_size(target, num_kv_heads, blocks.num_blocks, depth)
    num_rows = triton.cdiv(min(size, seqlen_q) * num_kv_heads, TILE.value) * TILE.value
    # Rows that only fill up the last tile would be of later tokens, which see blocks behind the last one.
    most_blocks = blocks.num_blocks + (TILE.value - 1) // rule.block_size
    arguments |= range_buffers(num_rows, most_blocks, depth, ids.device)
    arguments |= key_arguments(index_k, None, config, rule.block_size, 0) | {"blocks": blocks}
    arguments["key_numbers"] = key_arguments(numbers, None, config, rule.block_size, 0)["index_k"]
    # Each count is 16 bytes from the next, as kernels are compiled for addresses that are multiples of that.
    counts = sequences.new_zeros(batch, 4)
    marked = sequences.new_empty(num_kv_heads * seqlen_q)
    for number in range(batch):
        arguments |= {"number": number, "marked": RowList(marked, counts[number])}
        for first, count in token_ranges(seqlen_q, size):
            tiles = triton.cdiv(count * num_kv_heads, TILE.value)
            # No row of the range sees a block behind these.
            seen = triton.cdiv(max(1, index_k.shape[2] - seqlen_q + first + count), rule.block_size)
            select_range(arguments | {"tokens": TokenRange(number, first, count, tiles)}, tiles, seen)
        select_marked(arguments, len(marked), config)


def select_range(arguments: dict[str, Any], tiles: int, num_blocks: int) -> None:
    """The ids of the rows of a token range, but for those that are marked; num_blocks: all that one of them may see."""
    launch(quantise_queries_kernel, (tiles, 1, 1), arguments, ROTATING)
    launch(scan_kernel, (tiles, 1, 1), arguments, SCANNING)
    launch(choose_kernel, (tiles * (TILE.value // 32), 1, 1), arguments)
    launch(list_kernel, (num_blocks, 1, 1), arguments)
    shares = max(1, tiles * TILE.value * NEAR // (num_blocks * ROWS.value * PRODUCTS))
    launch(again_kernel, (num_blocks, shares, 1), arguments)
    launch(certify_kernel, (tiles, 1, 1), arguments)


def select_marked(arguments: dict[str, Any], num_rows: int, config: SelectionConfig) -> None:
    """The ids of marked rows, of which there are at most num_rows."""
    options = config.num_warps, config.num_stages
    ids, tiles = arguments["outputs"].ids, triton.cdiv(num_rows, config.rows)
    shared = min(SHARED_TILES, tiles)
    keys = ids.ptr.new_empty(shared * config.rows, SHARES, config.kept, dtype=torch.int64)
    lists = Lists(keys, SHARES, config.kept, SHARES)
    given = arguments | {"skipped": 0, "outputs": Outputs(ids, keys, SHARES)}
    launch(marked_kernel, (shared, SHARES, 1), given, *options)
    constants = MergeKernelConstants(arguments["C"].num_kv_heads, arguments["C"].topk, lists.constants, False)
    given = arguments | {"lists": lists, "C": constants}
    launch(merge_marked_kernel, (shared * config.rows, 1, 1), given)
    if tiles > shared:
        launch(marked_kernel, (tiles - shared, 1, 1), arguments | {"skipped": shared * config.rows}, *options)
