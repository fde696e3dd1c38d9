"""PyTorch's process groups on CPUs with one thread each.

A group has two, which write the name of the last exchange to one string without a lock: if two exchanges end at one
time, the process may be aborted over its heap (PyTorch 2.13, `ProcessGroupGloo::runLoop`). In the order of exchanges
nothing changes, as all processes begin them in one order.
"""

from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo

__all__ = ["install"]


def install() -> None:
    """From now on, groups of this process have one thread; init_process_group has no option for it."""
    make = ProcessGroupGloo.__init__

    def make_with_one_thread(self: Any, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()
        options._devices, options._threads, options._timeout = [ProcessGroupGloo.create_default_device()], 1, timeout
        make(self, store, rank, size, options)

    ProcessGroupGloo.__init__ = make_with_one_thread  # type: ignore[method-assign]
