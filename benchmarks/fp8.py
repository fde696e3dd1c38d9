"""The effect of e4m3 index keys on the selection: `python -m benchmarks.fp8`. Writes benchmarks/results/fp8.json.

Queries and keys are normal numbers at M3's shape; the last queries of a sequence select. Selections in e4m3 are
compared with those in bf16: for keys with one scale per token, as in a cache, and for queries and keys cast directly.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

import flexmsa

GROUPS, DEPTH, BLOCK, TOPK = 4, 128, 128, 16
LENGTHS = (8192, 32768, 131072)
QUERIES = 256
RESULTS = Path(__file__).parent / "results" / "fp8.json"


def quantised(index_k: Tensor) -> Tensor:
    """index_k [1, 1, S, Di] after storage in an e4m3 cache, float32."""
    seqlen = index_k.shape[2]
    cache = flexmsa.MSACache(1, 1, DEPTH, DEPTH, seqlen, dtype=index_k.dtype, index_dtype=torch.float8_e4m3fn)
    cache.append(index_k, index_k, index_k)
    return cache.contiguous()[2]


def selection(index_q: Tensor, index_k: Tensor) -> Tensor:
    return flexmsa.select_blocks(index_q.float(), index_k.float(), block_size=BLOCK, topk=TOPK)


def mass(index_q: Tensor, index_k: Tensor, ids: Tensor) -> Tensor:
    """[groups, queries]: the softmax mass of the index scores, scaled as in the loss, in the chosen blocks."""
    scores = index_q.float()[0] @ index_k.float()[0].transpose(-1, -2) * DEPTH**-0.5
    seqlen = index_k.shape[2]
    newest = torch.arange(seqlen - index_q.shape[2], seqlen)
    scores.masked_fill_(torch.arange(seqlen) > newest[:, None], -torch.inf)
    block_mass = scores.softmax(-1).unflatten(-1, (-1, BLOCK)).sum(-1)
    chosen = ids[0].long()
    return block_mass.gather(-1, chosen.clamp(min=0)).masked_fill(chosen < 0, 0.0).sum(-1)


def measure(seqlen: int) -> list[dict]:
    """Rows of the table."""
    generator = torch.Generator().manual_seed(0)
    index_q = torch.randn(1, GROUPS, QUERIES, DEPTH, generator=generator).bfloat16()
    index_k = torch.randn(1, 1, seqlen, DEPTH, generator=generator).bfloat16()
    plain = selection(index_q, index_k)
    rows = []
    for name, coarse in {
        "keys": selection(index_q, quantised(index_k)),
        "queries and keys": selection(*(x.to(torch.float8_e4m3fn) for x in (index_q, index_k))),
    }.items():
        kept = (coarse[..., None] == plain[..., None, :]).any(-1)
        # The local block is forced in both, so it cannot differ.
        differ = (~kept).sum().item() / (kept.numel() - kept.numel() // TOPK)
        recall = (mass(index_q, index_k, coarse) / mass(index_q, index_k, plain)).mean().item()
        rows.append({"seqlen": seqlen, "in e4m3": name, "ids_that_differ": differ, "score_recall": recall})
    return rows


def main() -> int:
    rows = []
    for seqlen in LENGTHS:
        for row in measure(seqlen):
            rows.append(row)
            print(
                f"{seqlen} keys, {row['in e4m3']} in e4m3: {row['ids_that_differ']:.1%} ids differ, score recall "
                f"{row['score_recall']:.4f}"
            )
    RESULTS.write_text(json.dumps({"queries": QUERIES, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
