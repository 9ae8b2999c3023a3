"""Ctrl-C: the first lets running jobs come to a stop, the second stops now."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)
