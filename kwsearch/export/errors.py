"""What stops an export."""

from __future__ import annotations


class ExportError(ValueError):
    """An export that cannot be made: says why, and what to try."""
