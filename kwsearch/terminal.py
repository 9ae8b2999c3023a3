"""Text on a terminal or in a file: as wide as fits, tables without frames."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_UNBOUNDED = 10_000


def console() -> Console:
    """Standard output: as wide as the terminal or $COLUMNS says; a file has no width."""
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # not SystemExit(1): to stop reading is no failure

    out = Output(highlight=False)
    if out.is_terminal or os.environ.get("COLUMNS", "").isdigit():
        return out
    return Output(highlight=False, width=_UNBOUNDED)


def talk_to_stderr() -> contextlib.AbstractContextManager[Any]:
    """What a user's own code prints is no part of a command's result."""
    return contextlib.redirect_stdout(sys.stderr)


def new_table(words: Sequence[str], *numbers: Sequence[str], spare: Sequence[str] = ()) -> Table:
    """Columns of words, which fold, then columns of numbers, which do not.

    spare: columns to leave out, one after the other, where the table would be too wide.
    """
    from rich import box

    table: Table = _fitting_table()(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    table.spare = spare  # type: ignore[attr-defined]
    for name in words:
        table.add_column(name, overflow="fold")
    for group in numbers:
        for name in group:
            table.add_column(name, justify="right", no_wrap=True)
    return table


@functools.cache
def _fitting_table() -> type[Table]:
    """The class of tables that leave columns out; rich is imported when the first one is made."""
    from rich.table import Table

    class Fitting(Table):
        spare: Sequence[str] = ()

        def __rich_console__(self, console: Any, options: Any) -> Any:
            columns, table, left_out = list(self.columns), self._of(self.columns), []
            unbounded = options.update(width=_UNBOUNDED)
            for name in self.spare:
                if console.measure(table, options=unbounded).maximum <= options.max_width:
                    break
                columns = [column for column in columns if column.header != name]
                left_out.append(name.replace("\n", " "))
                table = self._of(columns)
            yield table
            if left_out:
                yield f" left out, as the terminal is narrow: {', '.join(left_out)}"

        def _of(self, columns: Sequence[Any]) -> Table:
            """An ordinary table with some of the columns."""
            table = Table(box=self.box, pad_edge=self.pad_edge, padding=self.padding)
            for column in columns:
                table.add_column(
                    column.header,
                    justify=column.justify,
                    overflow=column.overflow,
                    no_wrap=column.no_wrap,
                )
            cells = zip(*(column.cells for column in columns), strict=True)
            for row, shown in zip(self.rows, cells, strict=True):
                table.add_row(*shown, end_section=row.end_section)
            return table

    return Fitting


@contextlib.contextmanager
def tracked(what: str, total: int) -> Iterator[Callable[..., None]]:
    """A bar on stderr's terminal, else a line for every tenth; call it with how many are done, and
    of how many if that has changed.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    out = Console(stderr=True, highlight=False, soft_wrap=True)
    columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
    tenths = 0
    with Progress(
        TextColumn("{task.description}", markup=False),
        *columns,
        TimeRemainingColumn(),
        console=out,
        disable=not out.is_terminal,
    ) as bars:
        task = bars.add_task(what, total=total)

        def advance(done: int, of: int = total) -> None:
            nonlocal tenths
            bars.update(task, completed=done, total=of)
            reached = 10 * done // max(of, 1)
            if not out.is_terminal and reached != tenths:
                tenths = reached
                out.print(f"{what}: {done:,} of {of:,}")

        yield advance


def plain(text: str) -> str:
    """Text without rich's markup brackets being read as markup."""
    return re.sub(r"\[", r"\\[", text)
