"""Compile the kernels of random shapes in other processes, into Triton's cache on disk, before the shapes are tried.

Needs Triton, so `flexmsa.testing` does not import it by itself.
"""

import functools
import itertools
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace

import torch

from flexmsa.kernels.triton.common.launch import Launch, compile_key
from flexmsa.kernels.triton.common.target import Target
from flexmsa.kernels.triton.layer import CacheFormat, Layer
from flexmsa.kernels.triton.selection.launch import VARIANTS
from flexmsa.kernels.triton.serving.config import MOST_SPLITS
from flexmsa.testing import launches as recorded
from flexmsa.testing.cases import Case
from flexmsa.testing.launches import StepFormat
from flexmsa.testing.paged_steps import PagedStep
from flexmsa.testing.schedules import Schedule, dtype_of

Shape = Case | Schedule | PagedStep
# Numbers of queries that between them take every row tile of the selection.
QUERIES = (1, 2, 5, 8, 16, 30, 64, 3000)
# Kernels in work or waiting, per process: enough that no process waits while the main one tries cases.
QUEUED = 8


@functools.lru_cache(maxsize=4)
def launches_of(shape: Shape, target: Target) -> tuple[Launch, ...]:
    """Launches of all kernels that the variations of a shape take, each once."""
    if isinstance(shape, Case):
        found = _layer_launches(shape, target)
    elif isinstance(shape, Schedule):
        found = _cache_launches(shape, target)
    else:
        found = _step_launches(shape, target)
    return tuple({compile_key(launch): launch for launch in found}.values())


def _layer_of(shape: Shape) -> Layer:
    topk = 1 if shape.topk is None else shape.topk
    heads = shape.num_kv_heads * shape.group_size, shape.num_kv_heads
    return Layer(
        1024, *heads, shape.head_dim, shape.index_head_dim, shape.block_size, topk, getattr(torch, shape.dtype)
    )


def _layer_launches(case: Case, target: Target) -> Iterator[Launch]:
    layer = replace(_layer_of(case), strided=case.strided, offset=case.offset)
    if case.scale is not None:
        layer = replace(layer, scale=case.scale)
    dense = case.topk is None
    for packed in (False, True):
        layer = replace(layer, packed=packed)
        if not dense:
            for queries in QUERIES:
                for blocks in VARIANTS:
                    tokens = blocks * case.block_size
                    yield from recorded.selection_launches(replace(layer, tokens=tokens, queries=queries), target)
            for queries in _queries_by_splits(case, target):
                yield from recorded.few_launches(replace(layer, queries=queries), target)
        yield from recorded.forward_launches(layer, target, dense)
        for lse_gradient in (False, True):
            yield from recorded.backward_launches(layer, target, dense, lse_gradient)
            if not dense:
                yield from recorded.joint_backward_launches(layer, target, lse_gradient)
        yield from recorded.loss_launches(layer, target, True, dense)


def _queries_by_splits(case: Case, target: Target) -> set[int]:
    """Numbers of queries that between them take every number of splits of the attention of a few."""
    return {max(1, 2 * target.num_sms // (case.num_kv_heads * splits)) for splits in range(1, MOST_SPLITS + 1)}


def _cache_launches(schedule: Schedule, target: Target) -> Iterator[Launch]:
    cache = CacheFormat(schedule.paged, schedule.fp8_keys, dtype_of(schedule.index_dtype))
    capacities = schedule.capacity, *(blocks * schedule.block_size for blocks in VARIANTS)
    for tokens in QUERIES[:-1]:
        for capacity in capacities:
            layer = replace(_layer_of(schedule), tokens=capacity)
            for ragged in (False, True):
                dense = schedule.topk is None
                yield from recorded.decode_launches(layer, target, cache, tokens, 3, ragged, dense)


def _step_launches(step: PagedStep, target: Target) -> Iterator[Launch]:
    """Of sequences with as many queries each, as in decoding, and of packed ones."""
    # From the last number on, no keys are split between programs of the attention.
    each, stored = (*QUERIES, 2 * target.num_sms), (step.fp8_keys, dtype_of(step.index_dtype), step.scales)
    for queries, blocks, packed, offset in itertools.product(each, VARIANTS, (False, True), (0, 1)):
        tokens, rows = (queries, 1) if packed else (3 * queries, 3)
        for many in (False, True):
            form = StepFormat(rows, 6 if packed else 3, blocks, *stored, offset, many)
            yield from recorded.step_launches(replace(_layer_of(step), queries=tokens), target, form, step.topk is None)


def compile_launch(shape: Shape, target: Target, number: int) -> None:
    """Compile the number-th launch of a shape; the case that launches it meets the compiler's error, if any."""
    try:
        launches_of(shape, target)[number].compile(target)
    except Exception:
        return


def _set_apart() -> None:
    """Keep Ctrl-C from this process and from the assembler that it runs, and Triton's reports from the terminal."""
    os.setpgrp()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


class Ahead:
    """Shapes, of which processes compile the next ones while the first are in use.

    Attributes:
        ready: the shapes whose kernels are compiled.
        keys: what kernels were compiled for.
    """

    def __init__(self, shapes: Iterator[Shape], target: Target, processes: int) -> None:
        """Begin to compile for `target`."""
        self.ready: list[Shape] = []
        self.keys: set = set()
        self._shapes, self._target = shapes, target
        self._most = QUEUED * processes
        self._begun: list[tuple[Shape, list[Future]]] = []
        # A forked process would share the GPU's context.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(processes, context, _set_apart)
        self.advance()

    def advance(self) -> None:
        """Begin as many shapes as keep all processes busy, and note which are ready."""
        while sum(not future.done() for _, futures in self._begun for future in futures) < self._most:
            shape = next(self._shapes, None)
            if shape is None:
                break
            self._begun.append((shape, self._submit(shape)))
        self.ready += [shape for shape, futures in self._begun if all(future.done() for future in futures)]
        self._begun = [begun for begun in self._begun if begun[0] not in self.ready]

    def wait(self, seconds: float) -> None:
        """Wait until another shape is ready, at most some seconds."""
        if self._begun:
            wait(self._begun[0][1], timeout=seconds)
        self.advance()

    def stop(self) -> None:
        """Compile no more: end the processes."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()

    def _submit(self, shape: Shape) -> list[Future]:
        futures = []
        for number, launch in enumerate(launches_of(shape, self._target)):
            key = compile_key(launch)
            if key not in self.keys:
                self.keys.add(key)
                futures.append(self._pool.submit(compile_launch, shape, self._target, number))
        return futures
