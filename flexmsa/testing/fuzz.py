"""`python -m flexmsa check`: compare flexmsa with its definitions on random cases."""

import argparse
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, count
from typing import Any, Protocol

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

import flexmsa
from flexmsa._command import USAGE_ERROR, find_device_problem
from flexmsa.backends import choose_backend
from flexmsa.testing import strategies
from flexmsa.testing.cases import Case
from flexmsa.testing.check import check_case
from flexmsa.testing.paged_steps import PagedStep, check_paged_step
from flexmsa.testing.schedules import Schedule, check_schedule

__all__ = ["main"]

# Cases per round, and shapes per draw.
_ROUND, _DRAWN = 25, 40
# The NumPy oracle takes about 0.1 ms for a row (a query of a group). On a GPU it checks one in eight small cases.
_ORACLE_ROWS, _ORACLE_SHARE = 200, 8
# Shapes of a GPU: any, those that Hopper has kernels of its own for, and caches.
_ANY: dict[str, Any] = {
    "group_sizes": (1, 2, 3, 4, 5, 7, 8, 12, 16, 32),
    "head_dims": (16, 24, 32, 64, 80, 96, 128, 192, 256),
    "block_sizes": (16, 32, 48, 64, 128, 256),
    "topks": (1, 2, 3, 4, 5, 8, 16),
}
_HOPPER: dict[str, Any] = {
    "group_sizes": (8, 16, 32),
    "head_dims": (64, 128),
    "block_sizes": (128,),
    "topks": (1, 2, 4, 16),
    "warmup": False,
    "usual": True,
}
_CACHES: dict[str, Any] = {
    "group_sizes": (1, 2, 3, 4, 8, 16),
    "head_dims": (16, 32, 64, 80, 128),
    "block_sizes": (8, 16, 32, 64, 128),
}
GPU_LENGTHS: dict[str, Any] = {"max_tokens": 640, "long_keys": 12_000, "garbage": True}
GPU_STEPS: dict[str, Any] = {"max_queries": 300, "max_keys": 900}

Tested = Case | Schedule | PagedStep


@dataclass
class _Progress:
    """What was tried and what failed; `show` prints it on a terminal."""

    deadline: float
    kinds: Counter[str] = field(default_factory=Counter)
    values: Counter[str] = field(default_factory=Counter)
    shapes: set[tuple] = field(default_factory=set)
    failed: list[tuple[Tested, str]] = field(default_factory=list)
    agreed: int = 0
    device_lost: bool = False

    @property
    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def add(self, case: Tested) -> None:
        self.kinds[f"{case.dtype} {case.kind}"] += 1
        self.shapes.add(case.shape)
        if isinstance(case, Case):
            self.values[case.values] += 1
            self.values[f"{case.ids} ids"] += case.topk is not None

    def show(self, doing: str = "") -> None:
        if sys.stdout.isatty():
            doing = doing or ("shrinking the failing case" if self.failed else f"{self.seconds_left:.0f} s left")
            tried = f"{sum(self.kinds.values())} cases of {len(self.shapes)} shapes tried"
            print(f"\r{tried}, {doing:<40}", end="", flush=True)


class _Source(Protocol):
    """Where the cases of each round come from."""

    def round(self, number: int) -> SearchStrategy[Tested] | None:
        """The strategy of a round; None if there is nothing to try yet."""

    def stop(self) -> str:
        """End what was begun; returns a line for the summary, or nothing."""


class _AnyShape:
    """Every case has a shape of its own: nothing is compiled."""

    def __init__(self, options: argparse.Namespace, dtypes: tuple[str, ...]) -> None:
        self._dtypes = dtypes
        # What each backend has kernels for.
        count = {"flex": 1, "reference": 2}.get(options.backend, 3)
        self._draws: Any = (strategies.cases, strategies.schedules, strategies.paged_steps)[:count]

    def round(self, number: int) -> SearchStrategy[Tested] | None:
        return self._draws[number % len(self._draws)](dtypes=self._dtypes)

    def stop(self) -> str:
        return ""


class _CompiledShapes:
    """Many cases of each shape that is compiled, while other processes compile the next ones."""

    def __init__(self, options: argparse.Namespace, dtypes: tuple[str, ...], progress: _Progress) -> None:
        from flexmsa.kernels.triton.common.launch import compiled_keys
        from flexmsa.kernels.triton.common.target import target_of
        from flexmsa.testing.ahead import Ahead

        self._progress, self._keys = progress, compiled_keys
        self._rounds: Counter[Tested] = Counter()
        shapes = draw_shapes(dtypes, options.seed)
        device = torch.device(options.device)
        target = target_of(torch.device("cuda", torch.cuda.current_device()) if device.index is None else device)
        self._ahead = Ahead(shapes, target, max(1, (len(os.sched_getaffinity(0))) - 1))

    def round(self, number: int) -> SearchStrategy[Tested] | None:
        self._ahead.advance()
        if not self._ahead.ready:
            self._progress.show("compiling the first shape")
            self._ahead.wait(min(1.0, self._progress.seconds_left))
            return None
        shape = min(self._ahead.ready, key=lambda shape: self._rounds[shape])
        self._rounds[shape] += 1
        if isinstance(shape, Case):
            return strategies.variations(shape, **GPU_LENGTHS)
        if isinstance(shape, Schedule):
            return strategies.schedule_variations(shape)
        return strategies.paged_variations(shape, **GPU_STEPS)

    def stop(self) -> str:
        self._ahead.stop()
        late = [key for key in self._keys() if key not in self._ahead.keys]
        names = ", ".join(sorted({key[0].__name__ for key in late})) or "none"
        return f"{len(self._ahead.keys)} kernels compiled ahead; {len(late)} when they were launched: {names}"


def draw_shapes(dtypes: tuple[str, ...], first_seed: int) -> Iterator[Tested]:
    """Distinct shapes without end: in turn any, one for Hopper, any, a cache, and a step of an engine."""
    known: set[Tested] = set()
    for number in count(first_seed):
        any_shape = _draw(strategies.shapes(dtypes=dtypes, **_ANY), number)
        hopper = _draw(strategies.shapes(dtypes=dtypes, **_HOPPER), number)
        caches = _draw(strategies.schedule_shapes(dtypes=dtypes, capacity=384, **_CACHES), number)
        steps = _draw(strategies.paged_shapes(dtypes=dtypes, **_CACHES), number)
        for shape in chain.from_iterable(zip(any_shape[::2], hopper, any_shape[1::2], caches, steps, strict=False)):
            if shape not in known:
                known.add(shape)
                yield shape


def _draw(strategy: SearchStrategy[Any], number: int) -> list[Any]:
    """Examples, as many as one draw of shapes takes at most."""
    drawn: list[Any] = []

    @seed(number)
    @_settings(_DRAWN, (Phase.generate,))
    @given(strategy)
    def note(example: Any) -> None:
        drawn.append(example)

    note()
    return drawn


def _settings(examples: int, phases: tuple[Phase, ...]) -> settings:
    return settings(
        max_examples=examples,
        phases=phases,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


def main(argv: list[str]) -> int:
    """Fuzz this installation; return 0 if every case passed, 1 if one failed."""
    options = _parse(argv)
    dtypes = tuple(options.dtype or (["float32"] if options.device == "cpu" else ["bfloat16", "float16"]))
    # Every new combination of sizes compiles a new FlexAttention kernel, more than a model ever needs.
    torch._dynamo.config.recompile_limit = 4096
    torch._dynamo.config.accumulated_recompile_limit = 4096
    compiled = _describe(options, dtypes)
    start = time.monotonic()
    progress = _Progress(start + options.seconds)
    source: _Source = _CompiledShapes(options, dtypes, progress) if compiled else _AnyShape(options, dtypes)
    try:
        with compiled_ahead(compiled):
            for number in count():
                if not progress.seconds_left or progress.failed:
                    break
                strategy = source.round(number)
                if strategy is not None:
                    _try_round(strategy, options, options.seed + number, progress)
    except KeyboardInterrupt:
        print("\nstopped", end="")
    finally:
        found = source.stop()
    print()
    for kind, times in sorted(progress.kinds.items()):
        print(f"  {times:6d} {kind}")
    print("of layers: " + ", ".join(f"{times} {kind}" for kind, times in sorted(progress.values.items())))
    tried = f"{sum(progress.kinds.values())} cases of {len(progress.shapes)} shapes"
    print(f"{tried} in {time.monotonic() - start:.0f} s" + (f"; {found}" if found else ""))
    if progress.failed:
        _print_failure(*progress.failed[-1], options)
        return 1
    if not progress.agreed:
        print("no case was compared to its end: nothing is known; give it more --seconds")
        return 1
    print("every case agreed with the oracle")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flexmsa check",
        description="Compare flexmsa with float64 oracles on random shapes, settings and inputs, on random "
        "schedules of operations on a cache, and on random steps of an engine. On a GPU many cases share each set of "
        "compiled kernels, and the other cores compile the next sets.",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to try new cases (default 60)")
    parser.add_argument("--backend", default=None, help="as for flexmsa.attention (default: the device's default)")
    parser.add_argument("--dtype", action="append", choices=["float32", "float16", "bfloat16"], help="may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases (default 0)")
    options = parser.parse_args(argv)
    if problem := _find_problem(options):
        parser.exit(USAGE_ERROR, f"{parser.prog}: {problem}\n")
    return options


def _find_problem(options: argparse.Namespace) -> str | None:
    """Return a message if these options leave nothing to try on this machine."""
    if not options.seconds > 0:
        return f"--seconds: expected more than 0, got {options.seconds:g}"
    if problem := find_device_problem(options.device):
        return problem
    try:
        choose_backend("block_sparse_attention", options.backend, torch.empty(0, device=options.device))
    except (ValueError, NotImplementedError) as error:
        return f"--{error}"
    if options.backend == "flex" and torch.device(options.device).type == "cpu":
        return "--backend: FlexAttention on a CPU computes no gradient: expected torch or reference, got 'flex'"
    return None


def _describe(options: argparse.Namespace, dtypes: tuple[str, ...]) -> bool:
    """Print what is tried, and return whether its kernels are compiled for each shape."""
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    backend = choose_backend("block_sparse_attention", options.backend, torch.empty(0, device=device))
    print(f"flexmsa {flexmsa.__version__}, torch {torch.__version__}, on {where}")
    print(f"main branch: {backend}; dtypes: {', '.join(dtypes)}; for {options.seconds:g} s, seed {options.seed}")
    return backend == "triton" and device.type == "cuda"


def compiled_ahead(compiled: bool) -> AbstractContextManager[None]:
    """If shapes are compiled ahead, keep the first launch of a step from compiling for lengths that no case has."""
    if not compiled:
        return nullcontext()
    from flexmsa.kernels.triton.common.launch import expected

    return expected(lambda: None)


def _try_round(strategy: SearchStrategy[Tested], options: argparse.Namespace, number: int, progress: _Progress) -> None:
    """Draw and try a round of cases; after a failure, hypothesis shrinks the failing one."""

    @seed(number)
    @_settings(_ROUND, (Phase.generate, Phase.shrink))
    @given(strategy)
    def attempt(case: Tested) -> None:
        if progress.device_lost or (not progress.failed and not progress.seconds_left):
            return
        progress.add(case)
        progress.show()
        try:
            _checker(case)(case, **_arguments(case, options))
            progress.agreed += 1
        except Exception as error:
            message = f"{type(error).__name__}: {error}" if str(error) else traceback.format_exc()
            progress.failed.append((case, message))
            # After an illegal access every call fails, and the smallest case would not be one that is wrong.
            progress.device_lost = _is_lost(options.device)
            raise

    try:
        attempt()
    except Exception:
        if not progress.failed:
            raise


def _is_lost(device: str) -> bool:
    try:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _checker(case: Tested) -> Callable[..., None]:
    if isinstance(case, Case):
        return check_case
    return check_schedule if isinstance(case, Schedule) else check_paged_step


def _arguments(case: Tested, options: argparse.Namespace) -> dict[str, Any]:
    arguments = {"device": options.device, "backend": options.backend}
    if not isinstance(case, Case) or torch.device(options.device).type == "cpu":
        return arguments
    if case.topk is None:
        # By default FlexAttention runs the warm-up, and compiles for 10 seconds for each shape.
        arguments["backend"] = options.backend or "triton"
    small = case.batch * case.num_kv_heads * case.seqlen_q <= _ORACLE_ROWS
    return {**arguments, "numpy_oracle": small and case.seed % _ORACLE_SHARE == 0}


def _print_failure(case: Tested, message: str, options: argparse.Namespace) -> None:
    print(f"\nFAILED: {message}\n\nthe smallest failing case found, as code:\n")
    check = _checker(case)
    print(f"from flexmsa.testing import {type(case).__name__}, {check.__name__}")
    arguments = ", ".join(f"{name}={value!r}" for name, value in _arguments(case, options).items())
    print(f"{check.__name__}({case!r}, {arguments})")
