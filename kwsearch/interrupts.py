"""Signals that ask for an end. Ctrl-C: the first lets running jobs stop, the second stops now."""

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
    """Count Ctrl-Cs instead of raising them, and say `message` at the first."""
    found = Interrupts()

    def count(signum: int, frame: FrameType | None) -> None:
        found.count += 1
        if found.count == 1:
            say(message)

    with handled(count, "SIGINT") as is_heard:
        if is_heard:
            _counting.append(found)
        try:
            yield found
        finally:
            if is_heard:
                _counting.pop()


@contextmanager
def handled(handler: Callable[[int, FrameType | None], object], *names: str) -> Iterator[bool]:
    """Signals of these names, of those that the system has, call `handler`; whether they do.

    Not outside the main thread, where only whoever runs it could.
    """
    before = {}
    try:
        for name in names:
            if (number := getattr(signal, name, None)) is not None:
                before[number] = signal.signal(number, handler)
    except ValueError:  # not in the main thread
        yield False
        return
    try:
        yield True
    finally:
        for number, usual in before.items():
            signal.signal(number, usual)


def ignored(name: str) -> bool:
    """Whether whoever started the process wants a signal to be ignored, or there is none."""
    number = getattr(signal, name, None)
    return number is None or signal.getsignal(number) is signal.SIG_IGN


def sleep(seconds: float) -> None:
    """Where nothing is half done, so that a second Ctrl-C may raise KeyboardInterrupt."""
    time.sleep(seconds)
    for one in _counting:
        one.check()
