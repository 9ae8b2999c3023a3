"""The one exception of this package, and lists in its messages."""

from __future__ import annotations

from collections.abc import Sequence


class DataError(ValueError):
    """A data set that cannot be had: what is wrong, what was looked for, what to try."""


def few(names: Sequence[object]) -> str:
    """The first five, and how many there are."""
    more = f", … ({len(names)} in all)" if len(names) > 5 else ""
    return ", ".join(map(str, names[:5])) + more
