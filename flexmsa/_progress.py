"""A progress line: rewritten in place on a terminal, printed a limited number of times into a file."""

import shutil
import statistics
import sys
import time
from collections import deque
from itertools import pairwise
from typing import TextIO

# Lines per run if the output is not a terminal.
LINES = 20
BAR = 20
# The newest steps, from which the remaining time is estimated, and the stretches that they are cut into.
NEWEST, STRETCHES = 50, 5


class Progress:
    """The progress of a loop of `total` steps on stderr, with the elapsed and the remaining time."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.started = time.monotonic()
        # The first step also imports, allocates and compiles: what it took says nothing about the others.
        self.ends: deque[float] = deque(maxlen=NEWEST + 1)

    def update(self, step: int, text: str) -> None:
        """Show that `step` steps are done, with `text`."""
        now = time.monotonic()
        self.ends.append(now)
        pace = self._pace()
        left = "" if pace is None else f", {clock(pace * (self.total - step))} left"
        width = len(str(self.total))
        line = f"{step:>{width}}/{self.total} {clock(now - self.started)}{left} {text}"
        if self.terminal:
            room = shutil.get_terminal_size().columns - 1
            done = BAR * step // self.total
            bar = f"[{'#' * done}{'.' * (BAR - done)}] "
            self.stream.write("\r\x1b[K" + (bar + line if len(bar + line) <= room else line[:room]))
        elif step == 1 or step == self.total or step % max(1, self.total // LINES) == 0:
            self.stream.write(line + "\n")
        self.stream.flush()

    def _pace(self) -> float | None:
        """Seconds per step: of the newest steps in stretches, the middle one, which a stall in another does not change.

        A stretch, not a step, because some steps also measure, and kernels that are compiled side by side end together.
        """
        steps = len(self.ends) - 1
        if steps < STRETCHES:
            return None
        cuts = [steps * number // STRETCHES for number in range(STRETCHES + 1)]
        return statistics.median(
            (self.ends[last] - self.ends[first]) / (last - first) for first, last in pairwise(cuts)
        )

    def close(self) -> None:
        """End the line, so that later output starts on a new one."""
        if self.terminal:
            self.stream.write("\n")
            self.stream.flush()


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds.

    >>> clock(75.2)
    '1:15'
    """
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
