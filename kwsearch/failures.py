"""Which errors stop a whole study: a full disk, and the same one again and again; and which losses
a trial.
"""

from __future__ import annotations

from kwsearch.executors import Lost
from kwsearch.run_directory import SearchError

_SAME_ERROR = 3
NO_SPACE = "No space left on device"
# Losses within one epoch after which a training is given up.
LOSSES = 5


class StudyFailed(SearchError):
    """A search that has started and cannot go on."""


class Errors:
    """Messages of trainings that failed. what: they are, in words."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.messages: list[str] = []

    def add(self, message: str, stops: bool = True) -> None:
        """Raises StudyFailed for the same message three times in a row, if it is one that stops."""
        self.messages.append(message)
        if stops and self.messages[-_SAME_ERROR:] == [message] * _SAME_ERROR:
            raise StudyFailed(f"{_SAME_ERROR} {self.what} failed with the same error: {message}")

    def clear(self) -> None:
        """Something went well."""
        self.messages.clear()


def disk_is_full(message: object) -> StudyFailed:
    """The error for a disk without room."""
    return StudyFailed(f"the disk is full: {message}; make room and --resume")


def weight_of(loss: Lost) -> float:
    """A node that is taken away counts, too: the training may be what takes nodes away."""
    return 1 if loss.suspect else 0.25
