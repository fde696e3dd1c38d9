"""Caches of keys, values and index keys for generation: the base class and the contiguous cache."""

from typing import NoReturn, Self

import torch
from torch import Tensor

from flexmsa import _core, ops, validation
from flexmsa._buffers import as_bits, dequantised, is_recorded, new_scale, rounded_to_int8
from flexmsa._profiling import profiled
from flexmsa._sequences import Sequences
from flexmsa.backends import choose_backend
from flexmsa.kernels.rules import SelectionRule
from flexmsa.ops.checks import check_page_table, check_range
from flexmsa.types import AuxRequest

__all__ = ["Cache", "MSACache"]


class Cache:
    """The base class of `MSACache` and `PagedMSACache`.

    Attributes:
        k, v: keys and values; index_k: index keys.
        k_scale, v_scale, index_k_scale: for buffers in e4m3, uint8 powers of two for each token and head; view them as
            float8_e8m0fnu. For index keys in int8, float32 for each token. Otherwise None.
        page_table: [B, max_pages] int32, or None in a contiguous cache.
        kv_starts: [B] int32, the first key of each row.
        kv_lens: [B] int32, the end of the filled part of each row.
        capacity: the number of tokens that a row can hold.
        block_size: by which a sharded cache is cut, otherwise None.
    """

    page_table: Tensor | None = None
    capacity: int
    block_size: int | None = None

    def __init__(
        self,
        k: Tensor,
        v: Tensor,
        index_k: Tensor,
        batch_size: int,
        scales: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    ) -> None:
        """Use these buffers, and for e4m3 and int8 buffers the given or new scales; rows start empty."""
        self.k, self.v, self.index_k = k, v, index_k
        self.k_scale, self.v_scale, self.index_k_scale = (
            new_scale(x) if scale is None else scale for x, scale in zip((k, v, index_k), scales, strict=True)
        )
        self.kv_lens = torch.zeros(batch_size, dtype=torch.int32, device=k.device)
        self.kv_starts = torch.zeros_like(self.kv_lens)
        self._sequences = torch.zeros(2 * batch_size, 5, dtype=torch.int32, device=k.device)
        self._status = torch.zeros(2, dtype=torch.int32, device=k.device)
        # Upper bounds of the rows' lengths. Exact lengths are on the device, and reading them waits for it.
        self._bounds = [0] * batch_size
        self._newest: tuple[int, bool] | None = None

    def __repr__(self) -> str:
        """Sizes, dtypes, device, and the tokens of each row; their most where reading them would wait for a device."""
        sizes = {
            **{"batch_size": self.batch_size, "num_kv_heads": self.k.shape[1], "head_dim": self.k.shape[3]},
            **{"index_head_dim": self.index_k.shape[3], "capacity": self.capacity, **self._own_sizes()},
            **{"dtype": self.k.dtype, "index_dtype": self.index_k.dtype, "device": str(self.k.device)},
        }
        here = self.k.device.type == "cpu" and not is_recorded(self.k)
        held = f"kv_lens={self.kv_lens.tolist()}" if here else f"longest<={max(self._bounds)}"
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in sizes.items())}, {held})"

    def _own_sizes(self) -> dict[str, int]:
        """The sizes that only caches of this class have."""
        return {}

    @property
    def batch_size(self) -> int:
        """The number of rows."""
        return self.kv_lens.shape[0]

    @property
    def buffers(self) -> list[Tensor]:
        """Keys, values, index keys and the scales that are not None."""
        every = (self.k, self.v, self.index_k, self.k_scale, self.v_scale, self.index_k_scale)
        return [x for x in every if x is not None]

    @profiled("append")
    def append(
        self, k: Tensor, v: Tensor, index_k: Tensor, *, lens: Tensor | None = None, backend: str | None = None
    ) -> None:
        """Write new tokens after those of each row, in place; for e4m3 and int8 buffers, quantise each token.

        Args:
            k, v: [B, Hkv, n, D].
            index_k: [B, 1, n, Di].
            lens: [B] int, 0 to n; only the first lens[b] tokens of row b are appended. None: all n. Others raise on
                a CPU, and are pulled into range on a GPU, because reading them would wait for the device.
            backend: as for `flexmsa.decode`.

        Raises:
            RuntimeError: the tokens need a gradient, which a cache loses.
            ValueError, TypeError: a shape, dtype or device differs from the cache's, or the tokens do not fit. The
                cache is then unchanged. In compiled code on a GPU and in a CUDA graph, an append leaves full rows
                unchanged, and `check` raises afterwards. So may an append outside of them that follows: it does not
                know how often they ran.
        """
        count = self._check_new(k, v, index_k, lens)
        stored = self.k, self.v, self.index_k, self.k_scale, self.v_scale, self.index_k_scale, self.page_table
        state = self.kv_starts, self.kv_lens, self._sequences, self._status
        ops.append(k, v, index_k, lens, *stored, *state, choose_backend("decode", backend, k))
        self._newest = count, lens is not None
        self._grow_bounds(count, lens)

    def _check_new(self, k: Tensor, v: Tensor, index_k: Tensor, lens: Tensor | None) -> int:
        """Raise unless new tokens fit this cache, as `append` does; return their number per row."""
        count = k.shape[2] if isinstance(k, Tensor) and k.dim() == 4 else 0
        for name, new, buffer in (("k", k, self.k), ("v", v, self.v), ("index_k", index_k, self.index_k)):
            validation.check_cache_input(name, new, buffer, (self.batch_size, count))
        validation.reject_gradients(k=k, v=v, index_k=index_k)
        self.check_room(count, lens)
        return count

    def attend(
        self,
        q: Tensor,
        choice: tuple[Tensor, SelectionRule] | None,
        block_indices: Tensor | None,
        block_size: int,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return out, lse and block_indices for checked arguments: `flexmsa.decode` without its checks.

        Args:
            choice: index_q and the rule to select by; None attends to block_indices, or to every block.
        """
        table, scales = self.newest(q.shape[2]), (self.k_scale, self.v_scale, self.index_k_scale)
        if backend == "reference":
            if not is_recorded(self.k):
                # A block without a page would be read from another page.
                check_page_table(self.page_table, table, block_size, self.k.shape[0], "torch")
            k, v, index_k = self.contiguous()
            sequences = Sequences(q, self.capacity, table=table)
            if choice is not None:
                index_q = choice[0]
                if self.index_k.dtype == torch.int8:
                    assert self.index_k_scale is not None
                    # In float32 the largest numbers of a key may become infinite.
                    index_k = self._gather(self.index_k, self.index_k_scale.double())
                    index_q = rounded_to_int8(index_q)
                block_indices = _core.select_blocks(index_q, index_k, sequences, choice[1], backend)
            settings = _core.Settings(block_size, scale, backend=backend)
            return *_core.main_branch(q, k, v, block_indices, sequences, settings, AuxRequest(lse=True)), block_indices
        if choice is None:
            out = q.new_empty(q.shape)
            main = q, self.k, self.v, block_indices, table, block_size, scale, backend
            return out, ops.attend_blocks(*main, self.page_table, *scales[:2], out), block_indices
        index_q, rule = choice
        branches = q, index_q, self.k, self.v, self.index_k, table
        return _core.select_and_attend(*branches, rule, scale, backend, self.page_table, scales)

    def check_room(self, count: int, lens: Tensor | None = None) -> None:
        """Raise ValueError unless `count` more tokens fit into every row, or lens[b] more into row b.

        Also raises TypeError or ValueError if lens has a wrong shape, dtype or device.
        """
        validation.check_row_counts("lens", lens, self.kv_lens)
        if lens is not None and not torch.compiler.is_compiling():
            # Compiled code checks them in the operator.
            check_range("lens", lens, 0, count)
        if is_recorded(self.k):
            # How often a graph will run is unknown here; the kernels check the room in each run.
            self._bounds = [self.capacity] * self.batch_size
            return
        counts = self._known_counts(count, lens)
        if not self._make_room([bound + more for bound, more in zip(self._bounds, counts, strict=True)]):
            self._bounds = self.kv_lens.tolist()
            counts = [count] * self.batch_size if lens is None else lens.clamp(0, count).tolist()
            if not self._make_room([length + more for length, more in zip(self._bounds, counts, strict=True)]):
                self._refuse(counts)

    def _refuse(self, counts: list[int]) -> NoReturn:
        """Raise ValueError about the first row that has no room for its tokens."""
        row = next(row for row, more in enumerate(counts) if self._bounds[row] + more > self.capacity)
        length = self._bounds[row]
        raise ValueError(
            f"cache: expected at most {self.capacity - length} more tokens in row {row}, got {counts[row]}: it holds "
            f"{length} of {self.capacity}; make the cache with a larger capacity"
        )

    def _grow_bounds(self, count: int, lens: Tensor | None) -> None:
        if not is_recorded(self.k):
            counts = self._known_counts(count, lens)
            self._bounds = [bound + more for bound, more in zip(self._bounds, counts, strict=True)]

    def _known_counts(self, count: int, lens: Tensor | None) -> list[int]:
        """Return upper bounds of each row's number of new tokens, without waiting for a device."""
        return [count] * self.batch_size

    def _make_room(self, lengths: list[int]) -> bool:
        """Make room for lengths[b] tokens in row b if possible; return whether each row can hold them."""
        return max(lengths) <= self.capacity

    def check(self) -> None:
        """Raise ValueError if an append in compiled code or a CUDA graph did not fit. Waits for the device."""
        refused = int(self._status[1])
        self._status[1] = 0
        if refused:
            raise ValueError(
                f"cache: expected room for every append, but {refused} times an append found a full row and left it "
                "unchanged; later results are those of the shorter rows. Make the cache larger, or reserve pages "
                "before capturing a graph"
            )

    def next_positions(self, count: int) -> Tensor:
        """Return [B, count] int64: the positions of each row's next tokens, for RoPE; call it before the append.

        In compiled code call this rather than read kv_lens: the compiler may move the read after the append.
        """
        return ops.next_positions(self.kv_lens, self.kv_starts, count)

    def newest(self, seqlen_q: int) -> Tensor:
        """Return the table of sequences (see flexmsa.kernels) whose queries are each row's newest tokens.

        These are the tokens of the last append if it had `seqlen_q`, else the last `seqlen_q` tokens of each row.
        """
        if self._newest is not None and self._newest[0] == seqlen_q:
            return self._sequences if self._newest[1] else self._sequences[: self.batch_size]
        queries = self.kv_lens.new_empty(self.batch_size, 1, seqlen_q, 0)
        # A row may still be shorter than its padding.
        kv_lens = torch.maximum(self.kv_lens, self.kv_starts)
        return ops.sequence_table(queries, None, self.kv_starts, kv_lens, self.capacity)

    def trim(self, counts: int | Tensor) -> None:
        """Remove the newest tokens of each row, such as rejected speculative tokens.

        Args:
            counts: the number of tokens; an int, or [B] int, one number per row; negative elements count as 0. A row
                with fewer tokens becomes empty.

        Raises:
            ValueError, TypeError: counts is a negative int, or a tensor of wrong shape, dtype or device.
        """
        counts = self._check_counts(counts)
        if isinstance(counts, int) and not is_recorded(self.k):
            self._bounds = [max(0, bound - counts) for bound in self._bounds]
        self.kv_lens.sub_(counts).clamp_(min=0)
        self._newest = None

    def _check_counts(self, counts: int | Tensor) -> int | Tensor:
        """Return the counts of `trim`, from 0 to the capacity: larger ones might not fit into int32."""
        if isinstance(counts, Tensor):
            validation.check_row_counts("counts", counts, self.kv_lens)
            return counts.clamp(0, self.capacity)
        validation.check_int("counts", counts, 0)
        return min(counts, self.capacity)

    def _check_rows(self, rows: Tensor) -> Tensor:
        """Return the rows of `reorder`, all of which exist."""
        validation.check_row_counts("rows", rows, self.kv_lens)
        if not torch.compiler.is_compiling():
            check_range("rows", rows, 0, self.batch_size - 1)
        return rows if rows.device.type == "cpu" else rows.clamp(0, self.batch_size - 1)

    def reset(self) -> None:
        """Remove all tokens."""
        self.kv_lens.zero_()
        self._bounds = [0] * self.batch_size
        self._newest = None

    def contiguous(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return copies k, v [B, Hkv, capacity, D] and index_k [B, 1, capacity, Di], unquantised, to inspect.

        Tokens from kv_lens on have arbitrary values.
        """
        k, v = self._gather(self.k, self.k_scale), self._gather(self.v, self.v_scale)
        return k, v, self._gather(self.index_k, self.index_k_scale)

    def _gather(self, buffer: Tensor, scale: Tensor | None) -> Tensor:
        return buffer.clone() if scale is None else dequantised(buffer, scale)


class MSACache(Cache):
    """Keys, values and index keys of one layer, each row contiguous: k, v [B, Hkv, capacity, D], index_k
    [B, 1, capacity, Di].

    >>> cache = MSACache(batch_size=2, num_kv_heads=1, head_dim=16, index_head_dim=8, capacity=32)
    >>> cache.append(torch.ones(2, 1, 5, 16), torch.ones(2, 1, 5, 16), torch.ones(2, 1, 5, 8))
    >>> cache.append(
    ...     torch.ones(2, 1, 3, 16), torch.ones(2, 1, 3, 16), torch.ones(2, 1, 3, 8), lens=torch.tensor([3, 1])
    ... )
    >>> cache.kv_lens.tolist()
    [8, 6]
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        index_head_dim: int,
        capacity: int,
        *,
        kv_starts: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        index_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Allocate an empty cache.

        Args:
            capacity: the number of tokens that a row can hold, including padding.
            kv_starts: [B] int; the number of padding tokens on the left of each row's prompt. None: no padding.
            dtype: of keys and values; torch.float8_e4m3fn stores them with one scale for each token and head.
            index_dtype: of index keys, likewise; torch.int8 stores them with one float32 scale for each token, and
                rounds queries to int8 for their scores. None: dtype.

        Raises:
            ValueError, TypeError: a size is below 1, a dtype is not supported, or a start is not within a row.
        """
        validation.check_cache_sizes(batch_size, num_kv_heads, head_dim, index_head_dim, capacity=capacity)
        index_dtype = dtype if index_dtype is None else index_dtype
        validation.check_cache_dtypes(dtype, index_dtype, index_head_dim)
        self.capacity = capacity
        k = torch.zeros(batch_size, num_kv_heads, capacity, head_dim, dtype=dtype, device=device)
        index_k = torch.zeros(batch_size, 1, capacity, index_head_dim, dtype=index_dtype, device=device)
        super().__init__(k, torch.zeros_like(k), index_k, batch_size)
        if kv_starts is not None:
            validation.check_kv_starts(kv_starts, batch_size, capacity, self.k.device)
            self.kv_starts.copy_(kv_starts)

    def reorder(self, rows: Tensor) -> Self:
        """Copy row rows[b] to row b for each b at once, in place, for beam search; return the cache.

        Args:
            rows: [B] int. Reads and writes every buffer once.

        Raises:
            ValueError, TypeError: rows is not as described, or, on a CPU, names a row that there is not. A GPU takes
                the nearest row instead.
        """
        rows = self._check_rows(rows)
        for buffer in (*self.buffers, self.kv_starts, self.kv_lens):
            raw = as_bits(buffer)
            raw.copy_(raw.index_select(0, rows))
        self._bounds = [max(self._bounds)] * self.batch_size
        self._newest = None
        return self
