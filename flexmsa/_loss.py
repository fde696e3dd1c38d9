"""`flexmsa.index_loss`, and what the public functions are asked about the loss, checked."""

import torch
from torch import Tensor

from flexmsa import _core, ops, validation
from flexmsa._dtensors import takes_dtensors
from flexmsa._layouts import reject_wrong_layouts
from flexmsa._sequences import check_sequences
from flexmsa._settings import default_scale
from flexmsa.backends import choose_backend
from flexmsa.types import AuxRequest

__all__ = ["check_count", "check_value", "index_loss"]


def check_value(value: Tensor | None, aux: AuxRequest, q: Tensor) -> None:
    """Check index_loss_value, to which the backward writes the loss."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"index_loss_value: expected a tensor, got {type(value).__name__}")
    if not aux.any_loss:
        raise ValueError("index_loss_value: expected None without a request for the loss; pass it in return_aux")
    if value.dim() != 0 or value.dtype not in (torch.float32, torch.float64) or value.requires_grad:
        raise ValueError(
            "index_loss_value: expected a float32 scalar without a gradient, such as torch.tensor(nan), got "
            f"{value.dtype} {list(value.shape)}, requires_grad={value.requires_grad}"
        )
    if value.device != q.device:
        raise ValueError(f"index_loss_value: expected on {q.device}, where q is, got {value.device}")


def check_count(name: str, count: Tensor | float | None, q: Tensor) -> Tensor | None:
    """Return the count, by which the sum of the losses is divided, as a scalar tensor on q's device, or None."""
    if count is None:
        return None
    if isinstance(count, (int, float)) and not isinstance(count, bool):
        if not count > 0:
            raise ValueError(f"{name}: expected a number > 0, got {count}")
        return torch.full((), float(count), dtype=torch.float64, device=q.device)
    if not isinstance(count, Tensor):
        raise TypeError(f"{name}: expected a number or a scalar tensor, got {type(count).__name__}")
    if count.dim() != 0 or count.requires_grad or count.dtype in (torch.bool, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name}: expected a scalar without a gradient, of integers or float32 or float64, got {count.dtype} "
            f"{list(count.shape)}, requires_grad={count.requires_grad}; fully_shard casts tensors that a module takes: "
            "give it float(count)"
        )
    if count.device != q.device:
        raise ValueError(f"{name}: expected on {q.device}, where q is, got {count.device}")
    # Without a query that sees a key, the sum is 0, and so is the mean.
    return torch.where(count > 0, count, torch.ones_like(count))


@takes_dtensors
def index_loss(
    q: Tensor,
    k: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    block_indices: Tensor | None,
    lse: Tensor,
    *,
    block_size: int = 128,
    scale: float | None = None,
    index_scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    kv_starts: Tensor | None = None,
    kv_lens: Tensor | None = None,
    count: Tensor | float | None = None,
    backend: str | None = None,
) -> Tensor:
    """The KL loss of the index branch against the main branch (paper, training).

    For each query and group, the loss is sum P (log P - log P_idx). P is the mean over the G heads of the main branch's
    probabilities, P_idx the softmax of index_scale * <index_q, index_k>, both over the visible keys of the selected
    blocks. The result is the mean over batch, groups and the queries that see a key. Only index_q and index_k get a
    gradient; with respect to the scores it is P_idx - P.

    Args:
        q, k: of the main branch, [B, Hq, Sq, D] and [B, Hkv, Sk, D].
        index_q, index_k: [B, Hkv, Sq, Di] and [B, 1, Sk, Di].
        block_indices: [B, Hkv, Sq, topk] as given to the main branch; None (every visible block) is the warm-up.
        lse: [B, Hq, Sq], of the main branch for the same blocks.
        count: a number or a scalar by which the sum is divided, instead of the number of groups and queries.
        Others: as for `attention`.

    Returns:
        Scalar float32 (float64 for float64 inputs).

    Raises:
        ValueError, TypeError: an argument is not as described.
        NotImplementedError: the named backend cannot run this.

    >>> q, k = torch.randn(1, 4, 32, 16), torch.randn(1, 2, 32, 16)
    >>> index_q, index_k = torch.randn(1, 2, 32, 16, requires_grad=True), torch.randn(1, 1, 32, 16)
    >>> ids = select_blocks(index_q, index_k, block_size=8, topk=2)
    >>> wanted = AuxRequest(lse=True)
    >>> out, aux = block_sparse_attention(q, k, k, ids, block_size=8, return_aux=wanted)
    >>> index_loss(q, k, index_q, index_k, ids, aux.lse, block_size=8).backward()
    >>> index_q.grad.shape
    torch.Size([1, 2, 32, 16])
    """
    validation.reject_context_parallel()
    validation.reject_forward_ad(q, k, index_q, index_k)
    try:
        validation.check_main_inputs(q, k, k, scale)
        validation.check_index_inputs(index_q, index_k, index_scale)
        validation.check_branches_match(q, k, index_q, index_k)
    except ValueError:
        reject_wrong_layouts(q=q, k=k, index_q=index_q, index_k=index_k)
        raise
    validation.check_settings(block_size)
    sequences = check_sequences(q, k.shape[2], cu_seqlens, kv_starts, kv_lens, cu_seqlens_q, cu_seqlens_k)
    validation.check_lse(lse, q)
    if block_indices is not None:
        validation.check_block_indices(block_indices, q.shape[0], k.shape[1], q.shape[2], q.device)
    backend = choose_backend("index_loss", backend, q)
    q, k, index_q, index_k = ops.cast_to_autocast(q.detach(), k.detach(), index_q, index_k)
    settings = _core.Settings(block_size, default_scale(scale, q), default_scale(index_scale, index_q), backend=backend)
    divisor = check_count("count", count, q)
    return _core.index_loss(q, k, index_q, index_k, block_indices, lse, sequences, settings, count=divisor)
