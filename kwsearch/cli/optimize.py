"""kwsearch optimize: search cells, sharing and split under a recipe's budget."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kwsearch.cli import INTERRUPTED
from kwsearch.cli.live import Live
from kwsearch.cli.options import storage_option, trust_option, without_trust
from kwsearch.passwords import of_environment, without_password

if TYPE_CHECKING:
    from kwsearch.dry_run import Forecast
    from kwsearch.results import Result


@click.command("optimize")
@click.argument("recipe", type=click.Path(dir_okay=False))
@click.argument("overrides", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--trials", type=click.IntRange(min=1), help="Trials of the whole study.")
@click.option(
    "--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds; no new trial after."
)
@click.option("--workers", metavar="N|auto", help="Trials at a time; auto is as many as fit.")
@click.option(
    "--executor",
    type=click.Choice(["local", "ray", "queue"]),
    help="Who runs trials; queue is workers anywhere.  [default: local]",
)
@storage_option
@click.option("--study", "name", help="Its name in the database.  [default: the run directory's]")
@click.option("--address", help="Of a Ray cluster.  [default: $RAY_ADDRESS, else this machine]")
@click.option(
    "--deterministic", is_flag=True, help="The same trials and the same best with any --workers."
)
@click.option("--resume", is_flag=True, help="Go on with the study in the run directory.")
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where the study lives.  [default: runs/RECIPE]",
)
@trust_option
@click.option("--dry-run", is_flag=True, help="Only say what the search would be; needs no data.")
@click.option("-q", "--quiet", is_flag=True, help="No progress; only the result.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print events as lines of JSON, the result last."
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    trials: int | None,
    timeout: float | None,
    workers: str | None,
    executor: str | None,
    storage: str | None,
    name: str | None,
    address: str | None,
    deterministic: bool,
    resume: bool,
    run_dir: Path | None,
    trust: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Search n, cells, sharing and split under the budget of RECIPE; of micronas an architecture
    under its limits.

    Trial 0 is the uniform plan, or the largest architecture; every trial trains its network on the
    recipe's proxy and is scored on held-out examples. Interrupt it at any time: --resume goes on.
    The best is written to best.yaml in the run directory.

    \b
    kwsearch optimize recipes/quickstart.yaml
    kwsearch optimize recipes/fashion_mnist.yaml proxy.epochs=3 --trials 20
    kwsearch optimize recipes/micronas.yaml search.strategy=differentiable
    """
    from kwsearch.recipe import load_recipe

    settings, trust = without_trust(overrides, trust)
    if trials is not None:
        settings.append(f"search.trials={trials}")
    if timeout is not None:
        settings.append(f"search.timeout={timeout}")
    if workers is not None:
        settings.append(f"search.workers={workers}")
    if executor is not None:
        settings.append(f"search.executor={executor}")
    if deterministic:
        settings.append("search.deterministic=true")
    loaded = load_recipe(recipe, settings)
    if name is not None and storage is None and of_environment() is None:
        raise click.UsageError("--study: of a database; give --storage, too")
    if address is not None and (loaded.search is None or loaded.search.executor != "ray"):
        raise click.UsageError("--address: of a Ray cluster; give --executor ray, too")
    directory = run_dir or Path("runs") / Path(recipe).stem

    import optuna

    from kwlayers.plan import counted
    from kwsearch.architecture_study import ArchitectureStudy
    from kwsearch.optimize import PlanStudy
    from kwsearch.run_directory import RECIPE

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    command_line = without_password(shlex.join(["kwsearch", *sys.argv[1:]]))
    # Before torch is loaded: its profiler, which measures memory, talks.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    kind = ArchitectureStudy if loaded.of_architectures else PlanStudy
    if dry_run:
        with Live(quiet=True) as silent:
            planned = kind(loaded, directory, resume=False, watcher=silent, trust=trust)
        _print_forecast(planned.forecast(), as_json)
        return
    echo = click.echo if as_json else None
    with Live(quiet) as progress:
        study = kind(
            loaded,
            directory,
            resume=resume,
            watcher=progress,
            command=command_line,
            echo=echo,
            trust=trust,
            address=address,
            storage=storage,
            name=name,
        )
        progress.expect(study.search.trials)
        progress.say(
            f"{loaded.model.name} on {study.proxy.data}: "
            f"{counted(study.search.trials, 'trial')}, study in {directory}"
        )
        try:
            result = study.run()
        except KeyboardInterrupt:
            begun = (directory / RECIPE).exists()
            how = f"nothing is lost: add --resume to go on with {directory}"
            progress.say(f"interrupted; {how if begun else 'nothing had begun'}")
            raise click.exceptions.Exit(INTERRUPTED) from None
    if as_json:
        _print_json(result)
    else:
        _print(result)
    if not result.found:
        raise click.exceptions.Exit(1)


def _print(result: Result) -> None:
    from kwsearch import study_report, study_summary, terminal

    out = terminal.console()
    out.print(study_report.trials_table(result.trials, result.metric))
    if len(result.budgets) > 1:
        out.print(study_report.front_table(result))
    for line in study_report.result_lines(result):
        out.print(terminal.plain(line))
    if out.is_terminal and result.found:
        for line in study_summary.plot(result, width=out.width, encoding=out.encoding):
            out.print(terminal.plain(line))


def _print_forecast(forecast: Forecast, as_json: bool) -> None:
    import json

    if as_json:
        click.echo(json.dumps(vars(forecast), indent=2))
        return
    for line in forecast.lines():
        click.echo(line)


def _print_json(result: Result) -> None:
    import json

    from kwsearch import study_report

    click.echo(json.dumps({"event": "result", **study_report.result_json(result)}))
