"""MSAttention: the attention layer as an nn.Module."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

import torch
from torch import Tensor, nn

from flexmsa import decoding, functional, validation
from flexmsa._layer import Layer
from flexmsa._profiling import profiled
from flexmsa._rope import rotate, rotation
from flexmsa._sequences import Sequences, check_sequences
from flexmsa.cache import Cache, MSACache
from flexmsa.config import MSAConfig
from flexmsa.paged_cache import PagedMSACache
from flexmsa.types import AuxRequest, CacheDtypes, Projections, Requested

if TYPE_CHECKING:
    from flexmsa.distributed import SequenceShards
    from flexmsa.distributed.tensor_parallel import HeadShards

__all__ = ["MSAttention", "Projections"]


class MSAttention(Layer):
    """Causal self-attention with a learned selection of key blocks (arXiv 2606.13392).

    The index branch reads the layer's input detached, so its loss trains only the index projections. Set
    `layer.topk = None` for the dense warm-up, and an int to select blocks. A state_dict has the phase, which loading
    restores: a layer that selects becomes dense by that of a warm-up, and a dense one selects `config.topk` blocks by
    that of sparse training. A state_dict without it, of an older version, leaves the layer's own.

    With `config.loss_in_backward`, the index loss of a layer in training costs little, and nothing twice under
    activation checkpointing: the forward returns a 0 that has the loss's gradient, to be added to the model's loss, and
    the backward writes the exact loss to the buffer `layer.index_loss_value`, a float32 scalar, NaN before.

    `flexmsa.distributed.tensor_parallel_plan` shards the heads over processes.

    >>> config = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8, index_head_dim=8, block_size=4, topk=2)
    >>> layer = MSAttention(config)
    >>> out, index_loss = layer(torch.randn(1, 20, 32))
    >>> out.shape, index_loss.shape
    (torch.Size([1, 20, 32]), torch.Size([]))
    """

    def __init__(self, config: MSAConfig) -> None:
        super().__init__(config)
        width, bias = config.hidden_size, config.bias
        self.q_proj = nn.Linear(width, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, width, bias=bias)
        self.index_q_proj = nn.Linear(width, config.num_kv_heads * config.index_head_dim, bias=bias)
        self.index_k_proj = nn.Linear(width, config.index_head_dim, bias=bias)

        def norm(size: int) -> nn.Module:
            return nn.RMSNorm(size, eps=config.norm_eps) if config.qk_norm else nn.Identity()

        self.q_norm, self.k_norm = norm(config.head_dim), norm(config.head_dim)
        self.index_q_norm, self.index_k_norm = norm(config.index_head_dim), norm(config.index_head_dim)
        self.index_loss_value: Tensor
        self.register_buffer("index_loss_value", torch.full((), math.nan, dtype=torch.float32), persistent=False)
        # Set by the plan for tensor parallel.
        self.head_shards: HeadShards | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # `layer.bfloat16()` and the like leave the loss's value in float32.
        super()._apply(fn, recurse)
        self.index_loss_value = self.index_loss_value.float()
        return self

    @overload
    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        kv_starts: Tensor | None = None,
        index_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        paged: Literal[False] = False,
    ) -> MSACache: ...
    @overload
    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        *,
        paged: Literal[True],
        num_pages: int | None = None,
        **dtypes: Unpack[CacheDtypes],
    ) -> PagedMSACache: ...
    def new_cache(
        self,
        batch_size: int,
        capacity: int,
        kv_starts: Tensor | None = None,
        index_dtype: torch.dtype | None = None,
        dtype: torch.dtype | None = None,
        *,
        paged: bool = False,
        num_pages: int | None = None,
    ) -> MSACache | PagedMSACache:
        """Return an empty cache for this layer, on its device; its dtype is the layer's unless `dtype` is given.

        Under autocast, pass the region's dtype. Under tensor parallel it is for the process's own groups.

        Args:
            capacity: the number of tokens that a row can hold; in a paged cache rounded up to whole pages.
            kv_starts, index_dtype, dtype: as for `MSACache`; a paged cache takes no kv_starts.
            paged: return a `PagedMSACache`, whose pages are this layer's blocks.
            num_pages: of a paged cache, for all rows together; default: as many as full rows need.
        """
        weight, config = self.k_proj.weight, self.config
        sizes = batch_size, self._num_groups, config.head_dim, config.index_head_dim
        dtype = weight.dtype if dtype is None else dtype
        options: dict[str, Any] = {"dtype": dtype, "index_dtype": index_dtype, "device": weight.device}
        if not paged:
            if num_pages is not None:
                raise ValueError("num_pages: expected None without paged=True")
            return MSACache(*sizes, capacity, kv_starts=kv_starts, **options)
        if kv_starts is not None:
            raise ValueError("kv_starts: expected None with paged=True, whose rows need no padding; append with lens")
        validation.check_int("capacity", capacity, 1)
        max_pages = -(-capacity // config.block_size)
        num_pages = batch_size * max_pages if num_pages is None else num_pages
        options.update(num_pages=num_pages, max_pages=max_pages, page_size=config.block_size)
        return PagedMSACache(*sizes, **options)

    def forward(
        self,
        x: Tensor,
        *,
        cache: Cache | None = None,
        lens: Tensor | None = None,
        block_indices: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        kv_starts: Tensor | None = None,
        with_index_loss: bool | None = None,
        index_loss_count: Tensor | float | None = None,
        shards: "SequenceShards | None" = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Requested]:
        """Project x, attend, and project the output.

        Args:
            x: [B, S, hidden_size]; with a cache, the tokens that follow those in the cache.
            cache: the new keys are appended to it in place, and the tokens attend to all of it. For inference, under
                torch.no_grad(), except for a layer without gradients.
            lens: [B] int; with a cache, only the first lens[b] tokens of row b are new tokens.
            block_indices: [B, Hkv, S, topk] of another layer or of your own, used instead of a selection.
            cu_seqlens, kv_starts: packed documents, or padding on the left, as for `flexmsa.attention`; a cache has
                its own kv_starts.
            with_index_loss: compute the loss of the index branch; default: in training mode without a cache.
            index_loss_count: by what the sum of the loss is divided, as for `flexmsa.attention`; default: the
                `index_loss_count` of x.
            shards: context parallel: x has the tokens of this process, `shards.tokens` of each row. Documents are in
                shards, and the loss is that of `flexmsa.distributed.context_parallel_attention`.
            backend: as for `flexmsa.attention`.

        Returns:
            out [B, S, hidden_size], and the index loss, a scalar, or None if it was not requested. In training mode
            with `config.loss_in_backward` it is 0, with the loss's gradient.

        Raises:
            RuntimeError: a cache was given where gradients are expected, which would be lost.
            ValueError: x has a wrong shape, the cache is full, a cache was given with other sequences or a loss,
                lens were given without a cache, block_indices under tensor or context parallel, or cu_seqlens with
                shards.
        """
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size:
            raise ValueError(f"x: expected [B, S, hidden_size={self.config.hidden_size}], got {list(x.shape)}")
        if with_index_loss is None:
            with_index_loss = self.training and cache is None
        others = cu_seqlens, kv_starts, shards, index_loss_count
        if cache is not None and (with_index_loss or any(x is not None for x in others)):
            raise ValueError(
                "cache: expected alone, got it with cu_seqlens, kv_starts, shards, index_loss_count or the index loss; "
                "give kv_starts to the cache, and train without one"
            )
        if cache is not None:
            # Not self.generate, which with FSDP2 may be a function that would part the weights again before this ends.
            decoded = type(self).generate(self, x, cache, lens=lens, block_indices=block_indices, backend=backend)
            return decoded[0], None
        if lens is not None:
            raise ValueError("lens: expected None without a cache")
        if block_indices is not None and (shards is not None or self.head_shards is not None):
            raise ValueError("block_indices: expected None under context and tensor parallel, which select")
        deferred = with_index_loss and self.training and self.config.loss_in_backward
        value = self.index_loss_value if deferred else None
        settings = {**self._selection(), "kv_starts": kv_starts, "backend": backend}
        attend: Callable[..., Any] = functional.attention
        if shards is None:
            inputs = type(self).project(self, x, cu_seqlens=cu_seqlens, kv_starts=kv_starts)
            settings["cu_seqlens"] = cu_seqlens
        else:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens: expected None with shards, which know the documents; give it to them")
            # Not every build of PyTorch has torch.distributed.
            from flexmsa.distributed import context_parallel_attention

            attend = functools.partial(context_parallel_attention, shards=shards)
            inputs = type(self).project(self, x, positions=shards.row_positions(kv_starts))
        if with_index_loss and self.head_shards is not None:
            if index_loss_count is None:
                index_loss_count = self.index_loss_count(x, cu_seqlens=cu_seqlens, kv_starts=kv_starts, shards=shards)
                # Those of shards are at least 1, divided by the number of processes.
                index_loss_count = index_loss_count.clamp(min=1) if shards is None else index_loss_count
            out, loss = self.head_shards.attention(attend, inputs, settings, index_loss_count, value)
            return self._merge(out), loss
        settings.update(index_loss_value=value, index_loss_count=index_loss_count)
        if block_indices is not None:
            settings["block_indices"] = block_indices
        out, extra = attend(*inputs, **settings, return_aux=AuxRequest(index_loss=with_index_loss))
        return self._merge(out), extra.index_loss

    def index_loss_count(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        kv_starts: Tensor | None = None,
        shards: "SequenceShards | None" = None,
    ) -> Tensor:
        """The number of groups and queries of x [B, S, hidden_size] that see a key: a scalar int64.

        The index loss of a call is a mean over so many. Counts of several micro-batches or processes, added up, make
        the mean over all of them: see `forward` and `flexmsa.distributed.global_index_loss_count`. Under tensor
        parallel the count of each process is that of all groups; with `shards`, it is their
        `SequenceShards.index_loss_count`, that of all processes divided by their number.

        >>> config = MSAConfig(32, num_heads=4, num_kv_heads=2, head_dim=8, index_head_dim=8)
        >>> MSAttention(config).index_loss_count(torch.randn(3, 20, 32)).item()
        120
        """
        if shards is not None:
            return shards.index_loss_count(self.config.num_kv_heads, kv_starts)
        batch, seqlen = x.shape[:2] if self.head_shards is None else self.head_shards.shape(x)
        queries = torch.empty((batch, 1, seqlen, 0), device=x.device)
        sequences = check_sequences(queries, seqlen, cu_seqlens, kv_starts, None)
        return sequences.count(self.config.num_kv_heads)

    def generate(
        self,
        x: Tensor,
        cache: Cache,
        *,
        lens: Tensor | None = None,
        block_indices: Tensor | None = None,
        backend: str | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Append to the cache and attend, as `forward` does; also return block_indices, which other layers can reuse.

        Args:
            As for `forward`.

        Returns:
            out [B, S, hidden_size], and the block_indices [B, Hkv, S, topk] of the attention, None in the warm-up.
        """
        if self.head_shards is not None and self.head_shards.sequence_parallel:
            raise ValueError("cache: expected None with sequence_parallel=True, whose input is a part of the tokens")
        if not isinstance(cache, Cache) or cache.batch_size != x.shape[0]:
            got = f"one of {cache.batch_size}" if isinstance(cache, Cache) else type(cache).__name__
            raise ValueError(f"cache: expected an MSACache or a PagedMSACache of x's {x.shape[0]} rows, got {got}")
        cache.check_room(x.shape[1], lens)
        q, k, v, index_q, index_k = type(self).project(self, x, positions=cache.next_positions(x.shape[1]))
        # Checked before the append, so that an error leaves the cache unchanged.
        validation.check_decode_inputs(q, index_q, cache, self.config.block_size, None)
        if block_indices is not None:
            validation.check_block_indices(block_indices, q.shape[0], k.shape[1], q.shape[2], q.device)
        validation.reject_gradients(q=q, k=k, v=v, index_q=index_q, index_k=index_k)
        cache.append(k, v, index_k, lens=lens, backend=backend)
        settings = {**self._selection(), "backend": backend, "return_aux": AuxRequest(block_indices=True)}
        out, aux = decoding.decode(q, cache, index_q, block_indices=block_indices, **settings)
        return self._merge(out), aux.block_indices

    def _selection(self) -> dict[str, Any]:
        config = self.config
        forced = {"num_local_blocks": config.num_local_blocks, "num_init_blocks": config.num_init_blocks}
        return {"block_size": config.block_size, "topk": self.topk, **forced}

    @profiled("project")
    def project(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        kv_starts: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Projections:
        """Return the heads of both branches, for `flexmsa.metrics` or for another attention call.

        Args:
            x: [B, S, hidden_size].
            cu_seqlens, kv_starts: the sequences, as for `flexmsa.attention`; RoPE positions count from their starts.
            positions: [B, S] int, RoPE positions that replace these.
        """
        config, shards = self.config, self.head_shards
        if shards is not None:
            x = shards.gather(x)
        detached = x.detach()

        def heads(projection: nn.Module, x: Tensor, number: int, size: int, norm: nn.Module | None = None) -> Tensor:
            y = projection(x) if shards is None else shards.own(projection, x, number * size)
            y = y.view(*y.shape[:-1], y.shape[-1] // size, size).transpose(1, 2)
            if y.shape[1] != number:
                raise ValueError(
                    f"layer: expected projections of {number} heads, as its config says, got {y.shape[1]}; shard the "
                    "heads by flexmsa.distributed.tensor_parallel_plan, which keeps loss and gradients right"
                )
            if norm is None:
                return y
            return norm(y) if shards is None else shards.replicated(norm, y)

        num_heads, groups = config.num_heads // self._num_shards, self._num_groups
        size, index_size = config.head_dim, config.index_head_dim
        q = heads(self.q_proj, x, num_heads, size, self.q_norm)
        if positions is None and cu_seqlens is None and kv_starts is None:
            positions = torch.arange(q.shape[2], device=q.device)[None]
        elif positions is None:
            start, end = Sequences(q, q.shape[2], cu_seqlens, kv_starts).key_ranges()
            positions = (end - start - 1).clamp(min=0)

        rope = rotation(positions, config.rotary_size, config.rope_theta)
        return Projections(
            q=rotate(q, *rope),
            k=rotate(heads(self.k_proj, x, groups, size, self.k_norm), *rope),
            v=heads(self.v_proj, x, groups, size),
            index_q=rotate(heads(self.index_q_proj, detached, groups, index_size, self.index_q_norm), *rope),
            index_k=rotate(heads(self.index_k_proj, detached, 1, index_size, self.index_k_norm), *rope),
        )

    @property
    def _num_shards(self) -> int:
        return 1 if self.head_shards is None else self.head_shards.size

    @property
    def _num_groups(self) -> int:
        return max(1, self.config.num_kv_heads // self._num_shards)

    @profiled("project the output")
    def _merge(self, out: Tensor) -> Tensor:
        out = out.transpose(1, 2).flatten(2)
        return self.o_proj(out) if self.head_shards is None else self.head_shards.project(self.o_proj, out)
