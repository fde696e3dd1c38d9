"""Functions run by several processes on one machine, with a limit on their time: a hang is a failure.

Each process has a GPU, its default device, where the machine has enough of them (NCCL); otherwise they share the CPU
(gloo)."""

import contextlib
import os
import queue
import socket
import time
import traceback
from collections.abc import Callable
from typing import Any

import one_gloo_thread
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 300


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def device_type() -> str:
    """That of a process's tensors, "cuda" or "cpu"."""
    return torch.get_default_device().type


def _enter(rank: int, world: int, port: int, function: Callable[..., Any], arguments: tuple, answers: Any) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= world
    if on_gpus:
        torch.cuda.set_device(rank)
        torch.set_default_device(f"cuda:{rank}")
    one_gloo_thread.install()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
    try:
        answers.put((rank, None, function(*arguments)))
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))
    finally:
        # The answer is out before anything is taken down.
        answers.close()
        answers.join_thread()
        dist.destroy_process_group()


def run(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What function(*arguments) returns in each of `world` processes of a group, numbers and strings, by rank."""
    found, exits = _run(world, function, arguments)
    failures = [failure for _, failure, _ in found if failure]
    assert not failures, "\n".join([*failures, f"exit codes {exits}"])
    assert len(found) == world, f"{world - len(found)} of {world} processes died: {exits}"
    return [result for _, _, result in found]


def _run(world: int, function: Callable[..., Any], arguments: tuple) -> tuple[list[Any], list[int | None]]:
    """The answers (rank, failure, result) that came, by rank, and the processes' exit codes."""
    context = mp.get_context("spawn")
    answers = context.Queue()
    port = free_port()
    processes = [
        context.Process(target=_enter, args=(rank, world, port, function, arguments, answers), daemon=True)
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    found: list[Any] = []
    deadline = time.monotonic() + SECONDS
    try:
        # Read before the processes end: one waits until its answer is taken.
        while len(found) < world and (answers.qsize() or any(process.is_alive() for process in processes)):
            assert time.monotonic() < deadline, f"not finished after {SECONDS} s: {function.__name__}"
            with contextlib.suppress(queue.Empty):
                found.append(answers.get(timeout=0.2))
    finally:
        for process in processes:
            process.kill()
            process.join()
    found.sort(key=lambda answer: answer[0])
    return found, [process.exitcode for process in processes]
