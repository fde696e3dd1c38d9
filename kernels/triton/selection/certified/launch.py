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

from typing import Any

import torch
import triton

from ....problem import Problem
from ....rules import SelectionRule
from ....workspace import tokens_per_range
from ...common.launch import Launch, Options, view
from ...common.records import pages_of
from ...common.target import Target, target_of
from ..config import SelectionConfig, selection_constants
from ..kernel import key_arguments
from ..rule import ForcedBlocks
from ..scoring import RowList
from ..topk import Ids, Outputs
from .again import ROWS, Lists, again_kernel, list_kernel
from .certify import certify_kernel
from .choose import choose_kernel
from .marked import marked_kernel
from .quantise import Blocks, Queries, quantise_keys_kernel, quantise_queries_kernel
from .rows import PLACES, TILE, Rows, TokenRange
from .scan import scan_kernel

# Rows of a token range, at most: more leave the L2 cache before they are read again.
MOST_ROWS = 1 << 17
# About how many blocks of a row are scored again.
NEAR = 40
# Products that a program of `again` makes with a block, about.
PRODUCTS = 8
# Tiles of the scan that a multiprocessor works on at a time.
TILES_AT_ONCE = 2
# Warps that rotate vectors, which are fp32 numbers in registers while their product is summed up.
ROTATING = 8


def launch(
    kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], num_warps: int = 4, num_stages: int = 3
) -> None:
    """Launch a kernel on those of the arguments that it takes, by name."""
    given = {name: arguments[name] for name in kernel.arg_names}
    constants = {"C": given.pop("C")}
    Launch(kernel, grid, given, constants, Options(num_warps, num_stages)).run()


def range_size(seqlen_q: int, num_kv_heads: int, num_blocks: int, depth: int) -> int:
    """Tokens whose buffers, those of `range_buffers`, fit the workspace."""
    bytes_per_row = num_blocks * 17 // 8 + PLACES.value * 12 + depth + 32
    return min(tokens_per_range(seqlen_q, num_kv_heads * bytes_per_row), max(16, MOST_ROWS // num_kv_heads))


def fills(target: Target, problem: Problem, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether token ranges fill the GPU: a low workspace limit, or very many keys, leave room for too few rows."""
    num_blocks = triton.cdiv(seqlen_k, problem.block_size)
    tokens = range_size(seqlen_q, problem.num_kv_heads, num_blocks, problem.index_head_dim)
    return tokens * problem.num_kv_heads >= TILE.value * TILES_AT_ONCE * target.num_sms


def range_buffers(num_rows: int, num_blocks: int, depth: int, device: torch.device) -> dict[str, Any]:
    """What the kernels keep of num_rows rows, whole tiles, by the names of their arguments."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    queries = Queries(
        empty(num_rows, depth, dtype=torch.int8), *(empty(num_rows, dtype=torch.float32) for _ in range(3))
    )
    lists = Lists(empty(PLACES.value * num_rows), empty(num_blocks), empty(num_blocks), empty(1))
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
    constants = selection_constants(config, num_kv_heads, depth, rule, target_of(ids.device))
    outputs = Outputs(Ids(ids, *ids.stride()[:3]), None, 1)
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
    size = range_size(seqlen_q, num_kv_heads, blocks.num_blocks, depth)
    num_rows = triton.cdiv(size * num_kv_heads, TILE.value) * TILE.value
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
        for first in range(0, seqlen_q, size):
            count = min(size, seqlen_q - first)
            tiles = triton.cdiv(count * num_kv_heads, TILE.value)
            # No row of the range sees a block behind these.
            seen = triton.cdiv(max(1, index_k.shape[2] - seqlen_q + first + count), rule.block_size)
            select_range(arguments | {"tokens": TokenRange(number, first, count, tiles)}, tiles, seen)
        grid = triton.cdiv(len(marked), config.rows), 1, 1
        launch(marked_kernel, grid, arguments, config.num_warps, config.num_stages)


def select_range(arguments: dict[str, Any], tiles: int, num_blocks: int) -> None:
    """The ids of the rows of a token range, but for those that are marked; num_blocks: all that one of them may see."""
    launch(quantise_queries_kernel, (tiles, 1, 1), arguments, ROTATING)
    launch(scan_kernel, (tiles, 1, 1), arguments)
    launch(choose_kernel, (tiles * (TILE.value // 32), 1, 1), arguments)
    launch(list_kernel, (num_blocks, 1, 1), arguments)
    shares = max(1, tiles * TILE.value * NEAR // (num_blocks * ROWS.value * PRODUCTS))
    launch(again_kernel, (num_blocks, shares, 1), arguments)
    launch(certify_kernel, (tiles, 1, 1), arguments)
