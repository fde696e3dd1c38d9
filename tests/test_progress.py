"""The progress line: its estimate of the remaining time, and where it goes."""

import io
import random
import re

import pytest

from flexmsa import _progress
from flexmsa._progress import NEWEST, STRETCHES, Progress


def lines_of(seconds, monkeypatch):
    """What is printed after each step, if step i takes seconds[i]."""
    now = 0.0
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now)
    monkeypatch.setattr(_progress, "LINES", len(seconds))
    stream = io.StringIO()
    progress = Progress(len(seconds), stream)
    for step, taken in enumerate(seconds, 1):
        now += taken
        progress.update(step, "text")
    return stream.getvalue().splitlines()


def estimates(seconds, monkeypatch):
    """{step: the seconds that it said are left}."""
    found = {}
    for step, line in enumerate(lines_of(seconds, monkeypatch), 1):
        if left := re.search(r", (\d+):(\d\d) left", line):
            found[step] = 60 * int(left[1]) + int(left[2])
    return found


# A first step of a minute, steps of half a second, and every 25th measures for two seconds; on a busy machine a step
# takes up to half as long again, and one in ten is held up for five seconds.
def demo_steps(busy):
    drawn = random.Random(0)
    for step in range(1, 401):
        seconds = 60.0 if step == 1 else 2.5 if step % 25 == 0 else 0.5
        if busy and step > 1:
            seconds *= drawn.uniform(1, 1.5)
            seconds += 5.0 * (drawn.random() < 0.1)
        yield seconds


@pytest.mark.parametrize("busy", [False, True], ids=["alone", "busy"])
def test_the_estimate_is_near_what_is_left_from_the_first_one_on(busy, monkeypatch):
    seconds = list(demo_steps(busy))
    found = estimates(seconds, monkeypatch)
    assert min(found) == STRETCHES + 1
    for step, said in found.items():
        left = sum(seconds[step:])
        assert left / 2.5 - 5 <= said <= 1.5 * left + 5, (step, said, left)


def test_a_stall_does_not_change_the_estimate(monkeypatch):
    seconds = [1.0] * 30
    calm = estimates(seconds, monkeypatch)
    seconds[8] = 600.0
    assert estimates(seconds, monkeypatch) == calm


def test_the_estimate_follows_steps_that_become_slower(monkeypatch):
    found = estimates([1.0] * 100 + [3.0] * 100, monkeypatch)
    assert found[100] == 100
    assert found[100 + NEWEST] == 150


def test_steps_that_end_together_count_with_those_that_they_waited_for(monkeypatch):
    found = estimates([4.0 if step % 4 == 0 else 0.0 for step in range(200)], monkeypatch)
    assert all(abs(found[step] - (200 - step)) <= 0.25 * (200 - step) + 4 for step in range(40, 201))


def test_a_short_loop_has_no_estimate(monkeypatch):
    assert lines_of([1.0, 1.0, 1.0], monkeypatch) == ["1/3 0:01 text", "2/3 0:02 text", "3/3 0:03 text"]


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_are_rewritten_on_a_terminal_only(terminal, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    progress = Progress(100, stream)
    for step in range(1, 101):
        progress.update(step, "text")
    progress.close()
    shown = stream.getvalue()
    assert shown.count("\r") == (100 if terminal else 0)
    assert shown.count("\n") == (1 if terminal else 21)
