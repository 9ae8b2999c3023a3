"""Ctrl-C: the first lets running jobs come to a stop, the second stops now."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_counting: list[Interrupts] = []


class Interrupts:
    """count: Ctrl-Cs so far."""

    def __init__(self) -> None:
        self.count = 0

    def check(self) -> None:
        """Raise KeyboardInterrupt after the second."""
        if self.count > 1:
            raise KeyboardInterrupt


@contextmanager
def counted(say: Callable[[str], object], message: str) -> Iterator[Interrupts]:
    """Count Ctrl-Cs instead of raising them, and say `message` at the first.

    Not outside the main thread, where only whoever runs it could.
    """
    found = Interrupts()

    def count(signum: int, frame: FrameType | None) -> None:
        found.count += 1
        if found.count == 1:
            say(message)

    try:
        before = signal.signal(signal.SIGINT, count)
    except ValueError:  # not in the main thread
        yield found
        return
    _counting.append(found)
    try:
        yield found
    finally:
        _counting.pop()
        signal.signal(signal.SIGINT, before)


def sleep(seconds: float) -> None:
    """Where nothing is half done, so that a second Ctrl-C may raise KeyboardInterrupt."""
    time.sleep(seconds)
    for one in _counting:
        one.check()
