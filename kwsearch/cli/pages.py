"""Files that commands write for people: where they may be, and what made them."""

from __future__ import annotations

import os
import shlex
import sys

import click


def check_place(option: str, path: str, *endings: str) -> None:
    """Before the work: a folder that is not there, or a name that does not say what it is.

    Raises click.UsageError.
    """
    folder = os.path.dirname(path) or "."
    if not path.lower().endswith(endings):
        raise click.UsageError(f"{option} {path}: its name ends in {' or '.join(endings)}")
    if not os.path.isdir(folder):
        raise click.UsageError(f"{option} {path}: there is no folder {folder}")


def write(path: str, text: str) -> None:
    """All or nothing; says so on stderr."""
    from kwsearch.files import write_whole

    write_whole(path, text)
    click.echo(f"wrote {path}", err=True)


def command_line() -> str:
    """As it was given, for a shell."""
    return shlex.join(["kwsearch", *sys.argv[1:]])
