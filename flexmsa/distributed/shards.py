"""Which tokens of a sequence each process of context parallel has, and how tensors are cut and put together."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexmsa import ops, validation
from flexmsa.distributed.gather import gather_tokens
from flexmsa.distributed.mesh import check_mesh

__all__ = ["SequenceShards"]


class SequenceShards:
    """A cut of sequences over the processes of a mesh, made on the host once per batch shape.

    With the layout "head-tail" each document is cut into 2 W parts, W being the number of processes, and process r has
    parts r and 2 W - 1 - r: later queries see more keys, and in this way all processes have the same work. If lengths
    do not divide, these pairs of parts differ by a token or two, and the larger ones go to the processes that have
    fewer tokens of earlier documents. With "contiguous" process r has the r-th of W parts of the whole row. Processes
    with fewer tokens than others are padded at the end.

    Args:
        seqlen: S, the tokens of a row of the whole batch.
        mesh: one-dimensional, of the processes that share the sequences.
        batch_size: B, rows that are all cut alike.
        cu_seqlens: [documents + 1] int32, on a CPU, offsets of documents packed along S (B = 1).
        layout: "head-tail" or "contiguous".
        length_multiple: of which each process's number of tokens, with padding, is a multiple: for sequence parallel,
            or so that few lengths are compiled.
        device: of the tensors; default: the mesh's.

    Attributes:
        ranges: (start, stop) of this process's parts of the whole row, in order; None of packed documents.
        tokens: [L] int64, the places of this process's tokens in the whole row, -1 for padding.
        positions: [L] int64, their positions in their documents, for RoPE.

    Raises:
        ValueError: an argument is not as described.

    >>> shards = SequenceShards(8, mesh)  # doctest: +SKIP
    >>> shards.tokens  # doctest: +SKIP
    tensor([0, 1, 6, 7])
    """

    def __init__(
        self,
        seqlen: int,
        mesh: DeviceMesh,
        *,
        batch_size: int = 1,
        cu_seqlens: Tensor | None = None,
        layout: Literal["head-tail", "contiguous"] = "head-tail",
        length_multiple: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        check_mesh(mesh)
        for name, value in {"seqlen": seqlen, "batch_size": batch_size, "length_multiple": length_multiple}.items():
            validation.check_int(name, value, 1)
        if layout not in ("head-tail", "contiguous"):
            raise ValueError(f'layout: expected "head-tail" or "contiguous", got {layout!r}')
        offsets = [0, seqlen] if cu_seqlens is None else _offsets(cu_seqlens, seqlen, batch_size)
        self.seqlen, self.batch_size, self.mesh, self.is_packed = seqlen, batch_size, mesh, cu_seqlens is not None
        world, rank = mesh.size(), mesh.get_local_rank()
        parts = _parts(offsets, world, layout)
        self.ranges = None if self.is_packed else parts[rank][0]
        lengths = [sum(stop - start for document in found for start, stop in document) for found in parts]
        self.length = -(-max(lengths) // length_multiple) * length_multiple
        self.is_padded = self.length * world > seqlen
        # The tokens of all processes, one process after another.
        order = torch.full((world, self.length), -1)
        for row, length, found in zip(order, lengths, parts, strict=True):
            row[:length] = torch.cat([torch.arange(*part) for document in found for part in document])
        order, tokens = order.flatten(), order[rank]
        real = order >= 0
        places = torch.empty(seqlen, dtype=torch.int64)
        places[order[real]] = real.nonzero()[:, 0]
        device = torch.device(mesh.device_type) if device is None else torch.device(device)
        # Of the documents that begin at or before a token, the last one has it: those without tokens have none.
        bounds = torch.tensor(offsets)
        starts = bounds[torch.searchsorted(bounds, tokens, right=True) - 1]
        self.tokens, self.order, self.places = tokens.to(device), order.to(device), places.to(device)
        self.positions = torch.where(tokens < 0, 0, tokens - starts).to(device)
        # Checked here, once, and not in each layer.
        fragments = _fragments(parts[rank], offsets, self.length, seqlen, batch_size)
        self.fragments = ops.fragment_table(fragments, batch_size, self.length, seqlen).to(device)

    def row_positions(self, kv_starts: Tensor | None = None) -> Tensor:
        """[B, L] int64: positions of this process's tokens, counted from the rows' starts kv_starts [B] if given."""
        self.check_starts(kv_starts)
        positions = self.positions.expand(self.batch_size, -1)
        return positions if kv_starts is None else (positions - kv_starts[:, None]).clamp(min=0)

    def check_starts(self, kv_starts: Tensor | None) -> None:
        """Raise ValueError if rows of packed documents are to start later."""
        if kv_starts is not None and self.is_packed:
            raise ValueError("kv_starts: expected None with cu_seqlens, got both; either pack documents or pad rows")

    def index_loss_count(self, num_kv_heads: int, kv_starts: Tensor | None = None) -> Tensor:
        """The number of groups and queries of all processes that see a key, at least 1, divided by W: a scalar float64.

        By so much each process divides the sum of its index losses, for gradients that are averaged over processes.
        """
        self.check_starts(kv_starts)
        if kv_starts is None:
            queries = self.tokens.new_full((), self.seqlen * self.batch_size)
        else:
            queries = (self.seqlen - kv_starts.clamp(0, self.seqlen)).sum()
        return (queries * num_kv_heads).double().clamp(min=1) / self.mesh.size()

    def shard(self, x: Tensor, dim: int = 1, fill: float = 0) -> Tensor:
        """This process's part of x, which has S tokens along `dim`; padding is `fill` (-100 for labels).

        >>> shards.shard(input_ids)  # doctest: +SKIP
        """
        if x.shape[dim] != self.seqlen:
            raise ValueError(f"x: expected {self.seqlen} tokens along dimension {dim}, got {list(x.shape)}")
        part = x.index_select(dim, self.tokens.clamp(min=0).to(x.device))
        padding = (self.tokens < 0).to(x.device)
        shape = [1] * x.dim()
        shape[dim] = self.length
        return part.masked_fill(padding.view(shape), fill)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """The whole of which x is this process's part along `dim`, on every process; gradients go back.

        >>> shards.unshard(logits)  # doctest: +SKIP
        """
        if x.shape[dim] != self.length:
            raise ValueError(f"x: expected {self.length} tokens along dimension {dim}, got {list(x.shape)}")
        if x.dim() == 1:
            return gather_tokens([x[:, None]], self)[0][:, 0]
        return gather_tokens([x.movedim(dim, -2)], self)[0].movedim(-2, dim)


def _offsets(cu_seqlens: Tensor, seqlen: int, batch_size: int) -> list[int]:
    """The offsets of documents, checked."""
    if cu_seqlens.device.type != "cpu" or batch_size != 1:
        raise ValueError(f"cu_seqlens: expected on a CPU, for one row, got {cu_seqlens.device}, {batch_size} rows")
    offsets: list[int] = cu_seqlens.tolist()
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != seqlen or offsets != sorted(offsets):
        raise ValueError(f"cu_seqlens: expected offsets that rise from 0 to {seqlen}, got {offsets}")
    return offsets


def _parts(offsets: list[int], world: int, layout: str) -> list[list[list[tuple[int, int]]]]:
    """For each process, and each document, the parts (start, stop) that it has, in order."""
    if layout == "contiguous":
        bounds = [offsets[-1] * number // world for number in range(world + 1)]
        return [
            [[(min(max(start, begin), stop), max(min(stop, end), start))] for start, stop in pairwise(offsets)]
            for begin, end in pairwise(bounds)
        ]
    found: list[list[list[tuple[int, int]]]] = [[] for _ in range(world)]
    counts = [0] * world
    for start, stop in pairwise(offsets):
        cuts = [start + (stop - start) * number // (2 * world) for number in range(2 * world + 1)]
        parts = list(pairwise(cuts))
        pairs = [(parts[number], parts[-1 - number]) for number in range(world)]
        # The pairs of a document differ by a token or two: the largest go to the processes with the fewest tokens.
        pairs.sort(key=lambda pair: -sum(end - begin for begin, end in pair))
        for process, pair in zip(sorted(range(world), key=counts.__getitem__), pairs, strict=True):
            found[process].append(list(pair))
            counts[process] += sum(end - begin for begin, end in pair)
    return found


def _fragments(
    parts: list[list[tuple[int, int]]], offsets: list[int], length: int, seqlen: int, batch_size: int
) -> Tensor:
    """[documents, fragments, 5] int32 (see `flexmsa.kernels`): the local queries, and the whole row's keys."""
    rows = []
    for row in range(batch_size):
        query = 0
        for start, document in zip(offsets, parts, strict=False):
            found = []
            for first, stop in document:
                found.append([row, query, query + stop - first, start, stop if stop > first else start])
                query += stop - first
            rows.append(found)
        # Padding sees no key.
        padding = [query, *[length] * len(parts[0])]
        rows.append([[row, first, stop, seqlen, seqlen] for first, stop in pairwise(padding)])
    return torch.tensor(rows, dtype=torch.int32)
