"""What stops an export."""

from __future__ import annotations


class ExportError(ValueError):
    """An export that cannot be made: says why, and what to try."""


class ExportFailed(ExportError):
    """One that was asked rightly: a package is missing or does not load, or torch cannot."""
