"""Train on documents that are packed along the sequence, in micro-batches: `python docs/examples/packed_training.py`.

Packed documents have the selection and the output that they have alone. The index loss is a mean over the groups and
queries of a call; over micro-batches of unequal lengths, it is the mean over all of them only if it is divided by their
common count.
"""

import itertools

import torch
from torch import Tensor, nn

from flexmsa import MSAConfig, MSAttention

CONFIG = MSAConfig(hidden_size=64, num_heads=4, num_kv_heads=2, head_dim=16, index_head_dim=16, block_size=16, topk=3)
# Offsets of the documents in each micro-batch.
MICRO_BATCHES = [(0, 200, 230, 500), (0, 90, 300)]


def layer_losses(layer: MSAttention, x: Tensor, cu_seqlens: Tensor, count: Tensor | float) -> Tensor:
    """The loss of a micro-batch: here the output's size stands for a language model's loss."""
    out, index_loss = layer(x, cu_seqlens=cu_seqlens, index_loss_count=count)
    assert index_loss is not None
    return out.square().sum() / 800 + index_loss


def step(layer: MSAttention, data: list[Tensor]) -> None:
    offsets = [torch.tensor(documents, dtype=torch.int32) for documents in MICRO_BATCHES]
    counts = [layer.index_loss_count(x, cu_seqlens=seqlens) for x, seqlens in zip(data, offsets, strict=True)]
    total = torch.stack(counts).sum()
    for x, cu_seqlens in zip(data, offsets, strict=True):
        layer_losses(layer, x, cu_seqlens, total).backward()


def main() -> None:
    torch.manual_seed(0)
    layer, data = MSAttention(CONFIG), [torch.randn(1, documents[-1], 64) for documents in MICRO_BATCHES]
    step(layer, data)
    packed = [p.grad.clone() for p in layer.parameters()]

    # The same, document by document.
    layer.zero_grad()
    documents = [
        x[:, first:last]
        for x, offsets in zip(data, MICRO_BATCHES, strict=True)
        for first, last in itertools.pairwise(offsets)
    ]
    total = sum(layer.index_loss_count(x) for x in documents)
    for x in documents:
        layer_losses(layer, x, torch.tensor([0, x.shape[1]], dtype=torch.int32), total).backward()
    worst = max(float((a - p.grad).abs().max()) for a, p in zip(packed, layer.parameters(), strict=True))
    print(f"gradients of {len(documents)} documents, packed and alone, differ by {worst:.1e} at most")
    assert worst < 1e-4
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)


if __name__ == "__main__":
    main()
