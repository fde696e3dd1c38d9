"""A GPT around MSAttention, of bytes by default, and how a mesh of processes shares it."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flexmsa import metrics
from flexmsa.checkpoint import save_selection_policy
from flexmsa.config import MSAConfig
from flexmsa.distributed import ContextParallel, SequenceShards, tensor_parallel_plan
from flexmsa.functional import select_blocks
from flexmsa.modules import MSAttention
from flexmsa.recipes.text import IGNORED

__all__ = ["GPT", "Block", "parallelize"]

BYTES = 256
# The newest queries of the longest document: enough for a mean, at a cost that is linear in its length.
MEASURED_QUERIES = 128


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, width] to the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm, with a residual connection."""

    def __init__(self, config: MSAConfig, mlp_size: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.attention = MSAttention(config)
        self.mlp = MLP(config.hidden_size, mlp_size)
        self.saves_selection_only = False

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None, shards: SequenceShards | None, index_loss_count: float | None
    ) -> tuple[Tensor, Tensor]:
        """Return the new x, and a 0 with the gradient of the index loss."""
        if not self.saves_selection_only:
            return self._run(x, cu_seqlens, shards, index_loss_count)
        contexts = partial(create_selective_checkpoint_contexts, save_selection_policy)
        return checkpoint(self._run, x, cu_seqlens, shards, index_loss_count, use_reentrant=False, context_fn=contexts)

    def _run(
        self, x: Tensor, cu_seqlens: Tensor | None, shards: SequenceShards | None, index_loss_count: float | None
    ) -> tuple[Tensor, Tensor]:
        sequences: dict[str, Any] = {"cu_seqlens": cu_seqlens, "shards": shards}
        attended, index_loss = self.attention(self.attention_norm(x), **sequences, index_loss_count=index_loss_count)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), index_loss

    @torch.no_grad()
    def measure(
        self, x: Tensor, cu_seqlens: Tensor | None, shards: SequenceShards | None, document: tuple[int, int]
    ) -> Tensor:
        """[block recall, score recall] of the newest queries of a document, in the warm-up as if it selected.

        Under tensor parallel those of this process's heads.
        """
        (start, stop), config = document, self.attention.config
        assert config.topk is not None
        first = max(start, stop - MEASURED_QUERIES)
        positions = None if shards is None else shards.row_positions()
        q, k, _, index_q, index_k = self.attention.project(
            self.attention_norm(x), cu_seqlens=cu_seqlens, positions=positions
        )

        def newest(y: Tensor) -> Tensor:
            if shards is None:
                return y[:, :, first:stop]
            # Gathered without the other queries, which may take much memory.
            here = (shards.tokens >= first) & (shards.tokens < stop)
            found = y.new_zeros((*y.shape[:2], stop - first, y.shape[3]))
            found[:, :, shards.tokens[here] - first] = y[:, :, here]
            dist.all_reduce(found, group=shards.mesh.get_group())
            return found

        def keys(y: Tensor) -> Tensor:
            return (y if shards is None else shards.unshard(y, dim=2))[:, :, start:stop]

        q, k, index_q, index_k = newest(q), keys(k), newest(index_q), keys(index_k)
        head_shards = self.attention.head_shards
        if head_shards is not None and head_shards.replicas > 1:
            # A group's best blocks are those of all its heads.
            q = head_shards.whole_group(q)
        ids = select_blocks(index_q, index_k, block_size=config.block_size, topk=config.topk)
        return torch.stack(metrics.recall(q, k, ids, block_size=config.block_size))


class GPT(nn.Module):
    """Tokens in, the loss of the next tokens out; a token is a byte unless `vocabulary` says otherwise.

    >>> config = MSAConfig(32, 4, 2, head_dim=8, index_head_dim=8, block_size=4, topk=2, loss_in_backward=True)
    >>> ids = torch.zeros(1, 21, dtype=torch.int64)
    >>> loss, index_loss = GPT(config, num_layers=2, mlp_size=64)(ids[:, :-1], ids[:, 1:])
    >>> loss.shape, index_loss.shape
    (torch.Size([]), torch.Size([]))
    """

    def __init__(self, config: MSAConfig, num_layers: int, mlp_size: int, vocabulary: int = BYTES) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, config.hidden_size)
        # Any, because to a type checker a ModuleList contains bare modules.
        self.blocks: Any = nn.ModuleList(Block(config, mlp_size) for _ in range(num_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        self.head = nn.Linear(config.hidden_size, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Two such weights per layer add to the residual stream.
                writes = name.endswith(("o_proj.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 * (2 * num_layers) ** -0.5 if writes else 0.02)

    def forward(
        self,
        ids: Tensor,
        labels: Tensor,
        cu_seqlens: Tensor | None = None,
        shards: SequenceShards | None = None,
        index_loss_count: float | None = None,
        measured: tuple[int, int] | None = None,
    ) -> Any:
        """Score the token that follows each token.

        Args:
            ids, labels: [B, S] int64, with cu_seqlens or shards [1, S]; with shards, those of this process. Labels may
                be IGNORED.
            cu_seqlens: [documents + 1] int32, on the device; without shards, which know it.
            index_loss_count: by what the sums of the layers' index losses are divided.
            measured: start and stop of a document whose recalls are returned too.

        Returns:
            The sum of the cross-entropies, in nats; a 0 with the gradient of the sum of the layers' index losses; with
            `measured`, the recalls [layers, 2].
        """
        x, index_loss, *recalls = self.hidden(ids, cu_seqlens, shards, index_loss_count, measured)
        return self.score(x, labels), index_loss, *recalls

    def hidden(
        self,
        ids: Tensor,
        cu_seqlens: Tensor | None = None,
        shards: SequenceShards | None = None,
        index_loss_count: float | None = None,
        measured: tuple[int, int] | None = None,
    ) -> Any:
        """Return the last block's output [B, S, width], and what `forward` returns beside the cross-entropies."""
        # A copy, since a collective's result is of a class of its own, for which the blocks would be compiled again.
        x = self.embedding(ids).clone()
        total, recalls = 0, []
        for block in self.blocks:
            if measured is not None:
                recalls.append(block.measure(x, cu_seqlens, shards, measured))
            x, index_loss = block(x, cu_seqlens, shards, index_loss_count)
            total = total + index_loss
        return (x, total) if measured is None else (x, total, torch.stack(recalls))

    def score(self, x: Tensor, labels: Tensor, reduction: str = "sum") -> Tensor:
        """Return the cross-entropies in nats: their sum, or with the reduction "none" each of them, [B * S]."""
        scores = self.head(self.norm(x)).flatten(0, 1)
        scores = scores.float() if scores.dtype.itemsize == 2 else scores
        return F.cross_entropy(scores, labels.flatten(), ignore_index=IGNORED, reduction=reduction)

    def set_topk(self, topk: int | None) -> None:
        """Switch the selection of every layer: None for the dense warm-up, an int for sparse."""
        for block in self.blocks:
            block.attention.topk = topk

    def index_losses(self) -> Tensor:
        """[layers] float32: the index losses that the last backward wrote."""
        return torch.stack([block.attention.index_loss_value for block in self.blocks])


def parallelize(
    model: GPT, mesh: DeviceMesh, cp: DeviceMesh | None, *, checkpointing: bool, compiled: bool, precision: torch.dtype
) -> None:
    """Share the model over processes, in place: heads, then tokens, then parameters.

    Args:
        mesh: of the dimensions "replicate", "shard" and "tp"; gradients are averaged over the first two.
        cp: the processes that share tokens; they are part of "shard".
        precision: of the computation, where it is not that of the parameters.
    """
    # Each mesh["tp"] is another object, for which blocks would be compiled again.
    tp, whole, tokens = mesh["tp"], Replicate(), Shard(1)
    if tp.size() > 1:
        head = ColwiseParallel(input_layouts=tokens, output_layouts=whole)
        embedding = RowwiseParallel(input_layouts=whole, output_layouts=tokens)
        parallelize_module(model, tp, {"embedding": embedding, "norm": SequenceParallel(), "head": head})
    policy = MixedPrecisionPolicy()
    if precision == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=torch.float32)
    dims: Any = ("replicate", "shard") if mesh["replicate"].size() > 1 else "shard"
    shard = partial(fully_shard, mesh=mesh[dims], mp_policy=policy)
    for block in model.blocks:
        if tp.size() > 1:
            plan = {
                **{"attention_norm": SequenceParallel(), "mlp_norm": SequenceParallel()},
                "attention": tensor_parallel_plan(block.attention, sequence_parallel=True),
                "mlp": PrepareModuleInput(input_layouts=tokens, desired_input_layouts=whole),
                **{"mlp.gate": ColwiseParallel(), "mlp.up": ColwiseParallel()},
                "mlp.down": RowwiseParallel(output_layouts=tokens),
            }
            parallelize_module(block, tp, plan)
        if cp is not None:
            parallelize_module(block.attention, cp, ContextParallel())
        block.saves_selection_only = checkpointing
        if compiled:
            # Not the block's call, in which FSDP's hooks run.
            block.forward = torch.compile(block.forward, fullgraph=True)
        shard(block)
        register_fsdp_forward_method(block, "measure")
    shard(model)
