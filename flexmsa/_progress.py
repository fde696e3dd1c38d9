"""A progress line: rewritten in place on a terminal, printed a limited number of times into a file."""

import shutil
import sys
import time
from typing import TextIO

# Lines per run if the output is not a terminal.
LINES = 20
BAR = 20


class Progress:
    """The progress of a loop of `total` steps on stderr, with the elapsed and the remaining time."""

    def __init__(self, total: int, stream: TextIO | None = None) -> None:
        self.total = total
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.started = self.latest = time.monotonic()
        self.pace = 0.0

    def update(self, step: int, text: str) -> None:
        """Show that `step` steps are done, with `text`."""
        now = time.monotonic()
        # The newest steps count most, as the cost of a step may change during training.
        newest = now - self.latest
        self.pace = newest if step == 1 else 0.95 * self.pace + 0.05 * newest
        self.latest = now
        left = self.pace * (self.total - step)
        width = len(str(self.total))
        line = f"{step:>{width}}/{self.total} {clock(now - self.started)}, {clock(left)} left {text}"
        if self.terminal:
            room = shutil.get_terminal_size().columns - 1
            done = BAR * step // self.total
            bar = f"[{'#' * done}{'.' * (BAR - done)}] "
            self.stream.write("\r\x1b[K" + (bar + line if len(bar + line) <= room else line[:room]))
        elif step == 1 or step == self.total or step % max(1, self.total // LINES) == 0:
            self.stream.write(line + "\n")
        self.stream.flush()

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
