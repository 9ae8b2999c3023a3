"""Networks of other widths: every channel count times one factor."""

from __future__ import annotations


def scaled(channels: int, width: float) -> int:
    """``channels * width`` as a whole number of at least 1; never falls as ``width`` grows."""
    return max(round(channels * width), 1)
