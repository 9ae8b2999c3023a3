"""The one exception of this package."""

from __future__ import annotations


class DataError(ValueError):
    """A data set that cannot be had: what is wrong, what was looked for, what to try."""
