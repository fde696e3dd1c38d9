"""A selection by int8 index keys whose ids are certified to be those of 16 bits: its definition in plain PyTorch.

The bounds are derived in docs/math.md, and docs/notes/selection-8-bits.md says what came of it. `measure` counts the
blocks that have to be scored again; `benchmarks/selection_8_bits_keys.py` runs it on models and on drawn keys.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Numbers outside this range might overflow or vanish in fp32: such vectors get no bound.
LARGEST, SMALLEST = 2.0**40, 2.0**-40
# Of a norm: rounding in the rotation and in the residual of the quantisation.
ROUNDED = 2.0**-14
# Of the product of two norms: rounding of an fp32 product of up to 256 numbers, in any order, and of the bound itself.
SUMMED = 2.0**-12
# Of a sum of a few fp32 numbers.
SLACK = 1 + 2.0**-10
# How far the exact threshold may be from the rough one, in bounds over the root of the dims: an error is a sum of
# products of either sign, so most are so much smaller than their bounds. Too small a number marks more rows, and makes
# none wrong.
DOUBT = 2.0


class Vectors(NamedTuple):
    """Rotated vectors in int8: numbers [..., n, D]; scale, error and norm [..., n].

    error: at least the distance of scale * numbers from the rotated vector; norm: at least its norm; growth: the factor
    by which the rotation of both sides changes a score.
    """

    numbers: Tensor
    scale: Tensor
    error: Tensor
    norm: Tensor
    growth: float


class Rough(NamedTuple):
    """Scores of blocks from int8, and how far they may be from those of 16 bits, [..., rows, blocks]."""

    score: Tensor
    bound: Tensor


class Choice(NamedTuple):
    """What is known of a row from rough scores, [..., rows, blocks] and [..., rows].

    sure: blocks that are selected; again: blocks to score again; low and high: what a score again has to be, at least
    of the last block selected and at most of the first one left out, for the row to be certified.
    """

    sure: Tensor
    again: Tensor
    low: Tensor
    high: Tensor


def padded_dim(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def rotate(x: Tensor) -> Tensor:
    """A Hadamard matrix times vectors [..., D], fp32, padded to a power of two; scores grow by `growth(D)`."""
    size = padded_dim(x.shape[-1])
    x = torch.nn.functional.pad(x.float(), (0, size - x.shape[-1]))
    step = 1
    while step < size:
        upper, lower = x.unflatten(-1, (-1, 2, step)).unbind(-2)
        x = torch.stack((upper + lower, upper - lower), -2).flatten(-3)
        step *= 2
    return x * 2.0 ** -(int(math.log2(size)) // 2)


def growth(size: int) -> float:
    """The factor by which `rotate` changes scores, 1 or 2: a power of two, so that it changes no order and no bit."""
    return padded_dim(size) / 4.0 ** (int(math.log2(padded_dim(size))) // 2)


def quantise(x: Tensor, block_size: int = 1, rotated: bool = True) -> Vectors:
    """Vectors [..., n, D] in int8, with one scale for each block_size of them."""
    factor = growth(x.shape[-1]) if rotated else 1.0
    x = rotate(x) if rotated else x.float()
    largest = x.abs().amax(-1)
    tame = (largest == 0) | ((largest >= SMALLEST) & (largest <= LARGEST))
    x = torch.where(tame[..., None], x, 0.0)
    shared = torch.where(tame, largest, 0.0).unflatten(-1, (-1, block_size)).amax(-1).repeat_interleave(block_size, -1)
    # A block of zeros: any scale.
    scale = torch.where(shared == 0, 1.0, shared / 127)
    numbers = (x / scale[..., None]).round().clamp(-127, 127)
    norm = x.norm(dim=-1)
    error = (x - numbers * scale[..., None]).norm(dim=-1) * SLACK + norm * ROUNDED
    error, norm = (torch.where(tame, bound, torch.inf) for bound in (error, norm * SLACK))
    return Vectors(numbers.to(torch.int8), scale, error, norm, factor)


def rough_scores(q: Vectors, k: Vectors, block_size: int) -> Rough:
    """Of queries q [..., rows, D] and keys k [..., n, D]; n is a multiple of block_size.

    Sums of products of int8 numbers are below 2^24, so fp32 holds them exactly.
    """
    sums = q.numbers.float() @ k.numbers.float().mT
    score = (sums * k.scale[..., None, :]).unflatten(-1, (-1, block_size)).amax(-1) * (q.scale[..., None] / k.growth)
    error, norm = (x.unflatten(-1, (-1, block_size)).amax(-1)[..., None, :] for x in (k.error, k.norm))
    reach, own_error, own_norm = (x[..., None] for x in (q.norm + q.error, q.error, q.norm))
    bound = (reach * error + own_error * norm) * SLACK + own_norm * norm * SUMMED
    return Rough(score, (bound / k.growth).nan_to_num(nan=torch.inf))


def best_of(scores: Tensor, count: int) -> Tensor:
    """[..., rows, 1]: the count-th best score of each row, -inf where there are fewer."""
    count = min(count, scores.shape[-1])
    return scores.topk(count, -1).values[..., -1:] if count else scores.new_full((*scores.shape[:-1], 1), torch.inf)


def choose(rough: Rough, visible: Tensor, count: int, size: int) -> Choice:
    """Which of the visible blocks [..., rows, blocks] to score again for the `count` best; size: dims of a vector."""
    score = rough.score.masked_fill(~visible, -torch.inf)
    threshold = best_of(score, count)
    doubt = DOUBT * size**-0.5
    margin = doubt * rough.bound.masked_fill(~visible, 0.0).nan_to_num(posinf=0.0).amax(-1, keepdim=True)
    low, high = threshold - margin, threshold + margin
    sure = visible & (score - rough.bound > high)
    again = visible & ~sure & ~(score + rough.bound < low)
    return Choice(sure, again, low[..., 0], high[..., 0])


def certify(choice: Choice, exact: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(selected [..., rows, blocks], certified [..., rows]) from scores of 16 bits, read where they were made again.

    The smaller id wins a tie, as in flexmsa's selection.
    """
    scores = exact.masked_fill(~choice.again, -torch.inf)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1]).expand_as(order))
    room = count - choice.sure.sum(-1, keepdim=True)
    taken = choice.again & (rank < room)
    full = taken.sum(-1) == room[..., 0]
    # A row without a threshold sees no more blocks than it selects, and all of them are sure.
    complete = (choice.low == -torch.inf) | (room[..., 0] >= 0) & full
    last = scores.masked_fill(~taken, torch.inf).amin(-1)
    first_out = scores.masked_fill(taken, -torch.inf).amax(-1)
    return choice.sure | taken, complete & (last >= choice.low) & (first_out <= choice.high)


def exact_scores(q: Tensor, k: Tensor, block_size: int) -> Tensor:
    """Scores of blocks in fp64, as flexmsa defines them: NaN is the lowest, all are finite."""
    return block_maxima(q.double() @ k.double().mT, block_size)


def block_maxima(scores: Tensor, block_size: int) -> Tensor:
    """Scores of blocks from those of keys [..., n]."""
    largest = torch.finfo(scores.dtype).max
    return scores.nan_to_num(-largest, largest, -largest).unflatten(-1, (-1, block_size)).amax(-1)


def visible_blocks(rows: int, num_keys: int, block_size: int) -> Tensor:
    """[rows, blocks]: the blocks before a row's newest one, which is forced; the rows are the last tokens."""
    own = torch.arange(num_keys - rows, num_keys) // block_size
    return torch.arange(-(-num_keys // block_size)) < own[:, None]


def pad_keys(k: Tensor, block_size: int) -> Tensor:
    """index_k [n, D] with zeros behind, up to a whole block, which is forced for all rows that see a part of it."""
    return torch.nn.functional.pad(k, (0, 0, 0, -k.shape[0] % block_size))


def e4m3_keys(k: Tensor) -> Tensor:
    """Keys [n, D] as a cache in e4m3 holds them: a power of two for each brings its largest number to at most 448."""
    scale = torch.exp2((k.double().abs().amax(-1, keepdim=True) / 448).log2().ceil()).clamp(min=2.0**-126)
    return (k.double() / scale).float().to(torch.float8_e4m3fn).double() * scale


def share_that_differs(score: Tensor, best: Tensor) -> Tensor:
    """[rows]: of the best blocks [rows, count], those that are not the best by rough scores [rows, blocks]."""
    ids = score.sort(dim=-1, descending=True, stable=True).indices[..., : best.shape[-1]]
    return (~(ids[..., None] == best[..., None, :]).any(-1)).float().mean(-1)


def counts(q: Tensor, k: Tensor, visible: Tensor, exact: Tensor, count: int, shared: int, rotated: bool) -> dict:
    """What each row of q [rows, D] needs of blocks [rows, blocks]; shared: keys with one scale."""
    block_size = k.shape[0] // exact.shape[-1]
    rough = rough_scores(quantise(q, rotated=rotated), quantise(k, shared, rotated), block_size)
    score, true = (x.masked_fill(~visible, -torch.inf) for x in (rough.score, exact))
    upper = score + rough.bound
    found: dict = {"candidates": (visible & (upper >= best_of(score - rough.bound, count))).sum(-1)}
    for limit in (32, 64):
        kept = min(limit, upper.shape[-1] - 1)
        order = upper.argsort(-1, descending=True)
        last = best_of(true.gather(-1, order[..., :kept]), count)[..., 0]
        found[f"certified by {limit}"] = last > upper.gather(-1, order[..., kept : kept + 1])[..., 0]
    choice = choose(rough, visible, count, k.shape[1])
    selected, certified = certify(choice, exact, count)
    # Equal keys are frequent without RoPE, and of equal scores the smaller id is better.
    best = true.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    assert bool(selected.gather(-1, best)[certified].all()), "a certified row is wrong"
    found |= {"again": choice.again.sum(-1), "sure": choice.sure.sum(-1), "certified": certified}
    differ = {
        "ids that differ in int8 alone": share_that_differs(score, best),
        "ids that differ in e4m3": share_that_differs(
            exact_scores(q, e4m3_keys(k), block_size).masked_fill(~visible, -torch.inf), best
        ),
    }
    return found | differ | {"error": (score - true)[visible].abs()}


def measure(q: Tensor, k: Tensor, block_size: int, topk: int) -> list[dict]:
    """Rows of a table: index_q [G, rows, D] of the last tokens of index_k [n, D]; the newest block is forced."""
    visible = visible_blocks(q.shape[1], k.shape[0], block_size).repeat(q.shape[0], 1)
    q, k = q.flatten(0, 1), pad_keys(k, block_size)
    exact = exact_scores(q, k, block_size)
    rows = []
    for name, shared, rotated in (("token", 1, True), ("block", block_size, True), ("token, not rotated", 1, False)):
        found = counts(q, k, visible, exact, topk - 1, shared, rotated)
        row: dict = {"scale per": name, "blocks": visible.shape[1]}
        for key in ("candidates", "again", "sure"):
            x = found[key].double()
            row[key] = {"mean": x.mean().item(), "99 %": x.quantile(0.99).item(), "most": x.max().item()}
        shares = "ids that differ in int8 alone", "ids that differ in e4m3"
        for key in ("certified by 32", "certified by 64", "certified", *shares):
            row[key] = found[key].double().mean().item()
        row["marked with room for 64"] = ((found["again"] > 64) | ~found["certified"]).double().mean().item()
        rows.append(row)
    return rows
