"""Context parallel: each process has some queries of every document, and gathers all keys."""

from typing import Any, Unpack, overload

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from flexmsa import _core, _loss, ops, validation
from flexmsa._sequences import Sequences
from flexmsa._settings import checked_settings
from flexmsa.distributed.gather import begin_to_gather, finish_gathering
from flexmsa.distributed.shards import SequenceShards
from flexmsa.types import AuxOutput, AuxRequest, ShardedAttentionOptions

__all__ = ["ContextParallel", "context_parallel_attention"]


class ContextParallel(ParallelStyle):
    """For `parallelize_module(layer, mesh, ContextParallel())`: the layer is only called with shards of this mesh.

    The layer's parameters stay whole on each process; average their gradients over the mesh, as
    DistributedDataParallel and `fully_shard` do. A call without shards would take a part as the whole sequence: it
    raises.

    >>> parallelize_module(layer, mesh["cp"], ContextParallel())  # doctest: +SKIP
    >>> out, index_loss = layer(shards.shard(x), shards=shards)  # doctest: +SKIP
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def check(_: nn.Module, __: Any, settings: dict[str, Any]) -> None:
            shards = settings.get("shards")
            if not isinstance(shards, SequenceShards) or shards.mesh != device_mesh:
                got = "shards of another mesh" if isinstance(shards, SequenceShards) else repr(shards)
                raise ValueError(f"shards: expected SequenceShards of the mesh of ContextParallel, got {got}")

        module.register_forward_pre_hook(check, with_kwargs=True)
        return module


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    shards: SequenceShards,
    *,
    return_aux: None = None,
    **options: Unpack[ShardedAttentionOptions],
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    shards: SequenceShards,
    *,
    return_aux: AuxRequest,
    **options: Unpack[ShardedAttentionOptions],
) -> tuple[Tensor, AuxOutput]: ...
@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    shards: SequenceShards,
    *,
    return_aux: AuxRequest | None,
    **options: Unpack[ShardedAttentionOptions],
) -> Tensor | tuple[Tensor, AuxOutput]: ...
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    shards: SequenceShards,
    *,
    block_size: int = 128,
    topk: int | None = 16,
    num_local_blocks: int = 1,
    num_init_blocks: int = 0,
    scale: float | None = None,
    index_scale: float | None = None,
    kv_starts: Tensor | None = None,
    backend: str | None = None,
    return_aux: AuxRequest | None = None,
    index_loss_count: Tensor | float | None = None,
    index_loss_value: Tensor | None = None,
) -> Tensor | tuple[Tensor, AuxOutput]:
    """`flexmsa.attention` of sequences that are cut over processes, exactly: the same ids and out as on one process.

    index_k is gathered first, and the blocks are selected while k and v arrive. The gradients of all processes are
    added in float32, in the order of ranks.

    Args:
        q, k, v, index_q, index_k: this process's tokens, [B, heads, L, D], in the order of `shards.tokens`.
        shards: how the sequences are cut.
        kv_starts: [B] int32, on the tensors' device: row b starts at token kv_starts[b] of the whole row.
        index_loss_count: by what the sum of this process's losses is divided; default:
            `shards.index_loss_count(Hkv, kv_starts)`. Counts of micro-batches add up.
        Others: as for `flexmsa.attention`.

    Returns:
        As `flexmsa.attention`, for this process's queries; padding gives 0. The index loss is W times this process's
        part of the mean over all queries, W being the number of processes: their average is the mean, and so are
        gradients that DistributedDataParallel or `fully_shard` average over them.

    Raises:
        ValueError, TypeError: an argument is not as described.

    >>> out = context_parallel_attention(*map(shards.shard, tensors), shards)  # doctest: +SKIP
    """
    branches, rule = (q, k, v, index_q, index_k), (block_size, topk, num_local_blocks, num_init_blocks)
    settings = checked_settings(*branches, *rule, scale, index_scale, backend)
    if q.shape[0] != shards.batch_size or q.shape[2] != shards.length or k.shape[2] != shards.length:
        raise ValueError(
            f"q, k: expected {shards.batch_size} rows of {shards.length} tokens, as shards.shard returns them, got "
            f"{list(q.shape)}, {list(k.shape)}"
        )
    aux = validation.check_aux(return_aux)
    _loss.check_value(index_loss_value, aux, q)
    sequences = _with_starts(shards, kv_starts, q)
    count = _loss.check_count("index_loss_count", index_loss_count, q)
    if count is None and aux.any_loss:
        count = shards.index_loss_count(k.shape[1], kv_starts)
    q, k, v, index_q, index_k = ops.cast_to_autocast(q, k, v, index_q, index_k)
    # k and v in one exchange: a second one would wait until selection leaves it a multiprocessor.
    pending = [begin_to_gather(tensors, shards) for tensors in ([index_k], [k, v])]
    (index_k,) = finish_gathering([index_k], pending[0], shards)
    ids = None
    if settings.rule is not None:
        ids = _core.select_blocks(index_q, index_k, sequences, settings.rule, backend)
    k, v = finish_gathering([k, v], pending[1], shards)
    loss = {"loss_value": index_loss_value, "loss_count": count}
    out, found = _core.attention(q, k, v, index_q, index_k, sequences, settings, aux, ids, **loss)
    return out if return_aux is None else (out, found)


def _with_starts(shards: SequenceShards, kv_starts: Tensor | None, q: Tensor) -> Sequences:
    """The sequences of rows that start at kv_starts."""
    shards.check_starts(kv_starts)
    if kv_starts is None:
        return Sequences(q, shards.seqlen, table=shards.fragments, ranges=shards.ranges)
    validation.check_lengths("kv_starts", kv_starts, q.device)
    if kv_starts.shape != (shards.batch_size,):
        raise ValueError(f"kv_starts: expected [{shards.batch_size}], got {list(kv_starts.shape)}")
    # Of whole rows, with the checks that they have on one process.
    starts = ops.sequence_table(q, None, kv_starts, None, shards.seqlen)[:, 3]
    batch, q_start, q_end, k_start, k_end = shards.fragments.unbind(-1)
    k_start = torch.maximum(k_start, starts[batch.long()])
    table = torch.stack([batch, q_start, q_end, k_start, torch.maximum(k_end, k_start)], dim=-1)
    return Sequences.from_table(q, shards.seqlen, table)
