"""Continuous batching, `model.generate_batch`, of models that attend through flexmsa.

transformers' manager replaces an attention implementation that it does not know by flash attention, which would make
the model dense, or refuses it. Models with `attn_implementation="flexmsa"` get a subclass of it.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig, GenerationMixin

from flexmsa.integrations.transformers.attention import IMPLEMENTATION, register_attention
from flexmsa.integrations.transformers.versions import check_parameters

__all__ = ["BatchingManager", "register_implementation"]

_FULL, _SPARSE = "full_attention", "minimax_m3_sparse"


@functools.cache
def register_implementation() -> None:
    """Register the attention with transformers, and batch its models; further calls do nothing."""
    register_attention()
    init = GenerationMixin.init_continuous_batching
    check_parameters(init, "self", "generation_config", "continuous_batching_config", "workload_hints")
    GenerationMixin.init_continuous_batching = _init_continuous_batching(init)  # type: ignore[method-assign]


def _init_continuous_batching(init: Callable) -> Callable:
    """Wrap the method that `generate_batch` and `transformers serve` get the manager from."""

    @functools.wraps(init)
    def wrapped(
        self: Any,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        workload_hints: Any = None,
    ) -> ContinuousBatchingManager:
        kept = getattr(self, "_cached_continuous_batching_manager", None)
        implementation = self.config.get_text_config()._attn_implementation
        if kept is not None and isinstance(kept, BatchingManager) != (implementation == IMPLEMENTATION):
            raise ValueError(
                f'attn_implementation: expected the one that the kept manager was made for, got "{implementation}"; '
                "call model.destroy_cached_continuous_batching_manager() first"
            )
        if isinstance(kept, BatchingManager) and kept.warm_up != _is_in_warm_up(self):
            raise ValueError(
                "warm_up: expected that of the kept manager, whose cache has tokens as the other phase computes them; "
                "call model.destroy_cached_continuous_batching_manager() first"
            )
        if implementation != IMPLEMENTATION:
            return init(self, generation_config, continuous_batching_config, workload_hints)
        generation_config = self.generation_config if generation_config is None else generation_config
        # With a kept manager too, which would never give the other sequences.
        _check_number(generation_config)
        if kept is not None:
            return init(self, generation_config, continuous_batching_config, workload_hints)
        if continuous_batching_config is None:
            given = getattr(generation_config, "continuous_batching_config", None)
            continuous_batching_config = given if isinstance(given, ContinuousBatchingConfig) else None
        return BatchingManager(
            self, generation_config, continuous_batching_config or ContinuousBatchingConfig(), workload_hints
        )

    return wrapped


class BatchingManager(ContinuousBatchingManager):
    """transformers' manager, for a model that attends through flexmsa.

    Raises:
        ValueError, NotImplementedError: the model or a configuration is not as described in docs/transformers.md.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig,
        continuous_batching_config: ContinuousBatchingConfig,
        workload_hints: Any = None,
    ) -> None:
        _check(model, continuous_batching_config)
        self.warm_up = _is_in_warm_up(model)
        if generation_config.eos_token_id is None:
            # No token; transformers writes it into the model's own configuration.
            generation_config = copy.deepcopy(generation_config)
            generation_config.eos_token_id = -1
        with _full_attention(model):
            super().__init__(model, generation_config, continuous_batching_config, workload_hints)
        _check_eager(self.continuous_batching_config)

    def switch_to_cb_friendly_attn(self, model: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the model's attention implementation, which is flexmsa's."""

    def warmup(self) -> None:
        """Make the cache, as transformers does."""
        with _full_attention(self.model):
            super().warmup()

    def start(self) -> None:
        """Start the thread that generates."""
        if self.batch_processor is None:
            self.warmup()
        super().start()


@contextlib.contextmanager
def _full_attention(model: Any) -> Iterator[None]:
    """While the cache is made, call MiniMax-M3's sparse layers full attention: it needs all their keys and values."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None or _SPARSE not in kinds:
        yield
        return
    config.layer_types = [_FULL if kind == _SPARSE else kind for kind in kinds]
    try:
        yield
    finally:
        config.layer_types = kinds


def _is_in_warm_up(model: Any) -> bool:
    return getattr(getattr(model, "flexmsa", None), "warm_up", False)


def _check_number(generation: GenerationConfig) -> None:
    number = getattr(generation, "num_return_sequences", None) or 1
    if number > 1:
        raise NotImplementedError(
            f"num_return_sequences: expected 1, got {number}: transformers copies pages of keys and values, but not "
            "their index keys; pass the prompt several times"
        )


def _check(model: Any, batching: ContinuousBatchingConfig) -> None:
    """Raise for what would be wrong, or was never tried."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = [_FULL if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    others = sorted(set(kinds) - {_FULL, _SPARSE})
    if others:
        raise NotImplementedError(
            f"generate_batch: expected full attention in all layers, got {', '.join(others)}; call generate"
        )
    mesh = getattr(model, "_device_mesh", None)
    if mesh is not None and mesh.size() > 1:
        raise NotImplementedError("generate_batch: expected a model on one process, got a sharded one; call generate")
    if batching.cpu_offload_space != 0:
        raise NotImplementedError(
            f"cpu_offload_space: expected 0, got {batching.cpu_offload_space}: transformers moves pages of keys and "
            "values, but not their index keys; without it, requests that do not fit are computed again"
        )


def _check_eager(batching: ContinuousBatchingConfig) -> None:
    """Raise for graphs, which pad a batch with tokens of no request."""
    compiled = batching.varlen_compile_config, batching.decode_compile_config
    if any(batching.cuda_graph_booleans) or any(x is not None for x in compiled):
        raise NotImplementedError(
            "continuous_batching_config: expected use_cuda_graph=False and no compile configuration, got one; they pad "
            "batches with tokens of no request; for graphs, use generate with a static cache"
        )
