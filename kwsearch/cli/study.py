"""kwsearch study: where a study is."""

from __future__ import annotations

from pathlib import Path

import click

from kwsearch.cli.options import storage_option
from kwsearch.passwords import STORAGE, of_environment


@click.group("study")
def command() -> None:
    """Where studies are."""


@command.command("copy")
@click.argument("run", type=click.Path(exists=True, file_okay=False, path_type=Path))
@storage_option
@click.option("--journal", is_flag=True, help="Back into the journal of the run directory.")
@click.option("--study", "name", help="Its name in the database.  [default: the run directory's]")
def copy(run: Path, storage: str | None, journal: bool, name: str | None) -> None:
    """Move the study of the run directory RUN to a database, or back into its journal.

    The run directory then says where it is; what was there before stays as it was.

    \b
    kwsearch study copy runs/recipe --storage postgresql://me@host/studies
    kwsearch study copy runs/recipe --journal
    """
    from kwlayers.plan import counted
    from kwsearch.study_copy import move

    if storage is not None and journal:
        raise click.UsageError(
            f"--journal is where it goes, --storage, too: give one; ${STORAGE} has the password of "
            "where it is"
        )
    storage = storage or of_environment()
    if storage is None and not journal:
        raise click.UsageError("give --storage URL, or --journal")
    count, where = move(run, None if journal else storage, name, _say)
    click.echo(f"{counted(count, 'trial')} of {run} are in {where}")


def _say(message: str) -> None:
    click.echo(message, err=True)
