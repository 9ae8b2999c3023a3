"""A study's trials as plots: accuracy over costs, the best so far, rungs against full length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from kwlayers.plan import counted
from kwsearch import study_report, verdict
from kwsearch.pages.axes import Axis, axis, count_axis, percent_axis
from kwsearch.pages.figure import SMALL, Figure, series
from kwsearch.pages.page import percent
from kwsearch.recipe import Search
from kwsearch.trials import (
    LATENCY,
    NAMES,
    PEAK,
    SUPERNET,
    accuracy_of,
    baseline,
    complete_plans,
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from kwsearch.results import Found, Result
    from kwsearch.snapshot import Snapshot

_COSTS = {
    "params": "parameters",
    "macs": "MACs of one input",
    PEAK: "memory (bytes of activations)",
    LATENCY: "latency (ms)",
}
_SHORT = {"params": "params", "macs": "macs", PEAK: "memory", LATENCY: "latency"}
# What marks are, in the order in which they are drawn.
_MARKS = {
    "stopped": "stopped: accuracy of its last epoch",
    "running": "unfinished: accuracy so far",
    "trial": "complete trial",
    "front": "on the front: no other is better in everything",
    **NAMES,
    "best": "the best",
}
_APART = 6.0  # costs that differ by more are on a logarithmic axis


def _title(result: Result) -> str:
    return f"{result.metric.title} (%)"


def row(trial: FrozenTrial) -> str:
    """The link to a trial's row."""
    return f"#t{trial.number}"


def reached(trial: FrozenTrial) -> float | None:
    """Its accuracy, or that of the last epoch that it came to; None for a failed one, too."""
    found = accuracy_of(trial)
    # Until a supernet's choice is trained by itself, accuracies are of weights that many share.
    last = 0 if SUPERNET in trial.user_attrs else trial.last_step
    if found is None and last and trial.state.name in ("PRUNED", "RUNNING"):
        found = trial.intermediate_values[last]
    return found if found is not None and math.isfinite(found) else None


# Over costs -------------------------------------------------------------------------------------


def over_costs(study: Snapshot, result: Result, front: Sequence[FrozenTrial]) -> list[Figure]:
    """Accuracy over parameters, MACs, and latency where trials have it; none without trials.

    front: as `kwsearch.trials` finds it.
    """
    marks = _marks(study.trials, result, front)
    found = []
    for key in _COSTS:
        shown = {
            kind: [trial for trial in trials if key in trial.user_attrs]
            for kind, trials in marks.items()
        }
        if any(shown.values()):
            found.append(_over_cost(key, shown, result))
    return found


def _marks(
    trials: Iterable[FrozenTrial], result: Result, front: Iterable[FrozenTrial]
) -> dict[str, list[FrozenTrial]]:
    """Which trials have which mark; a baseline that is best has both."""
    best = {found.best.number for found in result.budgets if found.best is not None}
    unbeaten = {trial.number for trial in front}
    found: dict[str, list[FrozenTrial]] = {kind: [] for kind in _MARKS}
    for trial in trials:
        if reached(trial) is None:
            continue
        kind = "front" if trial.number in unbeaten else "trial"
        if trial.state.name in ("PRUNED", "RUNNING"):
            kind = "stopped" if trial.state.name == "PRUNED" else "running"
        if trial.number in best:
            found["best"].append(trial)
        if baseline(trial) or trial.number not in best:
            found[baseline(trial) or kind].append(trial)
    return found


def _over_cost(
    key: str,
    marks: Mapping[str, Sequence[FrozenTrial]],
    result: Result,
) -> Figure:
    def place(trial: FrozenTrial) -> tuple[float, float]:
        accuracy = reached(trial)
        assert accuracy is not None
        return float(trial.user_attrs[key]), accuracy

    limits = _limits(key, result)
    points = [place(trial) for trials in marks.values() for trial in trials]
    done = (trial for trial in result.trials if accuracy_of(trial) is not None)
    line = stairs(place(trial) for trial in done if key in trial.user_attrs)
    figure = Figure(
        f"over-{_SHORT[key]}",
        f"Accuracy over {_COSTS[key].partition(' ')[0]}",
        _in_words(key, points, line, marks, limits),
        _cost_axis(key, [x for x, _ in points] + [x for x, _ in limits]),
        percent_axis(_title(result), [y for _, y in points]),
    )
    figure.line(line, "front", step=True)
    for kind, text in _MARKS.items():
        if marks[kind]:
            figure.marks([(*place(trial), row(trial)) for trial in marks[kind]], kind)
            figure.explain(kind, text)
    for level, (value, text) in enumerate(limits):  # last: their texts keep clear of marks
        figure.rule(x=value, text=text, level=level % 5)
    if len(line) > 1:
        figure.explain("front-line", f"the front in accuracy and {_COSTS[key].partition(' ')[0]}")
    return figure


def stairs(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, accuracy) that no other beats in these two, by cost."""
    found: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not found or accuracy > found[-1][1]:
            found.append((cost, accuracy))
    return found


def _limits(key: str, result: Result) -> list[tuple[float, str]]:
    """What no plan may exceed, and how that is written: budgets, and the recipe's limits."""
    if key == "params":
        known = [(found.allowed, found.budget) for found in result.budgets]
        several = len(result.budgets) > 1
        return [
            (float(allowed), f"budget {budget:.12g}" if several else f"budget {allowed:,}")
            for allowed, budget in known
            if allowed is not None
        ]
    limits = (result.recipe.search or Search()).space.limits
    if key == "macs":
        return [(float(limits.macs), f"limit {limits.macs:,}")] if limits.macs else []
    if key == PEAK:
        most = limits.peak_memory
        return [(float(most), f"limit {most:,} bytes")] if most else []
    return [(limits.latency_ms, f"limit {limits.latency_ms:g} ms")] if limits.latency_ms else []


def _cost_axis(key: str, values: Sequence[float]) -> Axis:
    log = max(values) > _APART * min(values) > 0
    if key == LATENCY:
        return axis(_COSTS[key], values, log=log)
    return count_axis(_COSTS[key], values, log=log)


def _in_words(
    key: str,
    points: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]],
    marks: Mapping[str, Sequence[FrozenTrial]],
    limits: Sequence[tuple[float, str]],
) -> str:
    """What the plot shows, for those who do not see it."""

    def cost(value: float) -> str:
        return f"{value:.4g} ms" if key == LATENCY else f"{value:,.0f}"

    numbers = {trial.number for trials in marks.values() for trial in trials}
    shown = counted(len(numbers), "trial")
    low, high = (cost(f(x for x, _ in points)) for f in (min, max))
    worst, best = (percent(f(y for _, y in points)) for f in (min, max))
    parts = [
        f"{shown} of {low} to {high}"
        + ("" if key == LATENCY else f" {_COSTS[key].partition(' ')[0]}")
        + f", {worst} to {best}"
    ]
    if marks["best"]:
        named = ", ".join(f"trial {t.number} with {percent(t.values[0])}" for t in marks["best"])
        parts.append(f"best: {named}")
    if line:
        parts.append("the front goes " + ", ".join(f"{cost(x)}: {percent(y)}" for x, y in line[:6]))
    parts += [f"{text} is a dashed line" for _, text in limits[:1]]
    return f"{'; '.join(parts)}."


# The best so far --------------------------------------------------------------------------------


def over_time(study: Snapshot, result: Result) -> list[Figure]:
    """The best accuracy so far over trials and over time; none before a plan is complete."""
    done = [trial for trial in study.trials if trial.datetime_complete is not None]
    starts = [trial.datetime_start for trial in study.trials if trial.datetime_start is not None]
    if not complete_plans(done) or not starts:
        return []
    first = min(starts)

    def seconds(trial: FrozenTrial) -> float:
        assert trial.datetime_complete is not None
        return (trial.datetime_complete - first).total_seconds()

    unit, name = _time_unit(max(map(seconds, done)))
    trials = ("Best so far over trials", "trial {:.0f}", "trial")
    title = f"time since the first start ({name}), pauses included"
    times = ("Best so far over time", f"{{:.3g}} {name}", title)
    return [
        _so_far("by-trial", *trials, result, done, lambda trial: trial.number),
        _so_far("by-time", *times, result, done, lambda trial: seconds(trial) / unit),
    ]


def _time_unit(longest: float) -> tuple[float, str]:
    """Seconds of the unit for times up to `longest` seconds, and its name."""
    if longest < 300:
        return 1.0, "s"
    return (60.0, "min") if longest < 3 * 3600 else (3600.0, "h")


def _so_far(
    name: str,
    title: str,
    when: str,
    x_title: str,
    result: Result,
    done: Sequence[FrozenTrial],
    at: Callable[[FrozenTrial], float],
) -> Figure:
    """One line for each budget, up to the last trial; every plan is a dot, every stop a dash.

    at: of a trial on the axis. when: how that is written.
    """
    lines = {found.budget: rising(found, at) for found in result.budgets}
    end = max(map(at, done))
    shown = {trial.number: value for trial in done if (value := reached(trial)) is not None}
    words = []
    for budget, line in lines.items():
        if line:
            head = f"budget {budget:.12g}: " if len(lines) > 1 else ""
            rose = f"{percent(line[-1][1])} from {when.format(line[-1][0])} on"
            words.append(f"{head}{percent(line[0][1])} at first, {rose}")
    figure = Figure(
        name,
        title,
        f"{'; '.join(words)}. Static networks do not count.",
        axis(x_title, [*map(at, done), 0.0]),
        percent_axis(_title(result), shown.values()),
    )
    plans = [t for t in done if baseline(t) != "static" and t.number in shown]
    for kind, text in (("dash", "stopped"), ("dot", "complete")):
        own = [t for t in plans if (accuracy_of(t) is None) == (kind == "dash")]
        figure.dots([(at(t), shown[t.number]) for t in own], kind)
        if own:
            figure.explain(kind, text)
    for i, (budget, line) in enumerate(lines.items()):
        if line:
            kind = series(i)
            figure.line([*line, (end, line[-1][1])], kind, step=True)
            figure.explain(kind, f"best of budget {budget:.12g}" if len(lines) > 1 else "best")
    return figure


def rising(found: Found, at: Callable[[FrozenTrial], float]) -> list[tuple[float, float]]:
    """Where the best accuracy of a budget's plans rose, and to what."""
    line: list[tuple[float, float]] = []
    for trial in sorted(complete_plans(found.trials), key=at):
        if not line or trial.values[0] > line[-1][1]:
            line.append((at(trial), trial.values[0]))
    return line


# Rungs ------------------------------------------------------------------------------------------


def rungs(result: Result) -> list[Figure]:
    """For each rung and score: trials there against the end, and how alike they rank."""
    found = []
    for i, (name, pairs) in enumerate(study_report.rankings(result).items()):
        sentence = verdict.trust_sentence("", verdict.trust({name: pairs})[name])
        there, end = ([pair[side] for pair in pairs] for side in (0, 1))
        what = name.rpartition(": ")[2]
        is_score = what.startswith("score ")
        figure = Figure(
            f"rung-{i}",
            f"{name.capitalize()} against the full length",
            f"{sentence.removeprefix(': ').capitalize()}.",
            axis(what, there) if is_score else percent_axis(f"accuracy at the {what} (%)", there),
            percent_axis("final accuracy (%)", end),
            SMALL,
        )
        figure.dots(pairs)
        found.append(figure)
    return found
