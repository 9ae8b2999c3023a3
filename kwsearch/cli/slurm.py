"""kwsearch slurm: a job script."""

from __future__ import annotations

from pathlib import Path

import click

from kwsearch.cli.options import storage_option, trust_option
from kwsearch.passwords import of_environment, without_password


@click.command("slurm")
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@storage_option
@click.option("--study", "name", help="Its name in the database.  [default: the run directory's]")
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Which all nodes see.  [default: runs/RECIPE]",
)
@click.option("--workers", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--hours", type=click.IntRange(min=1), default=24, show_default=True)
@trust_option
@click.option("--sbatch", multiple=True, metavar="OPTION", help="More of it: --partition=gpu.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    storage: str | None,
    name: str | None,
    run_dir: Path | None,
    workers: int,
    hours: int,
    trust: bool,
    sbatch: tuple[str, ...],
) -> None:
    """Print a job script: an array of workers for the study of RECIPE, and its driver.

    What a worker is given is search.resources of the recipe, as KEY=VALUE may change it. After the
    time limit the same script goes on with the study.

    \b
    kwsearch slurm recipe.yaml --storage postgresql://me@host/studies > job.sh && sbatch job.sh
    """
    import math

    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    from kwsearch.engines import resources_of
    from kwsearch.recipe import Proxy, Search, load_recipe
    from kwsearch.slurm import Array, script

    storage = storage or of_environment()
    if storage is None:
        raise click.UsageError("give --storage, the URL of a database that all nodes reach")
    loaded = load_recipe(recipe, list(overrides))
    cpus, gpus = resources_of(loaded.search or Search(), loaded.proxy or Proxy())
    directory = run_dir or Path("runs") / Path(recipe).stem
    try:
        parsed = make_url(storage)
        shown = parsed._replace(password=None).render_as_string()
    except (ArgumentError, ValueError):
        message = "--storage: no URL; allowed are such as postgresql://user@host/database"
        raise click.UsageError(message) from None
    if parsed.host in ("localhost", "127.0.0.1", "::1"):
        message = f"note: {parsed.host} is another machine on every node: give the server's name"
        click.echo(message, err=True)
    click.echo(
        script(
            Array(
                recipe,
                overrides,
                str(directory),
                name or directory.name,
                without_password(shown),
                workers,
                math.ceil(cpus) or 1,
                math.ceil(gpus),
                hours,
                trust,
                sbatch,
            )
        ),
        nl=False,
    )
