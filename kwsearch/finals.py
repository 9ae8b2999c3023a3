"""Finalists: the best plans and the baselines, trained again in full with several seeds.

What the search measured is the best of many tries on the images that it chose by. Here every
candidate has the same seeds, and the test images, if the data set has them, for the first time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import optuna
from optuna.trial import FrozenTrial, TrialState

from kwsearch.executors import Cancelled, Event, Executor, Failed, Finished, Job, Lost, Reported
from kwsearch.failures import LOSSES, NO_SPACE, Errors, disk_is_full, weight_of
from kwsearch.interrupts import counted
from kwsearch.trials import FINGERPRINT, NAMES, baseline, is_static
from kwsearch.verdict import Verdict, judge

_KEY = "final"
# The study's attribute that says which trials are finalists, once they are trained again.
FINALISTS = "finalists"


@dataclass(frozen=True)
class Training:
    """One candidate with one seed: a trial of the study, trained again."""

    number: int
    seed: int

    @property
    def key(self) -> str:
        """Where the study keeps its result."""
        return f"{_KEY}/{self.number}/{self.seed}"


class Watcher(Protocol):
    """Who is told how it goes."""

    def final(self, number: int, seed: int, result: Mapping[str, Any]) -> None:
        """A training is over: accuracies on "valid" and "test" images, or an "error"."""

    def say(self, message: str) -> None:
        """Something that the user should know."""


def chosen(trials: Sequence[FrozenTrial], top: int) -> list[FrozenTrial]:
    """The best `top` plans and the baselines, of the trials that are complete."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    baselines = [trial for trial in complete if baseline(trial) is not None]
    # A plan that was trained twice is one candidate, and one like a baseline is none.
    taken = {trial.user_attrs.get(FINGERPRINT) for trial in baselines}
    best: list[FrozenTrial] = []
    for trial in sorted(complete, key=lambda trial: (-trial.values[0], trial.number)):
        plan = trial.user_attrs.get(FINGERPRINT)
        if plan not in taken and len(best) < top:
            taken.add(plan)
            best.append(trial)
    return best + baselines


def run(
    study: optuna.Study,
    executor: Executor,
    trainings: Sequence[Training],
    job: Callable[[Training, int, int], Job],
    watcher: Watcher,
    stop: Callable[[], bool],
) -> None:
    """Train what the study does not have yet; results are kept as they come.

    job: of a training, for an attempt, in so many micro-batches, its trial number -1 - the place
    in `trainings`. stop: asked before each start. Ctrl-C lets those that run finish, a second one
    stops them; either raises KeyboardInterrupt. Raises StudyFailed for a full disk, and for the
    same error three times in a row.
    """
    known = study.user_attrs
    waiting = [place for place, training in enumerate(trainings) if training.key not in known]
    attempts = dict.fromkeys(waiting, 0)
    splits = dict.fromkeys(waiting, 1)
    losses = dict.fromkeys(waiting, 0.0)
    busy: set[int] = set()
    errors = Errors("final trainings")

    def keep(training: Training, result: Mapping[str, Any]) -> None:
        study.set_user_attr(training.key, result)
        watcher.final(training.number, training.seed, result)

    def failed(training: Training, message: str) -> None:
        """Not kept: the next run tries again, when what was wrong may be mended."""
        if NO_SPACE in message:
            raise disk_is_full(message)
        watcher.final(training.number, training.seed, {"error": message})
        errors.add(message)

    def handle(place: int, event: Event) -> None:
        if isinstance(event, (Finished, Failed, Lost, Cancelled)):
            busy.discard(place)
        if isinstance(event, Reported):
            losses[place] = 0
        elif isinstance(event, Lost):
            losses[place] += weight_of(event)
        if isinstance(event, Finished):
            keep(trainings[place], event.value)
        elif isinstance(event, Failed) and event.kind == "memory" and splits[place] == 1:
            splits[place] = 2
            waiting.insert(0, place)
        elif isinstance(event, Failed) and event.kind == "diverged":
            keep(trainings[place], {"error": event.message})
        elif isinstance(event, Failed):
            failed(trainings[place], event.message)
        elif isinstance(event, (Lost, Cancelled)):
            if losses[place] < LOSSES:
                waiting.insert(0, place)
            else:
                failed(trainings[place], "its process died")

    message = "stopping: trainings that run finish; Ctrl-C again stops now"
    with counted(watcher.say, message) as interrupts:
        while True:
            while waiting and len(busy) < executor.capacity and not stop() and not interrupts.count:
                place = waiting.pop(0)
                attempts[place] += 1
                executor.submit(job(trainings[place], attempts[place], splits[place]))
                busy.add(place)
            if not busy:
                break
            for event in executor.wait(1.0):
                place = -1 - event.trial
                if place in busy and event.attempt == attempts[place]:
                    handle(place, event)
            interrupts.check()
    if interrupts.count:
        raise KeyboardInterrupt


@dataclass(frozen=True)
class Finals:
    """accuracies: by candidate and seed. split: of the images they are of, "test" or "held-out".

    best: the number of the trial whose plan has the highest mean; None as long as one of the plans
    has no result. verdict: None without plans.
    """

    accuracies: dict[str, dict[int, float]]
    best: int | None
    split: str
    verdict: Verdict | None


def results(attributes: Mapping[str, Any], trials: Sequence[FrozenTrial]) -> Finals | None:
    """What the study's attributes say of the finalists among `trials`; None if there are none."""
    by_number = {trial.number: trial for trial in trials}
    found: dict[int, dict[int, Mapping[str, Any]]] = {}
    chosen = [by_number[n] for n in attributes.get(FINALISTS, ()) if n in by_number]
    waiting = {trial.number for trial in chosen if not is_static(trial)}
    for key, result in attributes.items():
        kind, _, rest = key.partition("/")
        if kind == _KEY:
            number, seed = map(int, rest.split("/"))
            waiting.discard(number)
            if number in by_number and "error" not in result:
                found.setdefault(number, {})[seed] = result
    if not found:
        return None
    tested = all(r["test"] is not None for one in found.values() for r in one.values())
    split = "test" if tested else "valid"
    accuracies = {
        name_of(by_number[number]): {seed: one[seed][split] for seed in sorted(one)}
        for number, one in sorted(found.items())
    }
    baselines = [name_of(by_number[n]) for n in sorted(found) if baseline(by_number[n])]
    searched = [name for name in accuracies if name not in baselines]
    verdict = judge(accuracies, same_images=not tested, baselines=baselines) if searched else None
    means = {
        number: statistics.fmean(result[split] for result in one.values())
        for number, one in sorted(found.items())
        if not is_static(by_number[number])
    }
    best = None if waiting else max(means, key=means.__getitem__, default=None)
    return Finals(accuracies, best, "test" if tested else "held-out", verdict)


def name_of(trial: FrozenTrial) -> str:
    """A finalist in words."""
    kind = baseline(trial)
    return f"trial {trial.number}" if kind is None else NAMES[kind]
