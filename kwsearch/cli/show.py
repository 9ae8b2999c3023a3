"""kwsearch show: one trial of a study, and its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("show")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.argument("trial", type=click.IntRange(min=0))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the recipe with the trial's plan.",
)
def command(run: Path, trial: int, as_json: bool, output: Path | None) -> None:
    """What TRIAL of the study in RUN is and how it went.

    \b
    kwsearch show runs/quickstart 7
    kwsearch show runs/quickstart 7 -o seven.yaml && kwsearch budget seven.yaml
    """
    from kwsearch import snapshot, study_report
    from kwsearch.recipe import write_recipe
    from kwsearch.results import recipe_of_trial, under
    from kwsearch.trials import budget_of

    study = snapshot.take(run)
    found = study.trial(trial)
    if output is not None:
        recipe = recipe_of_trial(study.recipe, found)
        if (budget := budget_of(found)) is not None:
            recipe = under(recipe, budget)
        write_recipe(recipe, output, [f"Trial {trial} of {run}."])
    if as_json:
        click.echo(json.dumps(study_report.trial_json(found), indent=2))
        return
    for line in study_report.trial_lines(found):
        click.echo(line)
    if output is not None:
        click.echo(f"wrote {output}")
