"""ShardedCache: the blocks of each row dealt to the processes of a mesh, and decoding from them."""

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from flexmsa import ops, validation
from flexmsa.cache import Cache, MSACache
from flexmsa.distributed.gather import gather_parts
from flexmsa.distributed.mesh import check_mesh
from flexmsa.kernels.rules import MOST_BLOCKS, SelectionRule
from flexmsa.paged_cache import PagedMSACache

__all__ = ["ShardedCache"]

# The most tokens per row at once: so few queries have kernels that take each by itself.
_MOST_QUERIES = 16


class ShardedCache(Cache):
    """A cache whose rows are too long for one GPU: block b of each row is on process b % W of W.

    Every process calls `append`, `flexmsa.decode`, `trim`, `reset`, `reorder` and `check` with the same arguments, the
    tokens of all query and KV heads among them, and gets the same results, which are those of one process. A process
    stores, scores and attends to its own blocks. An `MSAttention` layer takes this cache as any other.

    Args:
        local: an empty cache of this process's blocks, contiguous or paged, without left padding. Rows can hold W
            times its capacity, which is a multiple of block_size and the same on every process.
        mesh: one-dimensional, of the processes that share the rows.
        block_size: the attention's.

    Attributes:
        local, mesh, block_size: as given.
        k, v, index_k and their scales: those of `local`.
        kv_lens: [B] int32, the tokens of each row on all processes together.
        capacity: the number of tokens that a row can hold, on all processes together.

    Raises:
        ValueError, TypeError: an argument is not as described. A paged cache without a free page raises on the process
            that needs one; the others do not know of it, so `reserve` pages where they may run out.

    >>> cache = ShardedCache(layer.new_cache(batch_size=1, capacity=2**17), mesh["cp"])  # doctest: +SKIP
    >>> cache.append(k, v, index_k)  # doctest: +SKIP
    >>> out = flexmsa.decode(q, cache, index_q)  # doctest: +SKIP
    """

    block_size: int

    def __init__(self, local: Cache, mesh: DeviceMesh, block_size: int = 128) -> None:
        check_mesh(mesh)
        validation.check_int("block_size", block_size, 1)
        if not isinstance(local, MSACache | PagedMSACache):
            raise TypeError(f"local: expected an MSACache or a PagedMSACache, got {type(local).__name__}")
        if local.capacity % block_size:
            raise ValueError(f"local: expected whole blocks of {block_size} tokens, got a capacity of {local.capacity}")
        if local.page_table is not None and local.k.shape[2] != block_size:
            raise ValueError(f"local: expected pages of {block_size} tokens, got {local.k.shape[2]}")
        if bool(local.kv_starts.any()) or bool(local.kv_lens.any()):
            raise ValueError("local: expected an empty cache without left padding; append rows by their lens instead")
        scales = local.k_scale, local.v_scale, local.index_k_scale
        super().__init__(local.k, local.v, local.index_k, local.batch_size, scales)
        self.local, self.mesh, self.block_size = local, mesh, block_size
        self.page_table, self.capacity = local.page_table, local.capacity * mesh.size()
        self._counts = torch.zeros_like(self.kv_lens)
        self._row = torch.arange(local.batch_size, dtype=torch.int32, device=self.kv_lens.device)

    def _own_sizes(self) -> dict[str, int]:
        return {"block_size": self.block_size, "processes": self.mesh.size()}

    def append(
        self, k: Tensor, v: Tensor, index_k: Tensor, *, lens: Tensor | None = None, backend: str | None = None
    ) -> None:
        """As `Cache.append`, of all new tokens, the same on every process; each stores those of its own blocks."""
        count = self._check_new(k, v, index_k, lens)
        counts = torch.full_like(self.kv_lens, count) if lens is None else lens.clamp(0, count).to(torch.int32)
        fits = counts <= self.capacity - self.kv_lens
        counts = counts * fits
        token = torch.arange(count, dtype=torch.int32, device=self.kv_lens.device)
        block = (self.kv_lens[:, None] + token) // self.block_size
        own = (block % self.mesh.size() == self.mesh.get_local_rank()) & (token < counts[:, None])
        new: tuple[Tensor, ...] = (k, v, index_k)
        if count > 1:
            # So many of `count` tokens can be a process's, wherever they begin.
            rounds, rest = divmod(count, self.mesh.size() * self.block_size)
            most = rounds * self.block_size + min(rest, self.block_size)
            order = own.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, None, :most, None]
            new = tuple(x.gather(2, order.expand(-1, x.shape[1], -1, x.shape[3])) for x in new)
        self.local.append(*new, lens=own.sum(1, dtype=torch.int32), backend=backend)
        self.kv_lens.add_(counts)
        self._counts.copy_(counts)
        self._status[1] += fits.logical_not().sum()
        self._newest = count, True
        self._grow_bounds(count, lens)

    def trim(self, counts: int | Tensor) -> None:
        """As `Cache.trim`, of the tokens of all processes."""
        kept = (self.kv_lens - self._check_counts(counts)).clamp(min=0)
        self.local.trim(self.local.kv_lens - self._number_of_own(kept))
        super().trim(counts)

    def reset(self) -> None:
        """Remove all tokens."""
        self.local.reset()
        super().reset()

    def reorder(self, rows: Tensor) -> "ShardedCache":
        """As the local cache's `reorder`: rows may be copied, since a block's process does not depend on its row."""
        assert isinstance(self.local, MSACache | PagedMSACache)
        rows = self._check_rows(rows)
        self.local.reorder(rows)
        self.kv_lens.copy_(self.kv_lens[rows])
        self._bounds = [max(self._bounds)] * self.batch_size
        self._newest = None
        return self

    def reserve(self, tokens: int) -> None:
        """Take the pages that every row needs for `tokens` tokens, of all processes together; for paged caches."""
        if not isinstance(self.local, PagedMSACache):
            raise TypeError(f"local: expected a PagedMSACache to reserve pages of, got {type(self.local).__name__}")
        validation.check_int("tokens", tokens, 0)
        # On all processes alike: one that went on would wait for those that raise.
        if tokens > self.capacity:
            raise ValueError(f"tokens: expected at most {self.capacity}, the capacity of a row, got {tokens}")
        self.local.reserve(int(self._number_of_own(torch.tensor(tokens))))

    def check(self) -> None:
        """As `Cache.check`."""
        self.local.check()
        super().check()

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """As `Cache.contiguous`, of this process's blocks."""
        return self.local.contiguous()

    def newest(self, seqlen_q: int) -> Tensor:
        """Return the table of sequences of each row's newest tokens: one per query, over this process's keys."""
        return self._table(self._visible(seqlen_q))

    def attend(
        self,
        q: Tensor,
        choice: tuple[Tensor, SelectionRule] | None,
        block_indices: Tensor | None,
        block_size: int,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `Cache.attend`, the same on every process."""
        if backend == "reference":
            raise NotImplementedError("backend='reference' has no kernel for a ShardedCache: use backend=None")
        visible = self._visible(q.shape[2])
        world, rank = self.mesh.size(), self.mesh.get_local_rank()
        tables = self._tables(visible, _MOST_QUERIES)
        if choice is not None:
            block_indices = self._select(*choice, visible, tables, backend)
        own = None
        if block_indices is not None:
            is_own = (block_indices >= 0) & (block_indices % world == rank)
            own = torch.where(is_own, block_indices // world, -1)
        if own is None or own.shape[3] > MOST_BLOCKS:
            # All blocks, and wide lists, go to kernels for sequences that share no keys: one token per row.
            tables = self._tables(visible, 1)
        found = []
        for part, table in tables:
            ids = None if own is None else own[:, :, part]
            out = q.new_empty(q[:, :, part].shape)
            stored = self.page_table, self.k_scale, self.v_scale, out
            main = q[:, :, part], self.k, self.v, ids, table, block_size, scale, backend
            found.append((out, ops.attend_blocks(*main, *stored)))
        out, lse = (_join(parts) for parts in zip(*found, strict=True))
        # One collective takes both: the lse as more numbers of out's dtype.
        both = torch.cat([out, lse[..., None].view(out.dtype)], dim=-1)
        outs, rest = gather_parts(both, self.mesh).split([out.shape[3], both.shape[3] - out.shape[3]], dim=-1)
        lses = rest.clone(memory_format=torch.contiguous_format).view(lse.dtype)[..., 0]
        return *_merge_outputs(outs, lses), block_indices

    def _select(
        self, index_q: Tensor, rule: SelectionRule, visible: Tensor, tables: list[tuple[slice, Tensor]], backend: str
    ) -> Tensor:
        """block_indices [B, Hkv, Sq, topk] of all processes' blocks, from the best blocks of each."""
        found = []
        for part, table in tables:
            branch = index_q[:, :, part], self.index_k, table, rule.block_size, rule.topk, backend
            found.append(ops.scored_blocks(*branch, self.page_table, self.index_k_scale))
        ids, scores = (_join(parts) for parts in zip(*found, strict=True))
        ids = torch.where(ids >= 0, ids * self.mesh.size() + self.mesh.get_local_rank(), -1)
        # One collective takes both: the scores as integers.
        both = gather_parts(torch.cat([ids, scores.view(torch.int32)], dim=-1), self.mesh)
        ids, bits = both.split([rule.topk, both.shape[4] - rule.topk], dim=-1)
        # contiguous() may keep an offset that a wider type cannot have.
        scores = bits.clone(memory_format=torch.contiguous_format).view(scores.dtype)
        newest = (visible - 1).div(rule.block_size, rounding_mode="floor")
        ids, scores = (x.movedim(0, -2).flatten(-2) for x in (ids, scores))
        return _merge_scored(ids, scores, newest[:, None, :, None], rule)

    def _visible(self, seqlen_q: int) -> Tensor:
        """[B, Sq] int32: the keys of all processes that each of the newest tokens sees."""
        token = torch.arange(seqlen_q, dtype=torch.int32, device=self.kv_lens.device)
        if self._newest is None or self._newest[0] != seqlen_q:
            return (self.kv_lens[:, None] - (seqlen_q - 1) + token).clamp(min=0)
        counts = self._counts[:, None]
        return torch.where(token < counts, self.kv_lens[:, None] - counts + token + 1, 0)

    def _number_of_own(self, tokens: Tensor) -> Tensor:
        """How many of a row's first `tokens` tokens are in this process's blocks."""
        world, rank = self.mesh.size(), self.mesh.get_local_rank()
        block, rest = tokens // self.block_size, tokens % self.block_size
        return (block + world - 1 - rank) // world * self.block_size + rest * (block % world == rank)

    def _tables(self, visible: Tensor, most: int) -> list[tuple[slice, Tensor]]:
        """For up to `most` tokens at once: which they are, and their `_table`."""
        parts = [slice(first, first + most) for first in range(0, visible.shape[1], most)]
        return [(part, self._table(visible[:, part])) for part in parts]

    def _table(self, visible: Tensor) -> Tensor:
        """The table of sequences (see flexmsa.kernels) of queries that see so many keys [B, Sq], one row per query.

        In a row of the table queries see ever more keys; here only those in a block of this process do.
        """
        # A page that could not be had leaves this process with fewer keys.
        own = torch.minimum(self._number_of_own(visible), self.local.kv_lens[:, None])
        token = torch.arange(visible.shape[1], dtype=torch.int32, device=visible.device).expand_as(visible)
        columns = self._row[:, None].expand_as(visible), token, token + 1, torch.zeros_like(visible), own
        return torch.stack(columns, dim=-1).flatten(0, 1)


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    """The parts [B, heads, tokens, ...] along their tokens."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _merge_scored(ids: Tensor, scores: Tensor, newest: Tensor, rule: SelectionRule) -> Tensor:
    """The selection [..., topk], ascending, from the best blocks [..., C] of each process, by `SelectionRule`.

    newest: the newest block that each query sees, -1 without any. Forced blocks need no score, so no process sends it.
    """
    init = torch.arange(rule.num_init_blocks, dtype=ids.dtype, device=ids.device).expand(*newest.shape[:-1], -1)
    local = newest - torch.arange(rule.num_local_blocks, dtype=ids.dtype, device=ids.device)
    local = torch.where(local >= rule.num_init_blocks, local, -1)
    forced = torch.cat([torch.where(init <= newest, init, -1), local], dim=-1).expand(*ids.shape[:-1], -1)
    scores = torch.where(rule.is_forced(ids, newest), -torch.inf, scores)
    ids = torch.cat([ids, forced], dim=-1)
    scores = torch.cat([scores, torch.where(forced >= 0, torch.inf, -torch.inf).to(scores.dtype)], dim=-1)
    # Ascending ids first: a stable sort then keeps the smaller one first among equal scores.
    ids, order = ids.sort(dim=-1)
    scores, order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    most = torch.iinfo(ids.dtype).max
    best = torch.where(scores > -torch.inf, ids.gather(-1, order), most)[..., : rule.topk].sort(dim=-1).values
    return torch.where(best < most, best, -1)


def _merge_outputs(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, D] and lse [B, Hq, Sq] from those of all processes [W, ...], added in the order of ranks."""
    largest = lses.amax(0)
    shift = torch.where(largest > -torch.inf, largest, 0)
    weights = (lses - shift).exp()
    total = weights.sum(0)
    out = (outs.to(lses.dtype) * weights[..., None]).sum(0) / torch.where(total > 0, total, 1)[..., None]
    return out.to(outs.dtype), shift + total.log()
