"""kwsearch worker: run trials of a study that is in a database."""

from __future__ import annotations

import click

from kwsearch.cli.options import storage_option, trust_option
from kwsearch.passwords import of_environment


@click.command("worker")
@click.argument("study")
@storage_option
@click.option(
    "--idle",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Leave after so long without a trial.  [default: when a study that it served is over]",
)
@trust_option
@click.option("-q", "--quiet", is_flag=True, help="Say nothing.")
def command(study: str, storage: str | None, idle: float | None, trust: bool, quiet: bool) -> None:
    """Take trials of STUDY from its database and train them, one after the other.

    Start as many as there is room for, on any machine that sees the run directory and the images
    where the driver does: `kwsearch optimize RECIPE --executor queue --storage URL`. A worker that
    is stopped gives its trial back, one that dies loses nothing. It trains on the first GPU that it
    sees: give each its own by CUDA_VISIBLE_DEVICES.

    \b
    kwsearch worker fashion_mnist --storage postgresql://me@host/studies
    """
    import os

    from kwlayers.plan import counted
    from kwsearch.storage import PROXY
    from kwsearch.worker import Worker

    storage = storage or of_environment()
    if storage is None:
        raise click.UsageError("give --storage, the URL of the study's database")
    if storage.startswith(PROXY):
        raise click.UsageError("--storage: give the database itself, which a proxy does not show")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    def say(message: str) -> None:
        if not quiet:
            click.echo(message, err=True)

    worker = Worker(storage, study, say, trust=trust, idle=idle)
    say(f"worker {worker.name} waits for trials of {study}")
    done = worker.run()
    say(f"{counted(done, 'job')} done")
