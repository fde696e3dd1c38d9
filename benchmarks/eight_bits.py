"""The effect of 8-bit index keys on the selection: `python -m benchmarks.eight_bits`.

Queries and keys are normal numbers at M3's shape; the last queries of a sequence select. Selections in e4m3 and int8
are compared with those in bf16: from caches, and of queries and keys cast directly to e4m3. Writes
benchmarks/results/eight_bits.json.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

import flexmsa
from flexmsa.kernels import torch as kernels
from flexmsa.kernels.rules import SelectionRule
from flexmsa.kernels.torch import int8

GROUPS, DEPTH, BLOCK, TOPK = 4, 128, 128, 16
LENGTHS = (8192, 32768, 131072)
QUERIES = 256
E4M3 = torch.float8_e4m3fn
RESULTS = Path(__file__).parent / "results" / "eight_bits.json"


def cache_of(index_k: Tensor, index_dtype: torch.dtype) -> flexmsa.MSACache:
    """A cache that holds index_k [1, 1, S, Di]."""
    cache = flexmsa.MSACache(1, 1, DEPTH, DEPTH, index_k.shape[2], dtype=index_k.dtype, index_dtype=index_dtype)
    cache.append(index_k, index_k, index_k)
    return cache


def select_from(cache: flexmsa.MSACache, index_q: Tensor) -> Tensor:
    """The ids that the last queries of a cache's sequence select."""
    rule, sequences = SelectionRule(BLOCK, TOPK), cache.newest(index_q.shape[2])
    return kernels.select_blocks(index_q, cache.index_k, sequences, rule, None, cache.index_k_scale)


def token_scores(index_q: Tensor, index_k: Tensor) -> Tensor:
    """[groups, queries, S]: -inf where a query does not see a key."""
    scores = index_q.float()[0] @ index_k.float()[0].transpose(-1, -2)
    seqlen = index_k.shape[2]
    newest = torch.arange(seqlen - index_q.shape[2], seqlen)
    return scores.masked_fill_(torch.arange(seqlen) > newest[:, None], -torch.inf)


def mass(scores: Tensor, ids: Tensor) -> Tensor:
    """[groups, queries]: the softmax mass of the index scores, scaled as in the loss, in the chosen blocks."""
    block_mass = (scores * DEPTH**-0.5).softmax(-1).unflatten(-1, (-1, BLOCK)).sum(-1)
    chosen = ids[0].long()
    return block_mass.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0).sum(-1)


def relative_error(scores: Tensor, exact: Tensor) -> float:
    """The root mean square of the errors of block scores, in standard deviations of the scores."""
    best, right = (x.unflatten(-1, (-1, BLOCK)).amax(-1) for x in (scores, exact))
    seen = right > -torch.inf
    return ((best - right)[seen].square().mean().sqrt() / right[seen].std()).item()


def measure(seqlen: int) -> list[dict]:
    """Rows of the table."""
    generator = torch.Generator().manual_seed(0)
    index_q = torch.randn(1, GROUPS, QUERIES, DEPTH, generator=generator).bfloat16()
    index_k = torch.randn(1, 1, seqlen, DEPTH, generator=generator).bfloat16()
    exact, plain = token_scores(index_q, index_k), select_from(cache_of(index_k, torch.bfloat16), index_q)
    e4m3, int8_keys = cache_of(index_k, E4M3), cache_of(index_k, torch.int8)
    numbers, scale = int8.quantize(index_q)
    cast = index_q.to(E4M3), index_k.to(E4M3)
    # The ids, and the vectors whose products they come from.
    found = {
        "keys in e4m3": (select_from(e4m3, index_q), index_q, e4m3.contiguous()[2]),
        "keys in int8": (select_from(int8_keys, index_q), numbers * scale[..., None], int8_keys.contiguous()[2]),
        "queries and keys in e4m3": (flexmsa.select_blocks(*cast, block_size=BLOCK, topk=TOPK), *cast),
    }
    rows = []
    for name, (ids, q, k) in found.items():
        kept = (ids[..., None] == plain[..., None, :]).any(-1)
        row = {"seqlen": seqlen, "in 8 bits": name, "score_error": relative_error(token_scores(q, k), exact)}
        # The local block is forced in both, so it cannot differ.
        row["ids_that_differ"] = (~kept).sum().item() / (kept.numel() - kept.numel() // TOPK)
        row["score_recall"] = (mass(exact, ids) / mass(exact, plain)).mean().item()
        rows.append(row)
    return rows


def main() -> int:
    rows = []
    for seqlen in LENGTHS:
        for row in measure(seqlen):
            rows.append(row)
            print(
                f"{seqlen} keys, {row['in 8 bits']}: {row['ids_that_differ']:.1%} ids differ, block scores off by "
                f"{row['score_error']:.1%}, score recall {row['score_recall']:.4f}",
                flush=True,
            )
    RESULTS.write_text(json.dumps({"queries": QUERIES, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
