"""The query rows that are worked on at once, and which blocks of theirs have rough scores."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rule import forced_from

# Rows of a tile: those of a program of the scan.
TILE = tl.constexpr(128)
# The blocks of a row that can be scored again. A row with more is left to the 16-bit kernel.
PLACES = tl.constexpr(96)


class TokenRange(NamedTuple):
    """`count` tokens of a sequence: row r is group r % Hkv of token first + r // Hkv.

    tiles: of rows that buffers have room for.
    """

    sequence: Any
    first: Any
    count: Any
    tiles: Any


class Rows(NamedTuple):
    """What is known of each row of a token range.

    low: what a score of 16 bits has to be for a block that is selected, over the scale of the row's query; near: how
    many blocks are scored again; used: how many have been, each with a key in places [PLACES, rows]; over [rows / 32]:
    a bit for each row that has more than PLACES.
    """

    low: Any
    near: Any
    used: Any
    places: Any
    over: Any


@triton.jit
def visible_keys(sequence, tokens, row, C: tl.constexpr):
    """The keys that a row sees, as if there were no last row; not positive for one that sees none."""
    return sequence.k_end - sequence.k_start - sequence.q_end + tokens.first + row // C.num_kv_heads + 1


@triton.jit
def ranked_end(visible, forced, C: tl.constexpr):
    """The block behind those that compete for a row that sees `visible` keys; they begin with forced.num_init."""
    return forced_from(forced, (visible - 1) // C.block_size)


@triton.jit
def scanned_end(sequence, tokens, row, forced, C: tl.constexpr):
    """The block behind those with rough scores for the tile of a row: each of its rows sees them whole."""
    visible = visible_keys(sequence, tokens, row // TILE * TILE, C)
    return tl.minimum(visible // C.block_size, ranked_end(visible, forced, C))


@triton.jit
def load_rows(index_q, batch, tokens, row, live, C: tl.constexpr):
    """Queries [rows, depth] of rows of a token range; zero where they are not live. index_q is a View."""
    group, token = (row % C.num_kv_heads).to(tl.int64), (tokens.first + row // C.num_kv_heads).to(tl.int64)
    place = batch * index_q.stride_b + group * index_q.stride_h + token * index_q.stride_s
    d = tl.arange(0, C.depth).to(tl.int64)
    return tl.load(index_q.ptr + place[:, None] + d[None, :] * index_q.stride_d, mask=live[:, None], other=0.0)
