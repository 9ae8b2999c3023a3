"""Which choices of a search space matter: how much each does, and accuracy over each.

Importances are PED-ANOVA's (Watanabe et al. 2023, arXiv 2304.10255), as Optuna computes them: how
far a choice's values among the best trials differ from those among all. They add up to 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kwlayers.plan import counted
from kwsearch.pages.axes import Axis, axis, percent_axis
from kwsearch.pages.figure import SMALL, Bars, Figure
from kwsearch.pages.page import percent
from kwsearch.pages.study_plots import row
from kwsearch.trials import budget_of, by_budget, complete_plans

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from kwsearch.results import Result

LEAST = 4  # complete plans, to say anything at all
_ENOUGH = 8  # that have a choice which not all have, to say anything about it
_ADVISED = 5  # trials among the best, as Optuna advises
_FEW = 30  # plans, of which importances say little
_TELLS = 0.0005  # importances below would be written as 0.0 %
_BARS, _SLICES = 12, 6
_RATIO = "relative_ratio/"


@dataclass(frozen=True)
class Choices:
    """What the page says of them. too_few: why nothing is said, if so; or how to read it.

    left_out: choices of which nothing is shown, and why.
    """

    too_few: str = ""
    reading: str = ""
    importance: Bars | None = None
    slices: tuple[Figure, ...] = ()
    left_out: tuple[str, ...] = ()


def choices(result: Result) -> Choices:
    """Of the complete plans of a study."""
    trials = complete_plans(result.trials)
    known = varying(trials)
    varied = [name for name in known if _is_common(name, trials)]
    if len(trials) < LEAST or not varied or len({trial.values[0] for trial in trials}) == 1:
        done = f"{counted(len(trials), 'complete plan')}, {counted(len(varied), 'choice')}"
        return Choices(
            f"Too few to tell: {done} in which they differ. It takes {LEAST} plans that differ in "
            "accuracy, too."
        )
    values = centred(trials)
    best = max(_ADVISED, math.ceil(0.1 * len(trials)))
    quantile = min(best / len(trials), 1 / 3)
    found = _importances(trials, values, varied, quantile)
    order = sorted(varied, key=lambda name: (-found[name], name))
    shown = [name for name in order if found[name] >= _TELLS] or order
    several = len(result.budgets) > 1
    return Choices(
        reading=f"There is one choice, {said(order[0])}."
        if len(order) == 1
        else (
            f"By PED-ANOVA (optuna {_version()}) over {counted(len(trials), 'complete plan')}: how "
            f"far the values of the best {math.ceil(quantile * len(trials))} differ from those of "
            "all. They add up to 100 % over all choices."
            + (" Of so few plans that is a hint at most." if len(trials) < _FEW else "")
            + (" Accuracies are less the mean of their own budget." if several else "")
        ),
        importance=_bars(order, found) if len(order) > 1 else None,
        slices=tuple(
            _slice(i, name, trials, values, result) for i, name in enumerate(shown[:_SLICES])
        ),
        left_out=_left_out(len(order) - len(shown[:_SLICES]), len(known) - len(order)),
    )


def _is_common(name: str, trials: Sequence[FrozenTrial]) -> bool:
    """Whether enough plans have a choice: those of a shape are had by its plans only."""
    count = sum(name in trial.params for trial in trials)
    return count == len(trials) or count >= _ENOUGH


def _left_out(less: int, rare: int) -> tuple[str, ...]:
    """less: choices without a plot. rare: those that few plans have."""
    found = []
    if less:
        found.append(f"Without plots of their own: {counted(less, 'choice')} that matter less.")
    if rare:
        found.append(
            f"Left out: {counted(rare, 'choice')} that fewer than {_ENOUGH} plans have, as others "
            "exclude them."
        )
    return tuple(found)


def varying(trials: Sequence[FrozenTrial]) -> list[str]:
    """Choices of which trials have at least two values."""
    values: dict[str, set[Any]] = {}
    for trial in trials:
        for name, value in trial.params.items():
            values.setdefault(name, set()).add(value)
    return sorted(name for name, found in values.items() if len(found) > 1)


def said(choice: str) -> str:
    """A choice in words."""
    if choice.startswith(_RATIO):
        sharing, _, warehouse = choice.removeprefix(_RATIO).partition("/")
        return f"relative ratio of {warehouse} ({sharing})"
    return choice


def centred(trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """Accuracies by number; of several budgets, each less the mean of its own budget's."""
    groups = by_budget(trials)
    if len(groups) == 1:
        return {trial.number: trial.values[0] for trial in trials}
    means = {key: math.fsum(t.values[0] for t in own) / len(own) for key, own in groups.items()}
    return {trial.number: trial.values[0] - means[budget_of(trial)] for trial in trials}


def _importances(
    trials: Sequence[FrozenTrial],
    values: dict[int, float],
    names: Sequence[str],
    quantile: float,
) -> dict[str, float]:
    import warnings

    import optuna

    study = optuna.create_study(direction="maximize")
    for trial in trials:
        study.add_trial(
            optuna.trial.create_trial(
                value=values[trial.number],
                params=trial.params,
                distributions=trial.distributions,
            )
        )
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=quantile)
    with warnings.catch_warnings():
        # Of trials that are all equal, which then have equal importances.
        warnings.simplefilter("ignore", UserWarning)
        found: dict[str, float] = optuna.importance.get_param_importances(
            study, evaluator=evaluator, params=list(names)
        )
    return found


def _version() -> str:
    from importlib.metadata import version

    return version("optuna")


def _bars(order: Sequence[str], found: dict[str, float]) -> Bars:
    own = [name for name in order if found[name] >= _TELLS][:_BARS]
    shown = [(said(name), (found[name],)) for name in own]
    if others := order[len(own) :]:
        rest = math.fsum(found[name] for name in others)
        shown.append((f"{counted(len(others), 'other')}, together", (rest,)))
    words = ", ".join(f"{name} {percent(values[0])}" for name, values in shown[:3])
    x = percent_axis("importance (%)", [0.0, *(values[0] for _, values in shown)])
    return Bars(
        "importance",
        "How much each choice matters",
        f"Most: {words}.",
        Axis(x.title, 0.0, x.high, x.ticks),
        shown,
        percent,
    )


def _slice(
    place: int,
    name: str,
    trials: Sequence[FrozenTrial],
    values: dict[int, float],
    result: Result,
) -> Figure:
    """Accuracy over one choice: a dot for each plan that has it; for words the mean, too."""
    own = [trial for trial in trials if name in trial.params]
    distribution = own[-1].distributions[name]
    labels = getattr(distribution, "choices", None)
    places = None if labels is None else _spread_out(own, name, labels)
    x = _words_axis(said(name), labels) if labels is not None else _ratio_axis(name, own)
    y = _accuracy_axis(own, values, len(result.budgets) > 1)
    figure = Figure(f"choice-{place}", f"Accuracy over {said(name)}", "", x, y, SMALL)

    def at(trial: FrozenTrial) -> tuple[float, float]:
        where = trial.params[name] if places is None else places[trial.number]
        return where, values[trial.number]

    figure.dots([at(trial) for trial in own])
    figure.explain("dot", "plan")
    if labels is None:
        figure.description = (
            f"{counted(len(own), 'plan')} with {min(t.params[name] for t in own):.3g} to "
            f"{max(t.params[name] for t in own):.3g}."
        )
    else:
        unit = " %" if len(result.budgets) == 1 else " points"
        figure.description = _means(figure, name, labels, own, values, unit)
    best = {found.best.number for found in result.budgets if found.best is not None}
    if starred := [trial for trial in own if trial.number in best]:
        figure.marks([(*at(trial), row(trial)) for trial in starred], "best")
        figure.explain("best", "best plan")
    return figure


def _means(
    figure: Figure,
    name: str,
    labels: Sequence[Any],
    own: Sequence[FrozenTrial],
    values: dict[int, float],
    unit: str,
) -> str:
    """Draw the mean of each value; all of them in words."""
    words = []
    for i, label in enumerate(labels):
        group = [values[trial.number] for trial in own if trial.params[name] == label]
        if group:
            mean = math.fsum(group) / len(group)
            figure.line([(i - 0.35, mean), (i + 0.35, mean)], "mean")
            words.append(f"{label}: {100 * mean:.2f}{unit} over {counted(len(group), 'plan')}")
    figure.explain("mean", "mean of the value")
    return f"Means: {'; '.join(words)}."


def _spread_out(own: Sequence[FrozenTrial], name: str, labels: Sequence[Any]) -> dict[int, float]:
    """Beside one another around their value's place: by number, always the same."""
    golden = 0.618034
    return {
        trial.number: labels.index(trial.params[name]) + (trial.number * golden % 1 - 0.5) * 0.5
        for trial in own
    }


def _words_axis(title: str, labels: Sequence[Any]) -> Axis:
    """A place for each of the values, whose names are cut to what has room."""
    room = max(4, 46 // len(labels))
    texts = [f"{v:g}" if isinstance(v, float) else str(v) for v in labels]
    cut = [text if len(text) <= room else f"{text[: room - 1]}…" for text in texts]
    return Axis(title, -0.5, len(labels) - 0.5, tuple(enumerate(cut)))


def _ratio_axis(name: str, own: Sequence[FrozenTrial]) -> Axis:
    found = [float(trial.params[name]) for trial in own]
    return axis(said(name), found, log=bool(getattr(own[-1].distributions[name], "log", False)))


def _accuracy_axis(own: Sequence[FrozenTrial], values: dict[int, float], relative: bool) -> Axis:
    found = [values[trial.number] for trial in own]
    if not relative:
        return percent_axis("accuracy (%)", found)
    return axis("points from the budget's mean", found, lambda v: f"{100 * v:+.3g}")
