"""Blocks of your own choice, by the library's kernels: `python docs/examples/custom_selection.py`.

Each function returns block_indices [B, Hkv, Sq, topk], padded with -1, for `flexmsa.block_sparse_attention`,
`flexmsa.attention(block_indices=...)` or `layer(x, block_indices=...)`. docs/research.md has more.
"""

import torch
from torch import Tensor

import flexmsa
from flexmsa import AuxRequest, MSAConfig, MSAttention, metrics

BLOCK = 16


def recent_first(index_q: Tensor, index_k: Tensor, topk: int, bias: float) -> Tensor:
    """A recency bias, as one more number of the index vectors: each key's score is raised by bias * its position."""
    position = torch.arange(index_k.shape[2], dtype=index_k.dtype).view(1, 1, -1, 1) / index_k.shape[2]
    index_q = torch.cat([index_q, torch.full_like(index_q[..., :1], bias)], dim=-1)
    index_k = torch.cat([index_k, position.expand(index_k.shape[0], -1, -1, -1)], dim=-1)
    return flexmsa.select_blocks(index_q, index_k, block_size=BLOCK, topk=topk)


def mean_pooled(index_q: Tensor, k: Tensor, topk: int) -> Tensor:
    """Blocks by the score of their mean key, as MoBA has them; the query's own block is always among them."""
    seqlen = k.shape[2]
    mean = torch.nn.functional.pad(k, (0, 0, 0, -seqlen % BLOCK)).unflatten(2, (-1, BLOCK)).mean(3)
    scores = torch.einsum("bhsd,bhnd->bhsn", index_q, mean)
    own = torch.arange(seqlen)[:, None] // BLOCK
    block = torch.arange(mean.shape[2])
    scores = scores.masked_fill(block > own, -torch.inf).masked_fill(block == own, torch.inf)
    best = scores.topk(min(topk, mean.shape[2]), dim=-1)
    return best.indices.masked_fill(best.values == -torch.inf, -1).int()


def top_p(index_q: Tensor, index_k: Tensor, most: int, p: float) -> Tensor:
    """As few of the best blocks as have the share p of the weight of `most` blocks; the others become -1."""
    ids, scores = flexmsa.select_blocks(index_q, index_k, block_size=BLOCK, topk=most, return_scores=True)
    weight = (scores * index_q.shape[-1] ** -0.5).softmax(-1)
    weight, order = weight.sort(dim=-1, descending=True)
    kept = weight.cumsum(-1) - weight < p
    own = torch.arange(ids.shape[2])[:, None] // BLOCK
    ids = ids.gather(-1, order)
    return ids.masked_fill(~kept & (ids != own), -1)


def main() -> None:
    torch.manual_seed(0)
    layer = MSAttention(MSAConfig(64, num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=16, block_size=BLOCK))
    x = torch.randn(1, 400, 64)
    q, k, v, index_q, index_k = layer.project(x)
    selections = {
        "index branch": flexmsa.select_blocks(index_q, index_k, block_size=BLOCK, topk=4),
        "recency bias": recent_first(index_q, index_k, 4, bias=8.0),
        "mean pooling": mean_pooled(q.unflatten(1, (2, -1)).mean(2), k, 4),
        "top-p": top_p(index_q, index_k, 8, p=0.7),
        "window and sink": metrics.window_blocks(q, k, block_size=BLOCK, topk=4, num_init_blocks=1),
    }
    exact = flexmsa.block_sparse_attention(q, k, v, None, block_size=BLOCK)
    for name, found in metrics.recalls(q, k, selections, block_size=BLOCK).items():
        ids = selections[name]
        with torch.no_grad():
            out = flexmsa.block_sparse_attention(q, k, v, ids, block_size=BLOCK)
            error = float((out - exact).norm() / exact.norm())
        blocks = float((ids >= 0).sum(-1).float().mean())
        print(f"{name:16} {blocks:.1f} blocks, score recall {found.score:.2f}, output off by {error:.2f}")

    # In training, with the index loss over the blocks that you chose.
    out, index_loss = layer(x, block_indices=selections["mean pooling"])
    assert index_loss is not None
    (out.square().mean() + index_loss).backward()

    # A learned sink: a key with score `sink` and no value, through the lse.
    sink = torch.zeros(4, requires_grad=True)
    ids, wanted = selections["index branch"], AuxRequest(lse=True)
    out, aux = flexmsa.block_sparse_attention(
        *(y.detach() for y in (q, k, v)), ids, block_size=BLOCK, return_aux=wanted
    )
    assert aux.lse is not None
    out = out * torch.sigmoid(aux.lse - sink[:, None])[..., None]
    out.square().mean().backward()
    print("gradient of the sinks:", [round(g, 4) for g in sink.grad.tolist()])


if __name__ == "__main__":
    main()
