"""kwsearch status: how far a study is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from kwsearch.snapshot import Snapshot


@click.command("status")
@click.argument("run", type=click.Path(file_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(run: Path, as_json: bool) -> None:
    """How far the study in RUN is, also while it is running."""
    from kwsearch import snapshot

    found = _status(snapshot.take(run))
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    states = ", ".join(f"{count} {state}" for state, count in found["states"].items())
    click.echo(f"{run}: {'running' if found['running'] else 'not running'}")
    click.echo(
        f"trials: {found['finished']} of {found['trials']} finished ({states or 'none yet'})"
    )
    for trial in found["unfinished"]:
        accuracy = f", {trial['accuracy']:.2%}" if trial["epoch"] else ""
        click.echo(f"    trial {trial['number']}: after epoch {trial['epoch']}{accuracy}")
    for best in found["best"]:
        head = f"budget {best['budget']:.12g}, " if len(found["best"]) > 1 else ""
        click.echo(f"{head}best: trial {best['number']}, {best['accuracy']:.2%}")
    click.echo(f"trained: {found['seconds']:,.0f} s in all")


def _status(study: Snapshot) -> dict[str, Any]:
    from kwsearch import finals
    from kwsearch.recipe import Search
    from kwsearch.results import Found
    from kwsearch.study_summary import unfinished
    from kwsearch.trials import SECONDS, by_budget

    finished = [trial for trial in study.trials if trial.state.is_finished()]
    best = {}
    for budget, trials in by_budget(finished).items():
        found = Found(budget or 0.0, tuple(trials), finals.results(study.attributes, trials))
        best[budget] = found.best
    return {
        "running": study.running,
        "trials": (study.recipe.search or Search()).trials,
        "finished": len(finished),
        "states": dict(Counter(trial.state.name.lower() for trial in finished)),
        "unfinished": [
            {
                "number": trial.number,
                "epoch": trial.last_step or 0,
                # At step 0 there is a score, if anything.
                "accuracy": trial.intermediate_values[trial.last_step] if trial.last_step else None,
            }
            for trial in unfinished(study)
        ],
        "best": [
            {"budget": budget, "number": trial.number, "accuracy": trial.values[0]}
            for budget, trial in best.items()
            if trial is not None
        ],
        "seconds": sum(trial.user_attrs.get(SECONDS, 0.0) for trial in finished),
    }
