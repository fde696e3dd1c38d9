"""Compare one call of flexmsa with two definitions that share no code with it.

`flexmsa.reference` in float64 runs on the device of the call; `oracle`, in NumPy, is slow for more than a few hundred
queries, and does not share a line with the reference.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

import flexmsa
from flexmsa import reference
from flexmsa._sequences import check_sequences
from flexmsa.backends import default_backend
from flexmsa.kernels.torch import decode as torch_decode
from flexmsa.kernels.torch import inverse_index as torch_inverse_index
from flexmsa.testing import oracle
from flexmsa.testing.assertions import assert_close, product_size
from flexmsa.testing.cases import LENGTHS, Case

__all__ = ["check_case"]


class _Expected(NamedTuple):
    """exact: out, lse and index_loss in float64, of `inputs`, for the gradients; baseline: in the dtype under test."""

    exact: dict[str, Tensor]
    exact_inputs: tuple[Tensor, ...]
    baseline: dict[str, Tensor]
    baseline_inputs: tuple[Tensor, ...]


def check_case(
    case: Case,
    device: str | torch.device = "cpu",
    backend: str | None = None,
    gradients: bool = True,
    numpy_oracle: bool = True,
) -> None:
    """Assert that selection, output, lse, loss and gradients of flexmsa are right for one case.

    Args:
        case: shapes, settings and seed of the inputs.
        device: where to run.
        backend: as for `flexmsa.attention`.
        gradients: compare the gradients too.
        numpy_oracle: take the right results from the NumPy oracle, not from `flexmsa.reference` on the device; the
            right gradients are the reference's in any case.

    Raises:
        AssertionError: names the wrong result, and the element.

    >>> check_case(Case(seqlen_q=20, seqlen_k=20, group_size=3))
    """
    inputs, settings = case.inputs(device)
    inputs = tuple(x.requires_grad_(gradients) for x in inputs)
    given = case.block_indices(device)
    # Cases are small, so without this the kernels for many queries would never run.
    with kernels_for_many_queries(inputs[0], backend) if case.seed % 2 == 1 else nullcontext():
        results, ids, value = _run(case, inputs, settings, given, backend)
        grads = _gradients(case, results, inputs) if gradients else {}
    if value is not None:
        results["index_loss"] = value
    # A key that no query sees may be NaN; the references multiply it by 0.
    clean = tuple(x.detach().nan_to_num(0.0) if case.values == "unseen NaN" else x.detach() for x in inputs)
    expected = _references(case, clean, settings, ids)
    exact = {name: x.detach() for name, x in expected.exact.items()}
    right_ids = given
    if numpy_oracle:
        found = _oracle(clean, settings, given)
        exact = {name: torch.as_tensor(getattr(found, name), dtype=torch.float64, device=device) for name in exact}
        right_ids = None if found.block_indices is None else torch.from_numpy(found.block_indices).to(device)
    elif given is None and case.topk is not None:
        right_ids = _selected(clean, settings)
    assert (ids is None) == (right_ids is None)
    if ids is not None and right_ids is not None:
        _assert_same_ids(ids, right_ids)
    errors = _score_errors(case, clean, results["lse"])
    # The loss is a difference of two entropies, at most log(keys) each. With one key, lse is its score.
    terms = {"index_loss": math.log(1 + case.seqlen_k), "lse": _product_sizes(case, clean)[0]}
    if _is_sharp(case):
        terms["out"] = errors.main * float(clean[2].abs().max())
        # A probability has the error of its main score, and is multiplied by the index score, a sum of Di terms.
        index_score = _product_sizes(case, clean)[1] * case.index_head_dim**0.5
        terms["index_loss"] += (1 + terms["lse"]) * (1 + index_score)
    used = backend or default_backend("block_sparse_attention", inputs[0])
    if value is not None and used == "triton" and inputs[0].element_size() == 2:
        terms["index_loss"] += teacher_term(case, results["lse"], exact["index_loss"])
    if inputs[0].element_size() == 2 and inputs[0].device.type == "cpu":
        # PyTorch's fused kernel, which takes a few such queries, approximates exp. The loss has the error of its lse.
        terms["index_loss"] += _largest_error(results["lse"], exact["lse"]) / torch.finfo(results["lse"].dtype).eps
    for name, right in exact.items():
        assert_close(name, results[name].detach(), right, expected.baseline[name].detach(), terms.get(name, 0.0))
    if gradients:
        right_grads = _gradients(case, expected.exact, expected.exact_inputs)
        baseline = _gradients(case, expected.baseline, expected.baseline_inputs)
        terms = _cancelling_terms(case, clean, results["lse"], errors)
        for name, grad in grads.items():
            assert_close(f"gradient of {name}", grad, right_grads[name], baseline[name], terms[name])


@contextmanager
def kernels_for_many_queries(q: Tensor, backend: str | None) -> Iterator[None]:
    """Run the kernels for many queries, however few there are.

    >>> with kernels_for_many_queries(torch.empty(1, 4, 1, 16), None):
    ...     check_case(Case(seqlen_q=3, seqlen_k=50))
    """
    backend = backend or default_backend("block_sparse_attention", q)
    with ExitStack() as stack:
        if backend == "torch":
            stack.enter_context(patch.object(torch_decode, "FEW_QUERIES", 0))
            stack.enter_context(patch.object(torch_inverse_index, "LEAST_FILLED", 0))
        if backend == "triton":
            from flexmsa.kernels.triton.serving import launch

            stack.enter_context(patch.multiple(launch, FEW_QUERIES=0, FEW_ROWS=0))
        yield


def _run(
    case: Case, inputs: tuple[Tensor, ...], settings: dict[str, Any], given: Tensor | None, backend: str | None
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """The results under test, the ids attended to, and the tensor that the backward writes the loss to."""
    with_loss = case.values != "odd scores"
    q, k, v, index_q, index_k = inputs
    value = None
    if given is None:
        if case.deferred and with_loss and q.requires_grad:
            value = torch.full((), torch.nan, device=q.device)
        aux = flexmsa.AuxRequest(lse=True, block_indices=True, index_loss=with_loss)
        how: dict[str, Any] = {**settings, "backend": backend, "return_aux": aux, "index_loss_value": value}
        out, got = flexmsa.attention(q, k, v, index_q, index_k, **how)
        loss, lse = got.index_loss, got.lse
    else:
        names = ("block_size", "scale", *LENGTHS)
        how = {name: settings[name] for name in names}
        aux = flexmsa.AuxRequest(lse=True, block_indices=True)
        out, got = flexmsa.block_sparse_attention(q, k, v, given, **how, backend=backend, return_aux=aux)
        loss, lse = None, got.lse
        assert lse is not None
        if with_loss:
            how |= {"index_scale": settings["index_scale"], "backend": None if backend == "flex" else backend}
            loss = flexmsa.index_loss(q, k, index_q, index_k, given, lse, **how)
    assert lse is not None
    results = {"out": out, "lse": lse}
    if loss is not None:
        results["index_loss"] = loss
    return results, got.block_indices, value


def _oracle(inputs: tuple[Tensor, ...], settings: dict[str, Any], given: Tensor | None) -> oracle.Oracle:
    host: dict[str, Any] = {name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in settings.items()}
    ids = None if given is None else given.cpu().numpy()
    # The loss of odd scores is NaN.
    with np.errstate(invalid="ignore"):
        return oracle.attention(*(x.double().cpu().numpy() for x in inputs), **host, block_indices=ids)


def _assert_same_ids(got: Tensor, expected: Tensor) -> None:
    differ = (got.long() != expected.long()).any(-1)
    if differ.any():
        b, r, i = differ.nonzero()[0].tolist()
        raise AssertionError(
            f"block_indices: got {got[b, r, i].tolist()} for {expected[b, r, i].tolist()} at batch {b}, group {r}, "
            f"query {i} ({int(differ.sum())} such rows)"
        )


def _largest_error(lse: Tensor, exact: Tensor) -> float:
    """The largest error where both are finite."""
    return float((lse.detach().double() - exact).masked_fill(~(lse.isfinite() & exact.isfinite()), 0.0).abs().max())


def teacher_term(case: Case, lse: Tensor, exact: Tensor) -> float:
    """The size of terms with float32's error for the error that the loss has where P is kept in float16.

    That error is P log(P / P_index) times float16's rounding, of either sign: summed over the keys of a row at most
    KL + 2 / e, and less in the mean over rows.
    """
    rows = max(1, int(lse.isfinite().sum()) // case.group_size)
    unit = torch.finfo(torch.float16).eps / torch.finfo(lse.dtype).eps
    return unit * (float(exact) + 2 / math.e) / 8 / rows**0.5


def _ranges(inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    q, k = inputs[:2]
    return check_sequences(q, k.shape[2], **{name: settings[name] for name in LENGTHS}).key_ranges()


def _selected(inputs: tuple[Tensor, ...], settings: dict[str, Any]) -> Tensor:
    """The reference's selection, in float64."""
    rule = (settings[name] for name in ("block_size", "topk", "num_local_blocks", "num_init_blocks"))
    index_q, index_k = (x.double() for x in inputs[3:])
    return reference.select_blocks(index_q, index_k, *_ranges(inputs, settings), *rule)


def _references(
    case: Case, inputs: tuple[Tensor, ...], settings: dict[str, Any], block_indices: Tensor | None
) -> _Expected:
    ranges, block_size = _ranges(inputs, settings), case.block_size
    scale, index_scale = _scales(case)

    def run(dtype: torch.dtype, leaves: tuple[Tensor, ...]) -> dict[str, Tensor]:
        q, k, v, index_q, index_k = leaves
        out, lse = reference.block_sparse_attention(q, k, v, block_indices, *ranges, block_size, scale, dtype)
        results = {"out": out, "lse": lse}
        if case.values != "odd scores":
            branches = q, k, index_q, index_k, block_indices
            results["index_loss"] = reference.index_loss(*branches, *ranges, block_size, scale, index_scale, dtype)
        return results

    wide = tuple(x.double().requires_grad_() for x in inputs)
    narrow = tuple(x.clone().requires_grad_() for x in inputs)
    return _Expected(run(torch.float64, wide), wide, run(inputs[0].dtype, narrow), narrow)


def _scales(case: Case) -> tuple[float, float]:
    """The factors of main scores and of index scores."""
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    return scale, case.index_head_dim**-0.5 if case.index_scale is None else case.index_scale


def _gradients(case: Case, results: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradients of a fixed combination of out and lse by q, k, v, and of the loss by index_q, index_k."""
    out, lse = results["out"], results["lse"]
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape).to(out.dtype)
    main = (out * weight).sum()
    if case.lse_gradient:
        main = main + lse.masked_fill(~lse.isfinite(), 0.0).sum()
    names = ("q", "k", "v", "index_q", "index_k")
    outputs = (main, results["index_loss"]) if "index_loss" in results else (main,)
    grads = torch.autograd.grad(outputs, inputs, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


class _ScoreErrors(NamedTuple):
    """The rounding errors of main and index scores, relative to an error of the inputs' dtype."""

    main: float
    index_branch: float


def _score_errors(case: Case, inputs: tuple[Tensor, ...], lse: Tensor) -> _ScoreErrors:
    """The weights e^(S - lse) have the error of S and lse, which is that of a product, in the dtype of lse."""
    unit = torch.finfo(lse.dtype).eps / torch.finfo(inputs[0].dtype).eps
    sizes = _product_sizes(case, inputs)
    main = sizes[0] * unit
    if not _is_sharp(case):
        return _ScoreErrors(main, 0.0)
    # The sizes of sums of D terms of either sign.
    index = sizes[1] * unit
    return _ScoreErrors(main * case.head_dim**0.5, index * case.index_head_dim**0.5)


def _product_sizes(case: Case, inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """The sizes of the terms of main scores and of index scores."""
    q, k, _, index_q, index_k = inputs
    return product_size(q, k, case.scale), product_size(index_q, index_k, case.index_scale)


def _is_sharp(case: Case) -> bool:
    """Whether scores are so large that their rounding errors show in all results."""
    return case.values == "huge" or case.scale is not None or case.index_scale is not None


def _size(x: Tensor) -> float:
    """The largest number; of 16 bits the typical one, as the baseline rounds all that cancels to 16 bits itself."""
    return float(x.double().square().mean().sqrt() if x.element_size() == 2 else x.abs().max())


def _cancelling_terms(case: Case, inputs: tuple[Tensor, ...], lse: Tensor, errors: _ScoreErrors) -> dict[str, float]:
    """The size of the terms that cancel in each gradient.

    For q and k, the gradient of a score is <grad_out, v> - <grad_out, out>: sums of D terms of either sign, each
    of the size of v, times the scale, 1 / sqrt(D) by default. For v it is a sum over the heads of a group, and for
    index_q and index_k it is P_index - P divided by the number of rows in the mean.
    """
    q, k, v, index_q, index_k = map(_size, inputs)
    scale, index_scale = _scales(case)
    rows = max(1, int(lse.isfinite().sum()) // case.group_size)
    factor = abs(scale) * case.head_dim**0.5
    share = (1 + errors.main + errors.index_branch) * abs(index_scale) / rows
    heads = errors.main * case.group_size
    if _is_sharp(case):
        v = (v + case.lse_gradient) * (1 + errors.main)
    return {
        "q": factor * v * k,
        "k": factor * v * q,
        "v": heads,
        "index_q": share * index_k,
        "index_k": share * index_q,
    }
