"""A study in short: what is searched, how far it is, what was found, how sure that is, what failed,
and where it comes from. Also of one that runs, was left half-way, or has nothing to show.
"""

from __future__ import annotations

import datetime
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kwlayers.plan import counted
from kwsearch import scatter, study_report, verdict
from kwsearch.finals import Training
from kwsearch.recipe import Proxy, Recipe, Search
from kwsearch.resolve import input_of, target_of, targets_of
from kwsearch.results import finalists
from kwsearch.terminal import new_table
from kwsearch.trials import (
    DOUBLE,
    EXHAUSTED,
    LATENCY,
    LEASE,
    NAMES,
    PEAK,
    SECONDS,
    baseline,
    front,
)

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial
    from rich.table import Table

    from kwsearch.results import Found, Result
    from kwsearch.snapshot import Snapshot

Over = Literal["params", "macs"]

# Optuna's states in our words.
STATES = {
    "complete": "complete",
    "pruned": "stopped",
    "fail": "failed",
    "running": "unfinished",
    "waiting": "not begun",
}
_AXES = {
    "params": scatter.Axis("parameters", scatter.show_count),
    "macs": scatter.Axis("MACs", scatter.show_count),
}
# Trials that a line names, and letters of a reason that it shows.
_NAMED, _LETTERS = 8, 200


def parts(
    study: Snapshot, result: Result, plot: Sequence[str], short: bool = False
) -> list[str | Table]:
    """Lines and tables, the most important ones first. plot: lines that stand between them. short:
    whether what stands above it is.
    """
    found: list[str | Table] = [*head(study, result, short)]
    found += ["", *plot] if plot else []
    found.append("")
    if any(trial.state.name == "COMPLETE" for trial in result.trials):
        found += [plans_table(result), study_report.front_table(result)]
    found += study_report.trust_lines(result)
    found += [_reason_line(reason) for reason in reasons(result.trials)]
    return [*found, *time_lines(study), *_source_lines(study.recipe)]


def head(study: Snapshot, result: Result, short: bool = False) -> list[str]:
    """What is searched, how far it is and what is best. short: without what stays the same, and
    what follows on what is best.
    """
    best = study_report.best_lines(result)
    found = [one.best_path for one in result.budgets if one.best_path]
    return [
        f"study {study.directory}: {standing(study, result)}",
        *([] if short else about(study, result)),
        trials_line(study),
        *unfinished_lines(study, result),
        *finals_lines(study, result),
        *([line for line in best if not line.startswith(" ")] if short else best),
        *([] if short else [f"recipe of the best: {path}" for path in found]),
    ]


def headline(study: Snapshot, result: Result) -> str:
    """How far it is and what is best, in one line."""
    best = [line for line in study_report.best_lines(result) if not line.startswith((" ", "warn"))]
    return "; ".join([trials_line(study), *finals_lines(study, result), *best])


def plot(
    result: Result,
    over: Over = "params",
    *,
    width: int,
    height: int = 16,
    encoding: str = "utf-8",
) -> list[str]:
    """Accuracy of trials over their costs, as fits so many columns."""
    if width < scatter.LEAST:
        return [f"no plot: it takes {scatter.LEAST} columns, and there are {width}"]
    return scatter.scatter(
        points(result, over),
        x=_AXES[over],
        y=scatter.Axis(result.metric.title, scatter.show_share, most=1.0),
        width=min(width, scatter.MOST),
        height=height,
        lines=_limits(result, over),
        encoding=encoding,
    )


def points(result: Result, over: Over) -> list[scatter.Point]:
    """Accuracy over parameters or MACs of the trials that were trained in full."""
    best = {found.best.number for found in result.budgets if found.best is not None}
    beaten_by_none = {trial.number for trial in front(result.trials)}

    def kind(trial: FrozenTrial) -> str:
        if trial.number in best:
            return "best"
        return baseline(trial) or ("front" if trial.number in beaten_by_none else "trial")

    return [
        scatter.Point(trial.user_attrs[over], trial.values[0], kind(trial))
        for trial in result.trials
        if trial.state.name == "COMPLETE"
    ]


def _limits(result: Result, over: Over) -> list[int]:
    """What no plan exceeds: budgets, or the recipe's limit of MACs."""
    if over == "params":
        return [found.allowed for found in result.budgets if found.allowed is not None]
    most = (result.recipe.search or Search()).space.limits.macs
    return [] if most is None else [most]


# What is searched -----------------------------------------------------------------------------


def standing(study: Snapshot, result: Result) -> str:
    """Whether it runs, and if not whether it is over."""
    if study.running:
        return "running"
    left = not _has_all(study, result.trials) or len(result.trials) < len(study.trials)
    done, planned = _final_trainings(study, result)
    if left or len(done) < planned:
        return "not running; kwsearch optimize with --resume goes on with it"
    return "finished"


def _asked(study: Snapshot) -> int:
    return (study.recipe.search or Search()).trials


def _has_all(study: Snapshot, finished: Sequence[FrozenTrial]) -> bool:
    """Whether these are as many as were asked for, or all that there can be."""
    return _count(finished) >= _asked(study) or EXHAUSTED in study.attributes


def _count(finished: Iterable[FrozenTrial]) -> int:
    """Without those that the database made twice."""
    return sum(DOUBLE not in trial.user_attrs for trial in finished)


def about(study: Snapshot, result: Result) -> Iterator[str]:
    """What is searched, on which images, under which budgets."""
    recipe, proxy = study.recipe, study.recipe.proxy or Proxy()
    size = _input(recipe)
    sized = "" if size is None else f", input {'x'.join(map(str, size))}"
    yield f"model: {recipe.model.name}{sized}"
    yield f"trials train on {proxy.data}, {counted(proxy.epochs, 'epoch')} in full"
    for found in result.budgets:
        if found.budget is not None:
            yield _budget_line(recipe, found, found.budget)
    limits = _limits_line(recipe)
    if limits or recipe.of_architectures:
        yield f"limits: {limits or 'none'}"


def _input(recipe: Recipe) -> tuple[int, ...] | None:
    """None for a network that nothing here can load: the user's own code, a missing package."""
    try:
        return input_of(recipe)
    except ValueError:
        return None


def _budget_line(recipe: Recipe, found: Found, value: float) -> str:
    """A budget as the recipe gives it, and the parameters that it allows."""
    words = {
        "ratio": f"b = {value:.12g}, cells per mixture",
        "params": f"{value:,.12g} parameters",
        "total_ratio": f"{value:.12g} x the static network",
    }[_kind(recipe)]
    if found.allowed is None or _kind(recipe) == "params":
        return f"budget: {words}"
    return f"budget: {words}: at most {found.allowed:,} parameters"


def _limits_line(recipe: Recipe) -> str:
    """What no plan or architecture exceeds, besides a budget; empty for nothing."""
    limits = (recipe.search or Search()).space.limits
    found = []
    if limits.macs is not None:
        found.append(f"{limits.macs:,} MACs")
    if limits.train_memory is not None:
        found.append(f"{limits.train_memory:,} bytes of memory for a training step")
    if limits.latency_ms is not None:
        found.append(f"{limits.latency_ms:g} ms by {limits.lut}")
    if limits.peak_memory is not None:
        found.append(f"{limits.peak_memory:,} bytes of memory")
    if limits.flash is not None:
        found.append(f"{limits.flash:,} bytes of flash")
    return ", ".join(found)


def _kind(recipe: Recipe) -> str:
    (kind,) = (name for name, given in vars(target_of(recipe)).items() if given is not None)
    return kind


# How far it is --------------------------------------------------------------------------------


def states(study: Snapshot) -> dict[str, int]:
    """Trials by Optuna's state, in its order of ours; they add up to all trials."""
    known = Counter(trial.state.name.lower() for trial in study.trials)
    return {state: known[state] for state in STATES if known[state]}


def trials_line(study: Snapshot) -> str:
    """How many trials there are, of those that were asked for."""
    known = states(study)
    words = [f"{count} {STATES[state]}" for state, count in known.items()]
    count = _count(trial for trial in study.trials if trial.state.is_finished())
    line = f"trials: {count} of {_asked(study)} finished ({', '.join(words) or 'none yet'})"
    if count < _asked(study) and EXHAUSTED in study.attributes:
        line += f", and no others can be had: {study.attributes[EXHAUSTED]}"
    return line


def unfinished(study: Snapshot) -> list[FrozenTrial]:
    """Trials that began and did not end: they train, wait at a rung, or were interrupted."""
    return [t for t in study.trials if not t.state.is_finished() and LEASE in t.user_attrs]


def unfinished_lines(study: Snapshot, result: Result) -> Iterator[str]:
    """How far each of them is."""
    trials, last = unfinished(study), result.rungs[-1].step
    for trial in trials[:_NAMED]:
        step = trial.last_step or 0  # at step 0 there is a score, if anything
        accuracy = f", {trial.intermediate_values[step]:.2%}" if step else ""
        yield f"    trial {trial.number}: after epoch {step} of {last}{accuracy}"
    if len(trials) > _NAMED:
        yield f"    and {len(trials) - _NAMED} more"


def _final_trainings(study: Snapshot, result: Result) -> tuple[list[Any], int]:
    """The results of the verdict's trainings so far, and how many there will be.

    None will be until all trials are there: who is a finalist is not known.
    """
    search = study.recipe.search or Search()
    chosen = finalists(result.budgets, search.finalists) if search.finalists else []
    keys = [Training(trial.number, seed).key for trial in chosen for seed in range(search.seeds)]
    done = [study.attributes[key] for key in keys if key in study.attributes]
    over = _has_all(study, result.trials)
    return done, len(keys) if over or done else 0


def finals_lines(study: Snapshot, result: Result) -> list[str]:
    """How many of the verdict's trainings are done."""
    done, planned = _final_trainings(study, result)
    if not planned:
        return []
    failed = sum("error" in one for one in done)
    line = f"final trainings: {len(done)} of {planned}"
    return [f"{line} ({failed} failed)" if failed else line]


# What was found -------------------------------------------------------------------------------


def plans_table(result: Result) -> Table:
    """The best plan of each budget and its baselines: what they cost, what they are worth."""
    sweep = len(result.budgets) > 1
    timed = any(LATENCY in trial.user_attrs for trial in result.trials)
    held = result.recipe.of_architectures
    table = new_table(
        (*(["budget"] if sweep else []), "network", "trial"),
        (
            *(result.metric.title, "parameters", *([] if held else ["of budget"]), "MACs"),
            *(["memory, bytes"] if held else []),
            *(["ms"] if timed else []),
        ),
        spare=(*([] if held else ["of budget"]), "MACs", "trial"),
    )
    for found in result.budgets:
        for name, trial in _plans(found):
            attrs = trial.user_attrs
            share = attrs["params"] / found.allowed if found.allowed else None
            table.add_row(
                *([f"{found.budget:.12g}"] if sweep else []),
                name,
                str(trial.number),
                f"{trial.values[0]:.2%}",
                f"{attrs['params']:,}",
                *([] if held else ["" if share is None else f"{share:.1%}"]),
                f"{attrs['macs']:,}",
                *([f"{attrs[PEAK]:,}"] if held else []),
                *([f"{attrs[LATENCY]:.3g}" if LATENCY in attrs else ""] if timed else []),
            )
    return table


def _plans(found: Found) -> Iterator[tuple[str, FrozenTrial]]:
    best = found.best
    if best is not None:
        yield "best architecture" if PEAK in best.user_attrs else "best plan", best
    for kind, name in NAMES.items():
        trial = found.baseline(kind)
        if trial is not None and trial.state.name == "COMPLETE" and trial is not best:
            yield name, trial


@dataclass(frozen=True)
class Reason:
    """Why trials did not complete: `numbers` of those with this reason."""

    state: str
    text: str
    numbers: tuple[int, ...]


def reasons(trials: Sequence[FrozenTrial]) -> list[Reason]:
    """By reason, failures first, then by count. Reasons that differ in numbers after their first
    colon alone are one, with N in their place.
    """
    groups: dict[tuple[str, str, str], list[FrozenTrial]] = {}
    for trial in trials:
        if trial.state.name in ("FAIL", "PRUNED"):
            head, _, tail = _text(trial).partition(": ")
            key = trial.state.name.lower(), head, re.sub(r"\d[\d,.]*\d|\d", "N", tail)
            groups.setdefault(key, []).append(trial)
    found = []
    for (state, head, tail), members in groups.items():
        texts = {_text(trial) for trial in members}
        text = texts.pop() if len(texts) == 1 else f"{head}: {tail}"
        found.append(Reason(state, text, tuple(trial.number for trial in members)))
    return sorted(found, key=lambda one: (one.state, -len(one.numbers), one.numbers))


def _text(trial: FrozenTrial) -> str:
    """The first line of the reason, and not more than a few lines of a terminal."""
    first = study_report.result_of(trial).strip().partition("\n")[0]
    return first if len(first) <= _LETTERS else f"{first[: _LETTERS - 3]}..."


def _reason_line(reason: Reason) -> str:
    count, numbers = len(reason.numbers), reason.numbers
    named = ", ".join(map(str, numbers[:_NAMED])) + (", ..." if count > _NAMED else "")
    return f"{STATES[reason.state]}: {counted(count, 'trial')} ({named}): {reason.text}"


# Where it comes from --------------------------------------------------------------------------


def seconds(study: Snapshot) -> list[float]:
    """Of training, of each finished trial that says it."""
    return [
        trial.user_attrs[SECONDS]
        for trial in study.trials
        if trial.state.is_finished() and SECONDS in trial.user_attrs
    ]


def period(study: Snapshot) -> tuple[datetime.datetime, datetime.datetime] | None:
    """When the first trial began and when the last one that is finished ended, in UTC."""
    begun = [t.datetime_start for t in study.trials if t.datetime_start is not None]
    ended = [t.datetime_complete for t in study.trials if t.datetime_complete is not None]
    if not begun or not ended:
        return None
    # Without a zone it is that of this machine.
    first, last = (time.astimezone(datetime.timezone.utc) for time in (min(begun), max(ended)))
    return first, last


def time_lines(study: Snapshot) -> Iterator[str]:
    """How long it trained, and from when to when."""
    took, when = seconds(study), period(study)
    if took:
        each = f", {_duration(statistics.median(took))} each (median)" if len(took) > 1 else ""
        yield f"time: {_duration(sum(took))} for {counted(len(took), 'trial')}{each}"
    if when is not None:
        first, last = when
        until = last.strftime("%H:%M:%S" if first.date() == last.date() else "%Y-%m-%d %H:%M:%S")
        yield f"trials ran from {first:%Y-%m-%d %H:%M:%S} to {until} UTC"


def _duration(taken: float) -> str:
    """Seconds in the unit in which they have two or three digits."""
    if taken < 10:
        return f"{taken:.1f} s"
    if taken < 600:
        return f"{taken:.0f} s"
    return f"{taken / 60:.0f} min" if taken < 36_000 else f"{taken / 3600:,.0f} h"


def _source_lines(recipe: Recipe) -> Iterator[str]:
    """What the study wrote down of its beginning."""
    known = recipe.provenance
    for key, title in (("command", "command"), ("data", "data"), ("seed", "seed")):
        if known.get(key) not in (None, ""):
            yield f"{title}: {known[key]}"
    if isinstance(versions := known.get("versions"), dict):
        yield f"versions: {', '.join(f'{name} {value}' for name, value in versions.items())}"


# For programs ---------------------------------------------------------------------------------


def summary_json(study: Snapshot, result: Result) -> dict[str, Any]:
    """The summary's numbers. The trials one by one are `kwsearch trials --json`."""
    recipe, when, size = study.recipe, period(study), _input(study.recipe)
    found = study_report.result_json(result)
    del found["trials"]
    done, planned = _final_trainings(study, result)
    return {
        "study": str(study.directory),
        "running": study.running,
        "model": recipe.model.name,
        "input": None if size is None else list(size),
        "budget": None if recipe.of_architectures else {_kind(recipe): [*targets_of(recipe)]},
        "params_allowed": [one.allowed for one in result.budgets],
        "asked": _asked(study),
        "states": states(study),
        "unfinished": [trial.number for trial in unfinished(study)],
        "final_trainings": {"done": len(done), "planned": planned},
        **found,
        "trust": [
            {"of": name, **vars(trust.correlation), "top": list(trust.top)}
            for name, trust in verdict.trust(study_report.rankings(result)).items()
        ],
        "reasons": [vars(reason) for reason in reasons(result.trials)],
        "seconds": sum(seconds(study)),
        "began": None if when is None else when[0].isoformat(),
        "ended": None if when is None else when[1].isoformat(),
        "provenance": recipe.provenance,
    }
