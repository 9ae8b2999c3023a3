"""What others say, for messages of ours."""

from __future__ import annotations


def one_line(said: object, most: int = 200) -> str:
    """Its text with every run of white space as one space; no more than so many characters."""
    return " ".join(str(said).split())[:most]
