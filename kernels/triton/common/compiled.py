"""Kernels by the types of their arguments, and compiled: one, or many side by side."""

import contextlib
import functools
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from threading import Lock
from typing import Any, NamedTuple

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import driver
from triton.runtime.cache import triton_key

from .target import Target

# Times that a compilation is tried again after an error that is not its own.
RETRIES = 4
# Held while kernels are compiled and loaded. With Triton 3.6 all launchers are modules of one name, so that two threads
# that load them at one time may get each other's: one thread loads them, while no other compiles.
_compiling = Lock()


class MixedUp(contextlib.AbstractContextManager[None]):
    """Suppresses an error that comes from Python 3.11, which counts the depth of all threads that parse as one."""

    def __exit__(self, _: Any, error: BaseException | None, __: Any) -> bool:
        while error is not None:
            if isinstance(error, SystemError) and "recursion depth mismatch" in str(error):
                return True
            error = error.__cause__ or error.__context__
        return False


class Compiled:
    """A compiled kernel, ready to be launched on the device that was current when it was made."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.run, self.function, self.metadata = kernel.run, kernel.function, kernel.packed_metadata

    def launch(self, grid: tuple[int, int, int], values: list[Any], constants: Iterable[Any]) -> None:
        """Launch on the current stream."""
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        if enter.calls or leave.calls:
            # A profiler listens.
            self.kernel[grid](*values, *constants)
            return
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        self.run(*grid, stream, self.function, self.metadata, None, None, None, *values, *constants)


class Source(NamedTuple):
    """A kernel with the types of its arguments, without the arguments."""

    name: str
    source: Any
    options: dict[str, Any]

    def compile(self, target: Target) -> Any:
        """The kernel compiled for a target."""
        for _ in range(RETRIES):
            with MixedUp():
                return triton.compile(self.source, target=gpu_of(target), options=self.options)
        return triton.compile(self.source, target=gpu_of(target), options=self.options)

    def try_to_compile(self, target: Target) -> Any:
        """The kernel compiled for a target, or None if it does not compile."""
        with contextlib.suppress(Exception):
            kernel = self.compile(target)
            # With Triton 3.6 the C compiler makes its launcher, which takes as long as many a kernel. It is left in
            # Triton's cache and not used: see `_compiling`.
            driver.active.launcher_cls(kernel.src, kernel.metadata)
            return kernel
        return None


def in_thread(call: Callable[[], object]) -> Future[object]:
    """Call it in a thread of its own."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


@functools.cache
def begin_to_hash() -> Future[object]:
    """Begin to hash all of Triton's files, 0.3 s or more: the key of every kernel in its cache needs that."""
    return in_thread(triton_key)


@functools.cache
def begin_to_prepare(target: Target) -> tuple[Future[object], ...]:
    """Begin what each thread that compiles would otherwise do again.

    That is the hash, the assembler's version, which a process of its own tells, and Triton's library for the driver.
    """
    return begin_to_hash(), in_thread(lambda: make_backend(gpu_of(target)).hash()), in_thread(lambda: driver.active)


def gpu_of(target: Target) -> GPUTarget:
    """The target as Triton names it."""
    return GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)


def compile_alone(source: Source, target: Target) -> Compiled:
    """The kernel, compiled and ready for the current device."""
    with _compiling:
        return Compiled(source.compile(target))


def compile_sources(
    sources: dict[Hashable, Source], device: int, target: Target, report: Callable[[int, int, str], object]
) -> dict[Hashable, Compiled]:
    """Compile side by side for the current device; each kernel that compiles and loads, by its key.

    Threads do, because Triton compiles outside of Python's lock, but for reading the kernel's source.
    """
    wait(begin_to_prepare(target))
    compiled: dict[Hashable, Any] = {}
    with _compiling:
        pool = ThreadPoolExecutor(max_workers(), initializer=torch.cuda.set_device, initargs=(device,))
        try:
            keys = {pool.submit(source.try_to_compile, target): key for key, source in sources.items()}
            for done, future in enumerate(as_completed(keys), 1):
                if (kernel := future.result()) is not None:
                    compiled[keys[future]] = kernel
                report(done, len(sources), sources[keys[future]].name)
        finally:
            pool.shutdown(cancel_futures=True)
        loaded = {}
        for key, kernel in compiled.items():
            with contextlib.suppress(Exception):
                loaded[key] = Compiled(kernel)
        return loaded


def max_workers() -> int:
    """Threads that compile: this process's share of the cores, where torchrun starts several."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
