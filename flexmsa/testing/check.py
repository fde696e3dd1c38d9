"""`python -m flexmsa check`: compare flexmsa with the oracle on random cases."""

import argparse
import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor

import flexmsa
from flexmsa import ops, reference
from flexmsa.backends import default_backend
from flexmsa.kernels.sequences import key_ranges
from flexmsa.kernels.torch import decode as torch_decode
from flexmsa.kernels.torch import inverse_index as torch_inverse_index
from flexmsa.testing import oracle
from flexmsa.testing.assertions import assert_close, product_size
from flexmsa.testing.cases import Case
from flexmsa.testing.schedules import Schedule, check_schedule
from flexmsa.testing.strategies import cases, schedules

__all__ = ["check_case", "main"]

_ROUND = 25


def check_case(
    case: Case, device: str | torch.device = "cpu", backend: str | None = None, gradients: bool = True
) -> None:
    """Assert that selection, output, lse, loss and gradients of `flexmsa.attention` are right for one case.

    Args:
        case: shapes, settings and seed of the inputs.
        device: where to run.
        backend: as for `flexmsa.attention`.
        gradients: compare the gradients too.

    Raises:
        AssertionError: names the wrong result, and the element.

    >>> check_case(Case(seqlen_q=20, seqlen_k=20, group_size=3))
    """
    inputs, settings = case.inputs(device)
    inputs = tuple(x.requires_grad_(gradients) for x in inputs)
    aux = flexmsa.AuxRequest(lse=True, block_indices=True, index_loss=True)
    # Cases are small, so without this the kernels for many queries would never run.
    with kernels_for_many_queries(inputs[0], backend) if case.seed % 2 == 1 else nullcontext():
        out, got = flexmsa.attention(*inputs, **settings, backend=backend, return_aux=aux)
        assert got.lse is not None and got.index_loss is not None
        results = {"out": out, "lse": got.lse, "index_loss": got.index_loss}
        grads = _gradients(results, inputs) if gradients else {}

    expected = oracle.attention(*(x.detach().double().cpu().numpy() for x in inputs), **_on_host(settings))
    if got.block_indices is not None and expected.block_indices is not None:
        _assert_same_ids(got.block_indices, torch.from_numpy(expected.block_indices))
    assert (got.block_indices is None) == (expected.block_indices is None)
    exact = {name: torch.as_tensor(getattr(expected, name), dtype=torch.float64) for name in results}

    wide = tuple(x.detach().double().requires_grad_() for x in inputs)
    narrow = tuple(x.detach().clone().requires_grad_() for x in inputs)
    exact_reference = _reference(wide, settings, got.block_indices, torch.float64)
    baseline = _reference(narrow, settings, got.block_indices, inputs[0].dtype)
    # The loss is a difference of two entropies, at most log(keys) each. With one key, lse is its score.
    terms = {"index_loss": math.log(1 + case.seqlen_k), "lse": product_size(*inputs[:2])}
    for name, result in results.items():
        assert_close(name, result.detach().cpu(), exact[name], baseline[name].detach().cpu(), terms.get(name, 0.0))
    if not gradients:
        return
    exact = _gradients(exact_reference, wide)
    baseline = _gradients(baseline, narrow)
    terms = _cancelling_terms(inputs, got.lse)
    for name, result in grads.items():
        assert_close(f"gradient of {name}", result.cpu(), exact[name].cpu(), baseline[name].cpu(), terms[name])


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


def _on_host(settings: dict) -> dict:
    return {name: x.cpu().numpy() if isinstance(x, Tensor) else x for name, x in settings.items()}


def _assert_same_ids(got: Tensor, expected: Tensor) -> None:
    differ = (got.cpu().long() != expected).any(-1)
    if differ.any():
        b, r, i = differ.nonzero()[0].tolist()
        raise AssertionError(
            f"block_indices: got {got[b, r, i].tolist()} for {expected[b, r, i].tolist()} at batch {b}, group {r}, "
            f"query {i} ({int(differ.sum())} such rows)"
        )


def _reference(
    inputs: tuple[Tensor, ...], settings: dict, block_indices: Tensor | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    q, k, v, index_q, index_k = inputs
    sequences = ops.sequence_table(q, settings["cu_seqlens"], settings["kv_starts"], settings["kv_lens"], k.shape[2])
    start, end = key_ranges(sequences, q.shape[0], q.shape[2])
    block_size, scale, index_scale = settings["block_size"], q.shape[3] ** -0.5, index_q.shape[3] ** -0.5
    out, lse = reference.block_sparse_attention(q, k, v, block_indices, start, end, block_size, scale, dtype)
    loss = reference.index_loss(
        q, k, index_q, index_k, block_indices, start, end, block_size, scale, index_scale, dtype
    )
    return {"out": out, "lse": lse, "index_loss": loss}


def _gradients(results: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Gradients of a fixed combination of out and lse by q, k, v, and of the loss by index_q, index_k."""
    out, lse = results["out"], results["lse"]
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape).to(out.dtype)
    seen = lse.isfinite()
    main = (out * weight).sum() + lse.masked_fill(~seen, 0.0).sum()
    names = ("q", "k", "v", "index_q", "index_k")
    grads = torch.autograd.grad((main, results["index_loss"]), inputs, materialize_grads=True)
    return dict(zip(names, grads, strict=True))


def _cancelling_terms(inputs: tuple[Tensor, ...], lse: Tensor) -> dict[str, float]:
    """The size of the terms that cancel in each gradient.

    For q and k, the gradient of a score is <grad_out, v> - <grad_out, out>: sums of D terms of either sign, at most
    max |v| each, times the scale 1 / sqrt(D). For v it is a sum over the heads of a group, and for index_q and index_k
    it is P_index - P divided by the number of rows in the mean. The weights e^(S - lse) in these have the error of S
    and lse, in the dtype of lse.
    """
    q, k, v, index_q, index_k = (float(x.detach().abs().max()) for x in inputs)
    num_heads, num_kv_heads = inputs[0].shape[1], inputs[1].shape[1]
    rows = max(1, int(lse.isfinite().sum()) * num_kv_heads // num_heads)
    wrong = product_size(*inputs[:2]) * torch.finfo(lse.dtype).eps / torch.finfo(inputs[0].dtype).eps
    share = (1 + wrong) * inputs[3].shape[3] ** -0.5 / rows
    heads = wrong * num_heads / num_kv_heads
    return {"q": v * k, "k": v * q, "v": heads, "index_q": share * index_k, "index_k": share * index_q}


def main(argv: list[str]) -> int:
    """Fuzz this installation; return 0 if every case passed, 1 if one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa check",
        description="Compare flexmsa with float64 oracles on random shapes, settings and inputs, and on random "
        "schedules of operations on a cache.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to try new cases (default 60)")
    parser.add_argument("--backend", default=None, help="as for flexmsa.attention (default: the device's default)")
    parser.add_argument("--dtype", action="append", choices=["float32", "float16", "bfloat16"], help="may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases (default 0)")
    options = parser.parse_args(argv)
    dtypes = tuple(options.dtype or (["float32"] if options.device == "cpu" else ["bfloat16", "float16"]))
    # Every new combination of sizes compiles a new FlexAttention kernel, more than a model ever needs.
    torch._dynamo.config.recompile_limit = 4096
    torch._dynamo.config.accumulated_recompile_limit = 4096
    _describe(options, dtypes)

    tried: dict[str, int] = {}
    failed: list[tuple[Case | Schedule, str]] = []
    deadline = time.monotonic() + options.seconds
    number = 0
    try:
        while time.monotonic() < deadline and not failed:
            _try_round(options, dtypes, options.seed + number, tried, failed, deadline)
            number += 1
    except KeyboardInterrupt:
        print("\nstopped", end="")
    print()
    for kind, count in sorted(tried.items()):
        print(f"  {count:6d} {kind}")
    if not failed:
        print("every case agreed with the oracle")
        return 0
    _print_failure(*failed[-1], options)
    return 1


def _print_failure(case: Case | Schedule, message: str, options: argparse.Namespace) -> None:
    print(f"\nFAILED: {message}\n\nthe smallest failing case found, as code:\n")
    check = _checker(case)
    print(f"from flexmsa.testing import {type(case).__name__}, {check.__name__}")
    print(f"{check.__name__}({case!r}, device={options.device!r}, backend={options.backend!r})")


def _describe(options: argparse.Namespace, dtypes: tuple[str, ...]) -> None:
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    probe = torch.empty(0, device=device)
    backend = options.backend or default_backend("block_sparse_attention", probe)
    print(f"flexmsa {flexmsa.__version__}, torch {torch.__version__}, on {where}")
    print(f"main branch: {backend}; dtypes: {', '.join(dtypes)}; for {options.seconds:g} s, seed {options.seed}")


def _try_round(
    options: argparse.Namespace,
    dtypes: tuple[str, ...],
    number: int,
    tried: dict[str, int],
    failed: list[tuple[Case | Schedule, str]],
    deadline: float,
) -> None:
    """Draw a round of cases, or every second time of schedules; after a failure, hypothesis shrinks the failing one."""
    serving = number % 2 == 1 and options.backend != "flex"

    @seed(number)
    @settings(
        max_examples=_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(schedules(dtypes=dtypes) if serving else cases(dtypes=dtypes))
    def attempt(case: Case | Schedule) -> None:
        if not failed and time.monotonic() > deadline:
            return
        kind = f"{case.dtype} {_layout(case)}"
        tried[kind] = tried.get(kind, 0) + 1
        doing = "shrinking the failing case" if failed else f"{max(0, deadline - time.monotonic()):.0f} s left"
        print(f"\r{sum(tried.values())} cases tried, {doing:<30}", end="", flush=True)
        try:
            _checker(case)(case, options.device, options.backend)
        except Exception as error:
            failed.append((case, f"{type(error).__name__}: {error}" if str(error) else traceback.format_exc()))
            raise

    try:
        attempt()
    except Exception:
        if not failed:
            raise


def _checker(case: Case | Schedule) -> Callable[..., None]:
    return check_schedule if isinstance(case, Schedule) else check_case


def _layout(case: Case | Schedule) -> str:
    if isinstance(case, Schedule):
        formats = ", e4m3" if case.fp8_index or case.fp8_keys else ""
        return f"serving, {'paged' if case.paged else 'contiguous'}{formats}"
    if case.topk is None:
        return "warm-up"
    if case.cu_seqlens:
        return "packed documents"
    if case.kv_lens:
        return "part-filled cache"
    return "left padding" if case.kv_starts else "plain"
