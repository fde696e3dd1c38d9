"""Work counters: programs that share work take the next part from them, so that slow programs take fewer parts.

A counter is zero before a launch, and again after it. Setting it to zero in a launch of its own would cost more than it
saves. So the last program to take a number sets the counter back, and calls of one stream, which run one after the
other, have the same counters. A captured graph runs on any stream at any time, and has counters of its own.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
import triton

# Counters of a device for graphs that are captured later, 4 MB: a step takes one per sequence.
RESERVE = 1 << 20

# Of a device, a stream and a number.
_shared: dict[tuple[torch.device, int, int], torch.Tensor] = {}
_reserves: dict[torch.device, torch.Tensor] = {}
# All that were ever a reserve: graphs write to them for as long as they run, but do not hold their memory.
_given: list[torch.Tensor] = []
_lock = threading.Lock()


def work_counters(number: int, device: torch.device) -> torch.Tensor:
    """That many counters, int32, for a launch on the current stream, which leaves them at zero."""
    if device.type == "meta":
        return torch.empty(number, dtype=torch.int32, device=device)
    if torch.cuda.is_current_stream_capturing():
        return _own_counters(number, device)
    if len(_reserves.get(device, ())) < RESERVE // 2:
        _fill_reserve(device)
    stream = torch.cuda.current_stream(device).cuda_stream
    return _counters_of(device, stream, max(16, triton.next_power_of_2(number)))


def _counters_of(device: torch.device, stream: int, number: int) -> torch.Tensor:
    key = device, stream, number
    if key not in _shared:
        # Counters that a second thread made would be freed while its launch runs.
        with _lock:
            if key not in _shared:
                _shared[key] = _zeros(number, device)
    return _shared[key]


def _fill_reserve(device: torch.device) -> None:
    """Fill the reserve, outside of captures: in one, the memory would be the graph's, and each run would zero it."""
    counters = _zeros(RESERVE, device)
    with _lock:
        _given.append(counters)
        _reserves[device] = counters


def _zeros(number: int, device: torch.device) -> torch.Tensor:
    """That many zeros, which any stream may use.

    Made by another thread: before torch.compile captures a graph, memory of this thread and stream is that graph's.
    """

    def make() -> torch.Tensor:
        counters = torch.zeros(number, dtype=torch.int32, device=device)
        torch.cuda.current_stream(device).synchronize()
        return counters

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(make).result()


def _own_counters(number: int, device: torch.device) -> torch.Tensor:
    # Multiples of 16 bytes: for other pointers another kernel is compiled, and a capture is no time for that.
    number = 4 * triton.cdiv(number, 4)
    with _lock:
        reserve = _reserves.get(device)
        if reserve is not None and number <= len(reserve):
            _reserves[device] = reserve[number:]
            return reserve[:number]
    return torch.zeros(number, dtype=torch.int32, device=device)
