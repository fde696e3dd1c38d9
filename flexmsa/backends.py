"""The backend of each step: the known names, the default of a device, and errors for the others."""

import importlib.util
import os

from torch import Tensor

BACKENDS = {
    "select_blocks": ("torch", "triton", "reference"),
    "block_sparse_attention": ("torch", "flex", "triton", "reference"),
    "index_loss": ("torch", "triton", "reference"),
    "decode": ("torch", "triton", "reference"),
    "paged": ("torch", "triton"),
}
_ALL = ("torch", "flex", "triton", "reference")


# Evaluated once at import: torch.compile can trace neither expression.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _triton_runs(x: Tensor) -> bool:
    return _HAS_TRITON and (x.device.type == "cuda" or _INTERPRETED)


def default_backend(operation: str, x: Tensor) -> str:
    """Return the backend of `operation` for the device and dtype of `x` if the user names none."""
    if x.device.type != "cuda" or x.element_size() == 8:
        return "torch"
    if _triton_runs(x):
        return "triton"
    return "flex" if operation == "block_sparse_attention" else "torch"


def dense_backend(backend: str | None, x: Tensor) -> str:
    """Return the backend of the main branch in the warm-up, where it attends to every block."""
    # On a GPU, FlexAttention needs a head dim of at least 16.
    if backend is None and x.device.type == "cuda" and x.element_size() < 8 and x.shape[-1] >= 16:
        return "flex"
    return choose_backend("block_sparse_attention", backend, x)


def choose_backend(operation: str, backend: str | None, x: Tensor) -> str:
    """Return the backend for `operation` on `x`.

    Raises:
        ValueError: no backend has this name.
        NotImplementedError: the backend does not implement this operation, or does not run on this device.
    """
    if backend is None:
        return default_backend(operation, x)
    if backend not in _ALL:
        raise ValueError(f"backend: expected None or one of {', '.join(_ALL)}, got {backend!r}")
    if backend not in BACKENDS[operation]:
        raise NotImplementedError(
            f"backend={backend!r} has no kernel for {operation}: use backend=None, or one of "
            f"{', '.join(BACKENDS[operation])}"
        )
    if backend == "triton" and not _triton_runs(x):
        raise NotImplementedError(
            f"backend='triton' runs on CUDA tensors, got {x.device.type}: use backend=None, or set TRITON_INTERPRET=1 "
            "before importing triton to interpret the kernels"
        )
    return backend


def step_backend(operation: str, backend: str | None, x: Tensor) -> str:
    """Return the backend of one step of `attention`: the default if the named backend does not implement the step."""
    named = backend if backend is None or backend not in _ALL or backend in BACKENDS[operation] else None
    return choose_backend(operation, named, x)
