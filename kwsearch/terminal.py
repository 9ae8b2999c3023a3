"""Text on a terminal or in a file: as wide as fits, tables without frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 120  # of a table that no terminal bounds


def console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for a table in a file."""
    from rich.console import Console

    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=WIDTH)


def new_table(words: Sequence[str], *numbers: Sequence[str]) -> Table:
    """Columns of words, which fold, then columns of numbers, which do not."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for name in words:
        table.add_column(name, overflow="fold")
    for group in numbers:
        for name in group:
            table.add_column(name, justify="right", no_wrap=True)
    return table


def plain(text: str) -> str:
    """Text without rich's markup brackets being read as markup."""
    return re.sub(r"\[", r"\\[", text)
