"""One rule for every comparison of floating-point results."""

import torch
from torch import Tensor

__all__ = ["assert_close", "product_size"]


def assert_close(name: str, actual: Tensor, exact: Tensor, baseline: Tensor, terms: float = 0.0) -> None:
    """Assert that `actual` is about as close to the exact result as eager PyTorch is in the same dtype.

    The largest error may be twice the baseline's, plus 8 units in the last place of the largest exact value, or of
    `terms` if that is larger. Where the exact result is finite, `actual` must be finite; where it is infinite, `actual`
    must be equal.

    Args:
        actual: the result under test.
        exact: the result in float64.
        baseline: the result of the same formula in eager PyTorch, in the dtype under test.
        terms: the size of terms that cancel in the result, but whose rounding errors remain.

    Raises:
        AssertionError: names the tensor, the worst element and its index.

    >>> x = torch.tensor([1.0, 2.0])
    >>> assert_close("x", x, x.double(), x)
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"{name}: expected shape {list(exact.shape)}, got {list(actual.shape)}")
    if actual.numel() == 0:
        return
    exact, baseline = exact.double(), baseline.double()
    finite = exact.isfinite()
    values = actual.double()
    wrong = torch.where(finite, ~values.isfinite(), (values != exact) & ~(values.isnan() & exact.isnan()))
    if wrong.any():
        raise AssertionError(f"{name}: {_place(wrong, values, exact)} ({int(wrong.sum())} such elements)")
    zero = torch.zeros_like(exact)
    error = torch.where(finite, (values - exact).abs(), zero)
    allowed = 2 * torch.where(finite, (baseline - exact).abs(), zero).nan_to_num(torch.inf).max()
    largest = max(float(torch.where(finite, exact.abs(), zero).max()), terms)
    allowed = allowed + 8 * torch.finfo(actual.dtype).eps * largest
    allowed = allowed + torch.finfo(actual.dtype).tiny
    if error.max() > allowed:
        worst = error == error.max()
        raise AssertionError(f"{name}: {_place(worst, values, exact)}, an error above the {allowed:.3g} allowed")


def product_size(q: Tensor, k: Tensor, scale: float | None = None) -> float:
    """The largest size of the terms of a score of q [..., D] and k [..., D], which may cancel in their sum.

    scale: the factor of the score, by default 1 / sqrt(D).

    >>> product_size(torch.full((1, 4), 3.0), torch.full((1, 4), -2.0))
    3.0
    """
    factor = q.shape[-1] ** -0.5 if scale is None else abs(scale)
    return float(q.detach().abs().max() * k.detach().abs().max()) * factor


def _place(mask: Tensor, values: Tensor, exact: Tensor) -> str:
    where = tuple(mask.nonzero()[0].tolist())
    return f"got {values[where]:.9g} for {exact[where]:.9g} at {where}"
