"""kwsearch trials: the table of a study's trials."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("trials")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(run: Path, as_json: bool) -> None:
    """Every trial of the study in RUN, the best first. The same is in RUN/trials.csv."""
    from kwsearch import results, snapshot, study_report, terminal

    study = snapshot.take(run)
    if as_json:
        click.echo(json.dumps([study_report.trial_json(trial) for trial in study.trials], indent=2))
    else:
        metric = results.metric_of(study.recipe)
        terminal.console().print(study_report.trials_table(study.trials, metric))
