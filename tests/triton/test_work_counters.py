"""Counters that stay zero: whose they are, outside of captured graphs and in them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from flexmsa.kernels.triton.selection import work_counters as module
from flexmsa.kernels.triton.selection.work_counters import work_counters

CPU = torch.device("cpu")


@pytest.fixture
def stream(monkeypatch):
    """A stand-in for the current stream: its handle, whether it is being captured, and the threads that waited."""
    state = SimpleNamespace(cuda_stream=7, capturing=False, threads=[])
    state.synchronize = lambda: state.threads.append(threading.get_ident())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(module, "RESERVE", 32)
    monkeypatch.setattr(module, "_reserves", {})
    monkeypatch.setattr(module, "_given", [])
    yield state
    module._shared.clear()


def places(counters):
    return {counters.data_ptr() + 4 * i for i in range(len(counters))}


def test_calls_of_one_stream_share_counters_and_those_of_two_do_not(stream):
    first, again = work_counters(3, CPU), work_counters(4, CPU)
    assert first.dtype == torch.int32 and len(first) >= 3 and not first.any()
    assert places(first) == places(again)
    stream.cuda_stream = 8
    assert not places(first) & places(work_counters(3, CPU))


def test_threads_of_one_stream_share_counters_from_the_first_call_on(stream, monkeypatch):
    """Counters that nobody keeps would be freed while a launch counts with them."""
    both, zeros = threading.Barrier(2), module._zeros
    work_counters(3, CPU)
    module._shared.clear()

    def slow_zeros(number, device):
        time.sleep(0.05)
        return zeros(number, device)

    def first_call():
        both.wait()
        return work_counters(3, CPU)

    monkeypatch.setattr(module, "_zeros", slow_zeros)
    with ThreadPoolExecutor(2) as pool:
        found, other = (task.result() for task in [pool.submit(first_call) for _ in range(2)])
    assert found is other


def test_every_captured_call_has_counters_of_its_own(stream):
    eager = work_counters(2, CPU)
    stream.capturing = True
    captured = [work_counters(number, CPU) for number in (1, 2, 5, 3, 4, 1)]
    assert not any(counters.any() or counters.data_ptr() % 16 for counters in captured)
    assert [len(counters) for counters in captured] == [4, 4, 8, 4, 4, 4]
    assert len(set().union(*map(places, [eager, *captured]))) == len(eager) + 28


def test_the_reserve_is_made_outside_of_captures_and_before_it_is_used_up(stream):
    for number, left in ((16, 16), (4, 12), (4, 28)):
        stream.capturing = False
        work_counters(1, CPU)
        stream.capturing = True
        work_counters(number, CPU)
        assert len(module._reserves[CPU]) == left
    made = len(stream.threads)
    module._reserves.clear()
    assert not work_counters(3, CPU).any() and len(stream.threads) == made


def test_the_counters_of_a_graph_are_kept_when_the_reserve_is_filled_again(stream):
    work_counters(1, CPU)
    stream.capturing = True
    memory = StorageWeakRef(work_counters(20, CPU).untyped_storage())
    stream.capturing = False
    work_counters(1, CPU)
    assert len(module._reserves[CPU]) == 32 and not memory.expired()


def test_counters_are_not_made_by_the_thread_whose_memory_may_be_that_of_a_graph(stream):
    """As while torch.compile runs a step before it captures it."""
    work_counters(1, CPU)
    assert len(stream.threads) == 2 and threading.get_ident() not in stream.threads
