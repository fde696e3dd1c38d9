"""The settings of an attention, checked together with the tensors of both branches."""

from torch import Tensor

from flexmsa import _core, validation
from flexmsa._layouts import reject_wrong_layouts
from flexmsa.kernels.rules import SelectionRule

__all__ = ["checked_settings", "default_scale"]


def checked_settings(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_size: int,
    topk: int | None,
    num_local_blocks: int,
    num_init_blocks: int,
    scale: float | None,
    index_scale: float | None,
    backend: str | None,
) -> _core.Settings:
    """Check both branches and the settings of an attention to them, and return these with their defaults."""
    try:
        validation.check_main_inputs(q, k, v, scale)
        validation.check_index_inputs(index_q, index_k, index_scale)
        validation.check_branches_match(q, k, index_q, index_k)
    except ValueError:
        reject_wrong_layouts(q=q, k=k, v=v, index_q=index_q, index_k=index_k)
        raise
    validation.check_settings(block_size, topk, num_local_blocks, num_init_blocks)
    rule = None if topk is None else SelectionRule(block_size, topk, num_local_blocks, num_init_blocks)
    return _core.Settings(block_size, default_scale(scale, q), default_scale(index_scale, index_q), rule, backend)


def default_scale(scale: float | None, x: Tensor) -> float:
    """Return `scale`, by default 1 / sqrt(the head dim of x)."""
    return x.shape[3] ** -0.5 if scale is None else scale
