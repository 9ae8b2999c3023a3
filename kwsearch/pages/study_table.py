"""A study's trials as the rows of a table, and what makes their recipes one small text."""

from __future__ import annotations

import base64
import json
import math
import shlex
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.plan import group_from
from kwsearch import study_summary
from kwsearch.pages.page import percent
from kwsearch.pages.study_choices import said, varying
from kwsearch.pages.study_plots import reached
from kwsearch.passwords import without_password
from kwsearch.recipe import dump_recipe
from kwsearch.results import recipe_of_trial, under
from kwsearch.shapes import METHOD
from kwsearch.study_report import result_of
from kwsearch.trials import (
    ARCHITECTURE,
    FLASH,
    LATENCY,
    PEAK,
    SECONDS,
    accuracy_of,
    baseline,
    budget_of,
    by_budget,
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from kwsearch.results import Result
    from kwsearch.snapshot import Snapshot

_RATIO = "relative_ratio/"
_MOST_RATIOS = 6  # relative ratios with columns of their own


@dataclass(frozen=True)
class Column:
    """Of the table. number: whether its values are to be sorted and aligned as such. told: whether
    a mark of a trial says it, too.
    """

    title: str
    number: bool
    cell: Callable[[FrozenTrial], str]
    told: bool = False


@dataclass(frozen=True)
class Line:
    """A row. state: in our words. tip: what a mark of it says besides its cells. recipe: whether
    it has a plan.
    """

    number: int
    state: str
    tip: str
    cells: tuple[str, ...]
    recipe: bool


def columns(study: Snapshot) -> list[Column]:
    """Those that say something about any of the trials, besides its number and its recipe."""
    trials = study.trials
    methods = {_method(trial) for trial in trials if _method(trial)}
    found = [
        Column("kind", False, lambda trial: baseline(trial) or "", told=True),
    ]
    if len(by_budget(trials)) > 1:
        found.append(Column("budget", True, _budget, told=True))
    found += [
        Column("result", False, result_of),
        Column("accuracy", True, _accuracy, told=True),
        Column("parameters", True, lambda trial: _count(trial, "params"), told=True),
        Column("MACs", True, lambda trial: _count(trial, "macs"), told=True),
    ]
    if any(PEAK in trial.user_attrs for trial in trials):
        found.append(Column("memory (bytes)", True, lambda t: _count(t, PEAK), told=True))
        found.append(Column("flash (bytes)", True, lambda t: _count(t, FLASH)))
    if any(LATENCY in trial.user_attrs for trial in trials):
        found.append(Column("ms", True, lambda t: _rounded(t, LATENCY, "{:.4g}"), told=True))
    found.append(Column("seconds", True, lambda trial: _rounded(trial, SECONDS, "{:.1f}")))
    if len(methods) > 1:
        found.append(Column("method", False, _method))
    sizes = [Column("sizes", False, _sizes)]
    if not any("groups" in trial.user_attrs for trial in trials):
        sizes = []
    return [*found, *_choice_columns(trials), *sizes]


def _budget(trial: FrozenTrial) -> str:
    budget = budget_of(trial)
    return "" if budget is None else f"{budget:.12g}"


def _accuracy(trial: FrozenTrial) -> str:
    """Of the full training; what a stopped trial came to is said by its mark."""
    found = accuracy_of(trial)
    return "" if found is None else percent(found)


def _count(trial: FrozenTrial, key: str) -> str:
    return f"{trial.user_attrs[key]:,}" if key in trial.user_attrs else ""


def _rounded(trial: FrozenTrial, key: str, form: str) -> str:
    value = trial.user_attrs.get(key)
    return "" if value is None else form.format(value)


def _method(trial: FrozenTrial) -> str:
    groups = trial.user_attrs.get("groups", ())
    return str(groups[0]["method"]) if groups else ""


def _choice_columns(trials: Sequence[FrozenTrial]) -> list[Column]:
    """Of each choice that varies; ratios are one column where they are many."""
    names = varying(trials)
    if METHOD in names and all(_method(t) in ("", t.params.get(METHOD)) for t in trials):
        names.remove(METHOD)  # a column of its own says it
    ratios = [name for name in names if name.startswith(_RATIO)]
    if len(ratios) > _MOST_RATIOS:
        names = [name for name in names if name not in ratios]

    def column(name: str) -> Column:
        numbers = all(isinstance(t.params.get(name, 0.0), (int, float)) for t in trials)
        title = "method asked for" if name == METHOD else said(name)
        return Column(title, numbers, lambda trial: _value(trial.params.get(name)))

    found = [column(name) for name in names]
    if len(ratios) > _MOST_RATIOS:
        found.append(Column("relative ratios", False, lambda trial: _several(_ratios(trial))))
    return found


def _ratios(trial: FrozenTrial) -> list[str]:
    return [f"{v:.2f}" for k, v in trial.params.items() if k.startswith(_RATIO)]


def _value(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _sizes(trial: FrozenTrial) -> str:
    groups = trial.user_attrs.get("groups", ())
    return _several([str(group_from(group).size) for group in groups])


def _several(texts: Sequence[str]) -> str:
    return " ".join(texts) if len(texts) <= 6 else f"{' '.join(texts[:4])} … {texts[-1]}"


def lines(study: Snapshot, shown: Sequence[Column]) -> list[Line]:
    """A row for each trial, by number."""
    return [
        Line(
            trial.number,
            study_summary.STATES[trial.state.name.lower()],
            tip(trial),
            tuple(column.cell(trial) for column in shown),
            _has_recipe(trial),
        )
        for trial in study.trials
    ]


def tip(trial: FrozenTrial) -> str:
    """The accuracy of a trial that is not complete, which is in no cell; "" for others."""
    accuracy = reached(trial)
    if accuracy is None or accuracy_of(trial) is not None:
        return ""
    return f"{percent(accuracy)} at epoch {trial.last_step}"


# Recipes ----------------------------------------------------------------------------------------


# Texts by study, recipe and trial: while a study runs, its page is made again and again.
_TEXTS: dict[tuple[str, str, int], str] = {}


def recipe_text(study: Snapshot, trial: FrozenTrial) -> str:
    """As `kwsearch show RUN N -o FILE` writes it, but for passwords: pages are passed on."""
    key = str(study.directory), study.recipe.model_dump_json(), trial.number
    if key not in _TEXTS:
        recipe = recipe_of_trial(study.recipe, trial)
        if (budget := budget_of(trial)) is not None:
            recipe = under(recipe, budget)
        text = dump_recipe(recipe, [f"Trial {trial.number} of {study.directory}."])
        _TEXTS[key] = without_password(text)
    return _TEXTS[key]


def show_command(study: Snapshot) -> str:
    """The command that writes a trial's recipe, with {} for its number."""
    return f"kwsearch show {shlex.quote(str(study.directory))} {{}} -o trial_{{}}.yaml"


def by_worth(study: Snapshot, result: Result, front: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials with a plan: the best, the front, baselines, then by accuracy."""
    first = [found.best.number for found in result.budgets if found.best is not None]
    first += [trial.number for trial in front]
    first += [trial.number for trial in study.trials if baseline(trial)]
    rank = {number: place for place, number in reversed(list(enumerate(first)))}

    def worth(trial: FrozenTrial) -> tuple[float, float, int]:
        value = accuracy_of(trial)
        place = rank.get(trial.number, math.inf)
        return place, math.inf if value is None else -value, trial.number

    return sorted(filter(_has_recipe, study.trials), key=worth)


def _has_recipe(trial: FrozenTrial) -> bool:
    return "groups" in trial.user_attrs or ARCHITECTURE in trial.user_attrs


def packed(texts: Iterable[tuple[int, str]], room: int) -> tuple[str, list[int]]:
    """As many texts, from the first on, as compressed have room in so many letters.

    JSON {number: text}, deflated, in base64; and the numbers.
    """
    deflate = zlib.compressobj(9)
    done = b""
    numbers: list[int] = []
    whole = ""
    for number, text in texts:
        entry = f"{',' if numbers else '{'}{json.dumps(str(number))}:{json.dumps(text)}"
        more = done + deflate.compress(entry.encode())
        end = deflate.copy()
        found = base64.b64encode(more + end.compress(b"}") + end.flush()).decode()
        if len(found) > room:
            break
        done, whole = more, found
        numbers.append(number)
    return whole, numbers
