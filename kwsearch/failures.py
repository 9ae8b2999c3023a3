"""Which errors stop a whole study: a full disk, and the same one again and again."""

from __future__ import annotations

from kwsearch.run_directory import SearchError

_SAME_ERROR = 3
NO_SPACE = "No space left on device"


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
