"""Counters for programs that share work as they come to it: zero before a launch, and again after it.

Setting them to zero in a launch of its own would cost more than they save. So the last program to take a ticket sets
the counter back, and calls of one stream, which run one after the other, have the same counters. A captured graph runs
on any stream at any time, and has counters of its own.
"""

import functools
import threading

import torch
import triton

# Counters of a device for the graphs to come, 4 MB: a step takes one for each sequence.
RESERVE = 1 << 20

_reserves: dict[torch.device, torch.Tensor] = {}
_lock = threading.Lock()


def tickets(number: int, device: torch.device) -> torch.Tensor:
    """That many counters, int32, for a launch on the current stream, that leaves them at zero."""
    if torch.cuda.is_current_stream_capturing():
        return _own_counters(number, device)
    if len(_reserves.get(device, ())) < RESERVE // 2:
        _fill_reserve(device)
    stream = torch.cuda.current_stream(device).cuda_stream
    return _counters_of(device, stream, max(16, triton.next_power_of_2(number)))


@functools.cache
def _counters_of(device: torch.device, stream: int, number: int) -> torch.Tensor:
    return torch.zeros(number, dtype=torch.int32, device=device)


def _fill_reserve(device: torch.device) -> None:
    """Done outside of a capture, where memory would be the graph's, and be set to zero by each run of it."""
    counters = torch.zeros(RESERVE, dtype=torch.int32, device=device)
    # Any stream may use them from now on.
    torch.cuda.current_stream(device).synchronize()
    with _lock:
        _reserves[device] = counters


def _own_counters(number: int, device: torch.device) -> torch.Tensor:
    # Multiples of 16 bytes: for pointers that are not, Triton compiles another kernel, and a capture is no time for it.
    number = 4 * triton.cdiv(number, 4)
    with _lock:
        reserve = _reserves.get(device)
        if reserve is not None and number <= len(reserve):
            _reserves[device] = reserve[number:]
            return reserve[:number]
    return torch.zeros(number, dtype=torch.int32, device=device)
