"""A study as a page: what was found, how sure that is, every trial, and how it was made."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwsearch import architectures, finals, study_report, study_summary
from kwsearch.architecture_proposals import distribution_of
from kwsearch.micronas.space import Architecture
from kwsearch.pages import study_choices, study_plots, study_spending, study_table
from kwsearch.pages.page import percent, render
from kwsearch.passwords import without_password
from kwsearch.resolve import network_of
from kwsearch.results import result_from
from kwsearch.run_directory import RECIPE
from kwsearch.trials import (
    ARCHITECTURE,
    LATENCY,
    NAMES,
    PEAK,
    SUPERNET,
    accuracy_of,
    baseline,
    front,
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from kwsearch.results import Found, Result
    from kwsearch.snapshot import Snapshot

_LONG = 20  # letters of a result that may need several lines
MOST_BYTES = 300_000  # of a page, as far as recipes have a say in it


def page(study: Snapshot, refresh: int | None = None) -> str:
    """One HTML file that loads nothing. refresh: seconds after which a browser asks again.

    Recipes are in it as far as they have room, those of the best plans first; for the others there
    is the command that writes them.
    """
    study = _with_choices(study)
    result = result_from(study)
    unbeaten = front(result.trials)
    context = {"refresh": refresh, **_context(study, result, unbeaten), "recipes": "", "kept": []}
    trials = study_table.by_worth(study, result, unbeaten)
    numbers = len(" ".join(str(trial.number) for trial in trials))
    room = MOST_BYTES - len(render("study.html", context).encode()) - numbers
    texts = ((trial.number, study_table.recipe_text(study, trial)) for trial in trials)
    text, kept = study_table.packed(texts, room)
    return render("study.html", {**context, "recipes": text, "kept": sorted(kept)})


def _with_choices(study: Snapshot) -> Snapshot:
    """The study with what supernets chose, as if it had been asked for."""
    if not any(SUPERNET in trial.user_attrs for trial in study.trials):
        return study
    try:
        space = architectures.space_of(study.recipe)
    except ValueError:  # of a recipe for another version
        return study
    kinds = {one.name: distribution_of(one) for one in space.decisions}
    trials = []
    for trial in study.trials:
        if SUPERNET in trial.user_attrs and ARCHITECTURE in trial.user_attrs:
            chosen = Architecture.from_dict(trial.user_attrs[ARCHITECTURE])
            trial = copy.copy(trial)
            trial.distributions, trial.params = {**kinds}, {**space.options(chosen)}
        trials.append(trial)
    return dataclasses.replace(study, trials=tuple(trials))


def _context(study: Snapshot, result: Result, unbeaten: Sequence[FrozenTrial]) -> dict[str, Any]:
    columns = study_table.columns(study)
    lines = study_table.lines(study, columns)
    spent, why_not = _spending(study, result)
    return {
        "name": study.recipe.model.name,
        "run": study.directory.absolute().name,
        "directory": str(study.directory.absolute()),
        "running": study.running,
        "now": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "standing": study_summary.standing(study, result),
        "about": [
            *study_summary.about(study, result),
            study_summary.trials_line(study),
            *study_summary.unfinished_lines(study, result),
            *study_summary.finals_lines(study, result),
            *study_summary.time_lines(study),
        ],
        "findings": study_report.best_lines(result),
        "metric": result.metric.title,
        "plans": _plans(result),
        "sweep": len(result.budgets) > 1,
        "of_architectures": study.recipe.of_architectures,
        "unmarked": sum(study_plots.reached(trial) is None for trial in result.trials),
        "costs": study_plots.over_costs(study, result, unbeaten),
        "progress": study_plots.over_time(study, result),
        "spent": spent,
        "why_not": why_not,
        "choices": study_choices.choices(result),
        "rungs": study_plots.rungs(result),
        "columns": columns,
        "wide": _wide(columns, lines),
        "lines": lines,
        "show": study_table.show_command(study),
        "states": [(study_summary.STATES[k], v) for k, v in study_summary.states(study).items()],
        "reasons": study_summary.reasons(result.trials),
        **_origin(study),
    }


def _wide(columns: Sequence[study_table.Column], lines: Sequence[study_table.Line]) -> int:
    """The place of the column of results, counted from 1, if they are sentences; else 0."""
    place = [column.title for column in columns].index("result")
    long = any(len(line.cells[place]) > _LONG for line in lines)
    return place + 3 if long else 0


# The best plans and what to compare with ----------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A network of the summary, or a difference of two. finals: mean and spread over seeds.

    of_budget: its parameters over what the budget allows; of an architecture its memory.
    """

    name: str
    number: int | None
    accuracy: str
    finals: str
    params: str
    macs: str
    latency: str
    of_budget: str = ""


@dataclass(frozen=True)
class Plans:
    """Of one budget. split: of the images that final accuracies are of; "" without finals."""

    budget: float | None
    split: str
    timed: bool
    rows: tuple[Row, ...]


def _plans(result: Result) -> list[Plans]:
    """The best plan of each budget against its baselines; none where nothing is complete."""
    found = []
    for one in result.budgets:
        trials = _compared(one)
        if not trials:
            continue
        rows = [_row(name, trial, one) for name, trial in trials.items()]
        first, *others = trials.items()
        if one.best is not None:
            rows += [_difference(first, other, one) for other in others]
        split = one.finals.split if one.finals is not None else ""
        timed = any(LATENCY in trial.user_attrs for trial in trials.values())
        found.append(Plans(one.budget, split, timed, tuple(rows)))
    return found


def _compared(found: Found) -> dict[str, FrozenTrial]:
    """By name: the best plan first, if there is one."""
    trials: dict[str, FrozenTrial] = {}
    best = found.best
    if best is not None:
        kind = baseline(best)
        name = "best architecture" if ARCHITECTURE in best.user_attrs else "best plan"
        trials[name if kind is None else f"{name}, which is the {kind} one"] = best
    for kind, name in NAMES.items():
        trial = found.baseline(kind)
        if trial is not None and trial is not best and accuracy_of(trial) is not None:
            trials[name] = trial
    return trials


def _row(name: str, trial: FrozenTrial, found: Found) -> Row:
    attrs = trial.user_attrs
    runs = _runs(trial, found)
    seeds = f" over {len(runs)} seeds" if len(runs) > 1 else " (1 seed)"
    spread = f" ± {100 * statistics.stdev(runs):.2f}" if len(runs) > 1 else ""
    return Row(
        name,
        trial.number,
        percent(trial.values[0]),
        f"{percent(statistics.fmean(runs)).removesuffix(' %')}{spread} %{seeds}" if runs else "",
        f"{attrs['params']:,}",
        f"{attrs['macs']:,}",
        f"{attrs[LATENCY]:.3g}" if LATENCY in attrs else "",
        _of_budget(trial, found),
    )


def _of_budget(trial: FrozenTrial, found: Found) -> str:
    attrs = trial.user_attrs
    if PEAK in attrs:
        return f"{attrs[PEAK]:,}"
    return percent(attrs["params"] / found.allowed) if found.allowed else ""


def _difference(best: tuple[str, FrozenTrial], other: tuple[str, FrozenTrial], found: Found) -> Row:
    """What the best plan has more."""
    mine, theirs = best[1], other[1]
    finals_of = [_runs(trial, found) for trial in (mine, theirs)]
    both = [statistics.fmean(runs) for runs in finals_of if runs]
    own, others = mine.user_attrs, theirs.user_attrs
    timed = LATENCY in own and LATENCY in others
    return Row(
        f"best less {other[0].partition(' ')[0]}",
        None,
        _points(mine.values[0] - theirs.values[0]),
        _points(both[0] - both[1]) if len(both) == 2 else "",
        f"{own['params'] - others['params']:+,}",
        f"{own['macs'] - others['macs']:+,}",
        f"{own[LATENCY] - others[LATENCY]:+.3g}" if timed else "",
        f"{own[PEAK] - others[PEAK]:+,}" if PEAK in own and PEAK in others else "",
    )


def _points(difference: float) -> str:
    return f"{100 * difference:+.2f} points"


def _runs(trial: FrozenTrial, found: Found) -> list[float]:
    """Accuracies of its final trainings, by seed."""
    if found.finals is None:
        return []
    return [*found.finals.accuracies.get(finals.name_of(trial), {}).values()]


# Where the budget goes, and where all this comes from ---------------------------------------------


def _spending(study: Snapshot, result: Result) -> tuple[list[study_spending.Spending], str]:
    """Of each budget, or why nothing can be said."""
    if not any(found.best for found in result.budgets):
        return [], "Nothing to show: no plan is complete."
    if study.recipe.of_architectures:
        return [], "Of an architecture: kwsearch budget with its recipe shows cell by cell."
    try:
        network = network_of(study.recipe)
        found = [
            study_spending.spending(one, network, place) for place, one in enumerate(result.budgets)
        ]
    except ValueError as error:  # code of the user's own, a missing package, another version of it
        return [], f"The network cannot be taken apart here: {error}"
    return [one for one in found if one is not None], ""


def _origin(study: Snapshot) -> dict[str, Any]:
    """What the study wrote down of its beginning, and its recipe; passwords are nobody's."""
    known = dict(study.recipe.provenance)
    command = known.pop("command", "")
    path = study.directory / RECIPE
    try:
        lock = path.read_text(encoding="utf-8")
    except OSError as error:
        lock = f"{path}: {error.strerror}"
    facts = {}
    for key, value in known.items():
        if isinstance(value, dict):
            facts[key] = ", ".join(f"{k} {v}" for k, v in value.items())
        elif isinstance(value, list):
            facts[key] = "; ".join(map(str, value))
        elif value not in (None, ""):
            facts[key] = str(value)
    facts = {key: without_password(text) for key, text in facts.items()}
    return {"command": str(command), "facts": facts, "lock": without_password(lock)}
